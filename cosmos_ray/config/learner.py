"""Settings of the learner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosmos_ray.config.option import fill, option
from cosmos_ray.config.selector import NODES, selector
from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class LearnerConfig:
    """The DeepSpeed learner."""

    batch_size: int = option(32, "samples per step, all ranks together", low=1)
    accumulate: int = option(1, "passes that split a step's samples; more passes need less memory", low=1, rare=True)
    lr: float = option(1.5e-3, "peak learning rate of `pretrain`", low=0)
    refine_lr: float = option(8e-4, "peak learning rate of `refine`", low=0)
    schedule: Literal["linear", "paper", "paper_before"] = option(
        "linear", "learning-rate schedule, 'linear' or 'paper'; linear decays over the stage, the paper's has cycles of fixed length. "
        "'paper_before' is how earlier versions read the paper's: its line begins at step 0, not at the end of the warm-up", rare=True)
    warmup: int = option(50, "linear warm-up steps of `pretrain`", low=0)
    refine_warmup: int = option(None, "linear warm-up steps of `refine`", low=0, follows="learner.warmup", rare=True)
    decay_from: float = option(0.3, "share of the steps after which the rate decays, schedule linear", low=0, high=1, rare=True)
    final_lr: float = option(0.05, "last learning rate as a share of the peak, schedule linear", low=0, high=1, rare=True)
    cycle: int = option(30_000, "steps of a cycle of `pretrain`, schedule paper; the rate falls to 0.3 of the peak over the cycle, then "
                        "stays at 0.06", low=1, rare=True)
    refine_cycle: int = option(None, "steps of a cycle of `refine`, schedule paper", low=1, follows="learner.cycle", rare=True)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0, rare=True)
    decay_all: bool = option(False, "decay every parameter; otherwise the matrices alone", follows="model.fidelity", rare=True)
    beta2: float = option(0.95, "AdamW second-moment decay", low=0, high=1, rare=True)
    clip: float = option(1.0, "largest gradient norm, 0 = no clipping", low=0, rare=True)
    ema: float = option(0.995, "decay of the published average, 0 = raw weights; the average is over the training steps", low=0, high=1)
    loader_threads: int = option(0, "threads that read batches ahead, 0 = none; without them a step reads its own batch", low=0)
    zero_stage: Literal[0, 1, 2, 3] = option(1, "DeepSpeed ZeRO stage; 0 has the least overhead on one rank, but reports no gradient norm "
                                             "in fp32", rare=True)
    world_size: int = option(1, "learner ranks, one Ray actor each", low=1)
    precision: Literal["fp32", "bf16"] = option("fp32", "compute precision: 'fp32' or 'bf16'")
    lora_rank: int = option(0, "rank of low-rank updates to train; the network's own weights stay frozen, and both are merged when "
                            "published; 0 = train all weights", low=0, rare=True)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass; less memory, a third more compute",
                                            rare=True)
    accelerate: Literal["none", "graphs"] = option("none", "'graphs' captures the passes as CUDA graphs; launching the operations takes "
                                                   "most of a small network's step; needs a GPU")
    latent_cache: Literal["off", "plain", "augmented"] = option(
        "off", "keep encoded windows on disk: 'off', 'plain', 'augmented'; 'off' encodes at every step, 'plain' keeps each window as the "
        "policy sees it, 'augmented' keeps latent_variants versions of each", rare=True)
    latent_variants: int = option(4, "augmented versions of a window in the latent cache", low=1, high=1000, rare=True)
    latent_cache_gb: float = option(50.0, "disk space of the latent cache in GB; windows beyond it are encoded again", low=0, rare=True)
    gpus: float = option(0.0, "GPUs per rank, 0 = what inference leaves; the ranks share the GPUs that the inference actors leave, at "
                         "most one each", low=0)
    threads: int = option(0, "CPU threads per rank, 0 = shared cores; the ranks on a node share its cores", low=0)
    nodes: str = option("", NODES.format("the learner ranks"), rare=True)
    base_mix: tuple[float, ...] = option((0.5, 0.25, 0.25), "policy, world-model, value shares of `pretrain`", low=0, high=1)
    refine_mix: tuple[float, ...] = option((0.5, 0.25, 0.25), "policy, world-model, value shares of `refine`", low=0, high=1)
    self_imitation: float = option(0.0, "share of policy samples from own successful rollouts; the rest is from demonstrations. The "
                                   "policy imitates the executed actions without the exploration noise", low=0, high=1)
    advantage_temperature: float = option(
        0.0, "temperature of advantage weights on own rollouts; own rollouts then include failures, the policy imitates what they "
        "executed, noise included, and each window weighs exp(A / temperature), at most 5, with A = V(s') - V(s) by the planning network "
        "(planning_steps); 0 = own successes alone, each of weight 1", low=0, high=10)
    planning_mix: tuple[float, ...] = option((0.0, 0.3, 0.7), "policy, world-model, value shares of the planning network", low=0, high=1)
    planning_world_weight: float = option(None, "loss weight of future frames, planning network; it applies to world-model samples", low=0,
                                          follows="model.world_weight")
    value_mode: Literal["future", "action", "both"] = option("future", "what value samples see: 'future', 'action', 'both'; V(s'), "
                                                             "Q(s, a), or half of the samples each. The planner ranks by one of them or "
                                                             "by their mean")
    base_value_mode: Literal["full", "future", "action", "both"] = option(
        None, "value_mode of `pretrain`; it also takes 'full', which shows s, a and s' as the paper does", follows="learner.value_mode",
        rare=True)
    checkpoint_every: int = option(200, "steps between resumable checkpoints", low=1)
    deadline_s: float = option(1800.0, "seconds without an answer to a burst of steps before the learner is restarted", low=5, rare=True)

    def __post_init__(self):
        fill(self, {"refine_warmup": self.warmup, "refine_cycle": self.cycle, "base_value_mode": self.value_mode})

    @property
    def rows(self) -> int:
        """Samples of one forward pass on one rank."""
        return self.batch_size // (self.world_size * self.accumulate)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of the learner that do not go together."""
        selector("learner.nodes", self.nodes)
        for name in ("base_mix", "refine_mix", "planning_mix"):
            mix = getattr(self, name)
            if len(mix) != 3 or abs(sum(mix) - 1) > 1e-6:
                raise ConfigError(f"learner.{name} = {mix}: give three shares (policy, world model, value) that add up to 1")
        if self.zero_stage == 3 and self.ema:
            raise ConfigError("learner.ema needs whole parameters on every rank: set learner.ema to 0 with learner.zero_stage 3")
        if self.accelerate == "graphs" and (self.zero_stage == 3 or self.activation_checkpointing or self.accumulate > 1):
            raise ConfigError("learner.accelerate = 'graphs' needs whole parameters on every rank, activations that are kept and steps of "
                              "one pass: set it to 'none', or learner.zero_stage to less than 3, learner.activation_checkpointing to false "
                              "and learner.accumulate to 1")
        if self.batch_size % (self.world_size * self.accumulate):
            raise ConfigError(f"learner.batch_size = {self.batch_size} does not divide among learner.world_size = {self.world_size} ranks "
                              f"and learner.accumulate = {self.accumulate} passes")
        if self.planning_world_weight == 0:
            raise ConfigError("learner.planning_world_weight = 0 would train no world model: set it above 0, or the second share of "
                              "learner.planning_mix to 0")
        if self.advantage_temperature:
            self._check_advantage()

    def _check_advantage(self) -> None:
        if self.value_mode == "action":
            raise ConfigError("learner.advantage_temperature weighs by V(s'), which learner.value_mode = 'action' does not train: set it "
                              "to 'both', or learner.advantage_temperature to 0")
        if not (self.self_imitation and self.planning_mix[2]):
            raise ConfigError("learner.advantage_temperature weighs the policy samples of learner.self_imitation by a value that "
                              "learner.planning_mix trains: neither may be 0, or set learner.advantage_temperature to 0")
