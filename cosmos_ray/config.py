"""Every setting of a run, as frozen dataclasses; the help text stands at the field.

One :class:`RunConfig` describes every stage. It is filled from defaults, then a TOML file (``--config``), then flags
(``--section.field value``), and stored as ``config.json`` beside the run so that a later stage starts from the same one.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import without_credentials


def option(default: Any, help: str, choices: tuple | None = None, low: float | None = None, high: float | None = None):
    """A dataclass field with its help text and the values it accepts (``choices``, or ``low <= value <= high``)."""
    metadata = {"help": help, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SimConfig:
    """Which robosuite environment runs, and what is seen of it."""

    task: str = option("Lift", "robosuite task name (Lift, Stack, PickPlaceCan, NutAssemblySquare, Door, or any other)")
    robots: tuple[str, ...] = option(("Panda",), "robot arms, as robosuite names them; two for two-arm tasks")
    controller: str = option("OSC_POSE", "robosuite part controller of the arms")
    wrist_cameras: tuple[str, ...] = option(("robot0_eye_in_hand",), "wrist cameras, in latent-frame order")
    third_cameras: tuple[str, ...] = option(("agentview",), "third-person cameras, in latent-frame order")
    image_size: int = option(64, "height and width of every frame in pixels", low=16, high=1024)
    actions: str = option("auto", "action space: 'position' (dx, dy, dz, gripper), 'pose' (+ rotation) or 'auto' by task",
                          choices=("auto", "position", "pose"))
    horizon: int = option(0, "control steps before an episode times out; 0 takes the task's own", low=0)
    control_freq: int = option(20, "control steps per simulated second", low=1, high=500)
    placement: float = option(0.0, "half-width in metres of the initial object placement; 0 keeps robosuite's own", low=0, high=0.3)
    mesh_cell: float = option(0.008, "vertex-clustering cell in metres of the render-only meshes; 0 renders them undecimated",
                              low=0, high=0.05)
    fast_step: bool = option(True, "fused OSC substeps (about 3x faster; falls back to robosuite's own where not valid)")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Every camera in latent-frame order: wrist cameras, then third-person cameras."""
        return tuple(self.wrist_cameras) + tuple(self.third_cameras)


@dataclass(frozen=True)
class ModelConfig:
    """The one network that is policy, world model and value function."""

    preset: str = option("tiny", "model size: 'tiny' for a laptop, 'cosmos-predict2-2b' for the real dimensions",
                         choices=("tiny", "cosmos-predict2-2b"))
    suite: str = option("", "dimensions and evaluation settings of a released policy: 'libero', 'robocasa' or 'aloha'",
                        choices=("", "libero", "robocasa", "aloha"))
    chunk: int = option(8, "actions per chunk (K)", low=1, high=256)
    output: str = option("auto", "what the network outputs: 'x0', 'velocity' (rectified flow) or 'auto' by preset",
                         choices=("auto", "x0", "velocity"))
    width: int = option(0, "model channels; 0 takes the preset's", low=0)
    layers: int = option(0, "transformer blocks; 0 takes the preset's", low=0)
    heads: int = option(0, "attention heads; 0 takes the preset's", low=0)
    patch: int = option(0, "spatial patch of the latent grid; 0 takes the preset's", low=0)
    sigma_frame_scale: str = option("auto", "multiply training sigma by sqrt(latent frames): 'on', 'off', 'auto' by preset",
                                    choices=("auto", "on", "off"))
    residual: str = option("auto", "predict a future frame as its change from the current one, which is shown to it with the actions: "
                           "'on', 'off', 'auto' by preset (on for tiny)",
                           choices=("auto", "on", "off"))
    top_share: float = option(-1.0, "share of the world-model and value samples trained as the planner asks them: one evaluation at "
                              "the first sigma, from zeros; -1 takes the preset's (0.7 for tiny, 0 for the 2B)", low=-1, high=1)
    imagined_share: float = option(-1.0, "share of the V(s') samples trained on the future that the network imagines in one evaluation, as "
                                   "the planner's are, instead of the real one; -1 takes the preset's (0.5 for tiny, 0 for the 2B)",
                                   low=-1, high=1)
    uniform_share: float = option(0.3, "share of the drawn training sigmas that are from U(1, 85), the rest log-normal: 0 is the "
                                  "schedule of the video model, 0.3 the paper's hybrid; samples of model.top_share draw none",
                                  low=0, high=1)
    sigma_min: float = option(0.0, "last sigma of the sampler; 0 takes the preset's (1 for tiny, 4 for the 2B)", low=0, high=80)
    action_weight: float = option(0.0, "loss weight of the ACTION frame; 0 takes the preset's (4 for tiny, 1 for the 2B)", low=0)
    value_weight: float = option(0.0, "loss weight of the VALUE frame; 0 takes the preset's (3 for tiny, 1 for the 2B)", low=0)
    world_weight: float = option(0.0, "loss weight of the future frames in world-model samples, whose changes are small numbers; "
                                 "0 takes the preset's (10 for tiny, 1 for the 2B)", low=0)
    augment: str = option("auto", "train on randomly cropped, rotated and recoloured frames and act on the centre crop: 'on', 'off', "
                          "'auto' by preset (on for the 2B)", choices=("auto", "on", "off"))
    tokenizer_path: str = option("", "directory of the Wan 2.1 VAE in diffusers layout (2B preset only)")
    text_path: str = option("", "T5 encoder directory, or cached embeddings as .safetensors or the public .pkl (2B preset only)")


@dataclass(frozen=True)
class ReplayConfig:
    """Where episodes are stored and how they become training samples."""

    store: str = option("", "where the replay store lies: a folder or an s3:// or gs:// URI; empty: in the run's folder")
    gamma: float = option(0.98, "discount of the Monte-Carlo return per control step", low=0.5, high=1.0)
    success_share: float = option(0.5, "share of successful episodes among rollout samples", low=0, high=1)
    rollout_frame_stride: int = option(4, "also store a rendered frame every this many steps of a rollout; 0 keeps chunk ends",
                                       low=0)
    patience_s: float = option(120.0, "seconds a worker keeps finished episodes in memory and tries again while the store cannot be "
                               "written", low=0, high=86400)
    samples_per_insert: float = option(0.0, "training windows per collected control step while refining; 0 paces "
                                       "both to end together", low=0)


@dataclass(frozen=True)
class LearnerConfig:
    """The DeepSpeed learner."""

    batch_size: int = option(32, "samples per step, all ranks together", low=1)
    accumulate: int = option(1, "forward and backward passes a step's samples are split into, to save memory", low=1)
    lr: float = option(1.5e-3, "peak learning rate of `pretrain`", low=0)
    refine_lr: float = option(8e-4, "peak learning rate of `refine`", low=0)
    schedule: str = option("linear", "learning rate: 'linear' decay over the stage, or the 'paper' one in cycles of fixed length",
                           choices=("linear", "paper"))
    warmup: int = option(50, "linear warm-up steps", low=0)
    refine_warmup: int = option(0, "the same in `refine`; 0 takes warmup", low=0)
    decay_from: float = option(0.3, "'linear': share of the steps after which the rate decays", low=0, high=1)
    final_lr: float = option(0.05, "'linear': last learning rate as a share of the peak", low=0, high=1)
    cycle: int = option(30_000, "'paper': steps over which the rate falls to 0.3 of the peak, before it stays at 0.06", low=1)
    refine_cycle: int = option(0, "the same in `refine`; 0 takes cycle", low=0)
    weight_decay: float = option(0.01, "AdamW weight decay", low=0)
    beta2: float = option(0.95, "AdamW second-moment decay", low=0, high=1)
    clip: float = option(1.0, "gradient-norm clipping; 0 disables it", low=0)
    ema: float = option(0.995, "decay of the weight average that is published; 0 publishes the raw weights", low=0, high=1)
    loader_threads: int = option(0, "threads that read and decode batches ahead of the training step; 0 reads them in the step", low=0)
    zero_stage: int = option(1, "DeepSpeed ZeRO stage; 0 has the least overhead on one rank, but in fp32 it reports no gradient norm",
                             choices=(0, 1, 2, 3))
    world_size: int = option(1, "learner ranks, one Ray actor each", low=1)
    precision: str = option("fp32", "compute precision", choices=("fp32", "bf16"))
    lora_rank: int = option(0, "train low-rank updates of this rank beside frozen weights, merged when published; 0 trains all", low=0)
    activation_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, a third more compute")
    accelerate: str = option("none", "capture the network's forward and backward pass as CUDA 'graphs': a small one's steps are mostly "
                             "launches; needs a GPU", choices=("none", "graphs"))
    latent_cache: str = option("off", "keep encoded windows on disk: 'off' encodes at every step, 'plain' keeps each window as the policy "
                               "sees it, 'augmented' keeps latent_variants augmented versions of it", choices=("off", "plain", "augmented"))
    latent_variants: int = option(4, "augmented versions of each window that 'augmented' keeps", low=1, high=1000)
    latent_cache_gb: float = option(50.0, "disk space of the latent cache in GB; what does not fit is encoded again", low=0)
    gpus: float = option(0.0, "GPUs per rank; 0 shares what the inference actors leave, at most one each", low=0)
    threads: int = option(0, "CPU threads per rank; 0 shares the machine's cores among the ranks", low=0)
    base_mix: tuple[float, ...] = option((0.5, 0.25, 0.25), "shares of policy, world-model and value samples in `pretrain`", low=0, high=1)
    refine_mix: tuple[float, ...] = option((), "the same in `refine`; empty takes the preset's: the paper's 0.1,0.45,0.45 for the 2B, "
                                           "0.5,0.25,0.25 for tiny, which forgets its policy otherwise", low=0, high=1)
    self_imitation: float = option(0.0, "share of the policy samples that come from successful rollouts instead of demonstrations; what "
                                   "a rollout executed without exploration noise is imitated", low=0, high=1)
    advantage_temperature: float = option(0.0, "self_imitation takes what rollouts executed, failures and noise included, each window weighted by "
                              "exp(A / this), at most 5: A = V(s') - V(s) by the planning network (planning_steps); 0 imitates "
                              "successes alone, unweighted", low=0, high=10)
    planning_mix: tuple[float, ...] = option((0.0, 0.3, 0.7), "shares of policy, world-model and value samples of the planning network",
                                             low=0, high=1)
    planning_world_weight: float = option(0.0, "loss weight of the future frames in the world-model samples of the planning network; 0 "
                                          "takes that of the policy it is trained from (model.world_weight)", low=0)
    value_mode: str = option("future", "what value samples see: 'future' V(s'), 'action' Q(s,a) or 'both' in equal parts; the planner "
                             "ranks by one of them, or by their mean", choices=("future", "action", "both"))
    base_value_mode: str = option("", "the same in `pretrain`, where 'full' shows all of s, a and s' as the paper does; empty takes value_mode",
                             choices=("", "full", "future", "action", "both"))
    checkpoint_every: int = option(200, "steps between resumable checkpoints", low=1)

    @property
    def rows(self) -> int:
        """Samples of one forward pass on one rank."""
        return self.batch_size // (self.world_size * self.accumulate)


@dataclass(frozen=True)
class InferenceConfig:
    """The shared pool that answers every rollout worker."""

    actors: int = option(1, "inference actors", low=1)
    gpus: float = option(0.0, "GPUs per inference actor", low=0)
    max_batch: int = option(16, "observation rows per forward pass at most", low=1)
    wait_ms: float = option(2.0, "how long a waiting request may be held back to fill the batch", low=0, high=1000)
    threads: int = option(1, "CPU threads per inference actor", low=1)
    steps: int = option(5, "network evaluations per action chunk", low=1, high=100)
    reference_steps: bool = option(False, "count steps as the public code does, whose 2 steps make one evaluation")
    precision: str = option("auto", "compute precision: 'fp32', 'bf16' or 'auto' (bf16 on a GPU)", choices=("auto", "fp32", "bf16"))
    accelerate: str = option("none", "'compile' the network, capture the sampler as CUDA 'graphs', or both",
                             choices=("none", "compile", "graphs", "both"))
    timeout_s: float = option(60.0, "seconds a worker waits for an answer, retries included", low=1)


@dataclass(frozen=True)
class RolloutConfig:
    """The fleet that acts in the simulator."""

    workers: int = option(2, "rollout workers, one Ray actor (one process) each", low=1)
    envs_per_worker: int = option(6, "episodes each worker runs at once", low=1)
    execute: int = option(0, "actions of a chunk that are executed before the next query; 0 executes all", low=0)
    action_noise: float = option(0.0, "standard deviation of exploration noise added to executed actions", low=0, high=1)
    chunk_noise: float = option(0.0, "standard deviation of an exploration offset that stays the same for a chunk; half of the chunks get "
                                "one. It moves the hand: for end-effector actions", low=0, high=1)
    horizon: int = option(0, "control steps before a rollout times out, evaluation aside: a longer one also sees how a policy that went "
                          "astray comes back; 0 takes sim.horizon", low=0)
    planned: bool = option(False, "from the second of `rounds` on, choose every chunk of the rollouts before training by best-of-N "
                                  "planning, so that the policy learns from what planning found")
    deadline_s: float = option(180.0, "seconds without any answer after which a worker is replaced", low=5)


@dataclass(frozen=True)
class PlannerConfig:
    """Best-of-N planning (paper section on test-time planning)."""

    candidates: int = option(8, "action chunks proposed per decision (N)", low=1, high=1024)
    rank_by: str = option("future", "rank by 'future' V(s') of predicted futures, by 'action' Q(s,a), or by the mean of 'both'",
                        choices=("future", "action", "both"))
    spread: float = option(0.0, "standard deviation of an offset that moves the hand of every second candidate elsewhere; give rollouts "
                           "at least as much rollout.chunk_noise, so that the world model has seen such chunks", low=0, high=1)
    futures: int = option(1, "predicted futures per candidate", low=1, high=64)
    future_steps: int = option(1, "network evaluations of the longest future prediction", low=1, high=100)
    value_samples: int = option(1, "value samples per predicted future", low=1, high=64)
    value_steps: int = option(1, "network evaluations of the longest value sample", low=1, high=100)
    aggregate: str = option("average", "how value samples become one score",
                            choices=("average", "lcb", "success_vote", "majority_mean"))


@dataclass(frozen=True)
class RunConfig:
    """One run: where it lives, how much it does, and the settings of every part."""

    name: str = option("demo", "run name: a folder under --root")
    root: str = option("runs", "folder that holds runs")
    seed: int = option(0, "seed of everything random in the run", low=0, high=10**6)
    init: str = option("", "weights `pretrain` starts from instead of random ones: a checkpoint of ours or any format `import` reads")
    demos: int = option(120, "demonstrations to have in the store after `collect`", low=1, high=500_000)
    pretrain_steps: int = option(600, "learner steps of `pretrain`", low=1)
    rollouts: int = option(80, "rollout episodes to have in the store after `rollout`", low=0, high=500_000)
    rounds: int = option(1, "rounds of `refine`: each one after the first collects as many rollouts again, with the policy refined so far, "
                            "and trains as many steps from it", low=1, high=1000)
    refine_steps: int = option(600, "learner steps of `refine`, each round", low=1)
    planning_steps: int = option(0, "learner steps of `refine`, each round, that first train a network of its own for planning, at first "
                                 "from the base policy, on the rollouts there are: its world model and value judge candidates, and "
                                 "rollouts for learner.advantage_temperature; 0 leaves planning to the refined network", low=0)
    refine_rollouts: int = option(60, "further rollout episodes collected during `refine`, each round", low=0, high=500_000)
    publish_every: int = option(50, "learner steps between weight pushes to the pool while refining", low=1)
    eval_episodes: int = option(60, "held-out initial states per evaluated arm", low=1, high=500_000)
    repeat: int = option(0, "`evaluate` also repeats this many stored episodes per arm and compares them step by step", low=0)
    plan_seed: int = option(0, "`plan`: number of the held-out initial state", low=0)
    address: str = option("", "Ray cluster to join (host:port or auto); empty joins $RAY_ADDRESS if set, else starts a local one")
    wandb: str = option("off", "Weights & Biases mode", choices=("off", "offline", "online"))
    sim: SimConfig = field(default_factory=SimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)


#: ``demo``: Lift on eleven times the usual area, from few demonstrations: what a policy that often fails learns from its rollouts
DEMO = RunConfig(
    demos=20, pretrain_steps=900, rollouts=160, planning_steps=500, refine_steps=900, refine_rollouts=60, eval_episodes=100,
    sim=SimConfig(placement=0.1), replay=ReplayConfig(rollout_frame_stride=2),
    learner=LearnerConfig(value_mode="both", refine_lr=1e-3, refine_mix=(1.0, 0.0, 0.0), self_imitation=0.7, advantage_temperature=0.1),
    rollout=RolloutConfig(chunk_noise=0.25, horizon=160), planner=PlannerConfig(spread=0.06))

#: ``demo --quick``: every stage at small counts, to see it work rather than to learn much
QUICK_COUNTS = {"demos": 20, "pretrain_steps": 150, "rollouts": 12, "planning_steps": 40, "refine_steps": 60, "refine_rollouts": 12,
                "publish_every": 20, "eval_episodes": 8}


def check(config: Any, where: str = "") -> None:
    """Raise :class:`ConfigError` for the first field of a (nested) config that is out of its range or choices."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        name = f"{where}{item.name}"
        if dataclasses.is_dataclass(value):
            check(value, name + ".")
            continue
        choices, low, high = (item.metadata.get(k) for k in ("choices", "low", "high"))
        if choices is not None and value not in choices:
            raise ConfigError(f"{name} = {value!r} is not one of {', '.join(map(str, choices))}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{name} = {value!r} is not a finite number")
            if (low is not None and number < low) or (high is not None and number > high):
                bounds = " and ".join(f"{word} {bound:g}" for word, bound in (("at least", low), ("at most", high)) if bound is not None)
                raise ConfigError(f"{name} = {value!r} is out of range: it must be {bounds}")
    if isinstance(config, RunConfig):
        _check_together(config)


def _check_together(config: RunConfig) -> None:
    """The constraints that tie two fields together."""
    for name in ("base_mix", "refine_mix", "planning_mix"):
        mix = getattr(config.learner, name)
        if (mix or name != "refine_mix") and (len(mix) != 3 or abs(sum(mix) - 1) > 1e-6):
            raise ConfigError(f"learner.{name} = {mix}: give three shares (policy, world model, value) that add up to 1")
    if config.learner.zero_stage == 3 and config.learner.ema:
        raise ConfigError("learner.ema needs whole parameters on every rank: set learner.ema to 0 with learner.zero_stage 3")
    if config.learner.accelerate == "graphs" and (config.learner.zero_stage == 3 or config.learner.activation_checkpointing
                                                  or config.learner.accumulate > 1):
        raise ConfigError("learner.accelerate = 'graphs' needs whole parameters on every rank, activations that are kept and steps of one "
                          "pass: set it to 'none', or learner.zero_stage to less than 3, learner.activation_checkpointing to false and "
                          "learner.accumulate to 1")
    if config.learner.batch_size % (config.learner.world_size * config.learner.accumulate):
        raise ConfigError(f"learner.batch_size = {config.learner.batch_size} does not divide among learner.world_size = "
                          f"{config.learner.world_size} ranks and learner.accumulate = {config.learner.accumulate} passes")
    if config.learner.value_mode not in (config.planner.rank_by, "both"):
        raise ConfigError(f"planner.rank_by = {config.planner.rank_by!r} ranks by what learner.value_mode = "
                          f"{config.learner.value_mode!r} does not train: set learner.value_mode to it or to 'both'")
    if config.learner.advantage_temperature and config.learner.value_mode == "action":
        raise ConfigError("learner.advantage_temperature weighs by V(s'), which learner.value_mode = 'action' does not train: set it to 'both', or "
                          "learner.advantage_temperature to 0")
    if config.learner.advantage_temperature and not (config.learner.self_imitation and config.learner.planning_mix[2]):
        raise ConfigError("learner.advantage_temperature weighs the policy samples of learner.self_imitation by a value that learner.planning_mix "
                          "trains: neither may be 0, or set learner.advantage_temperature to 0")
    if config.learner.advantage_temperature and not config.planning_steps:
        raise ConfigError("learner.advantage_temperature weighs by the value of the planning network: set planning_steps, as many as refine_steps, "
                          "or learner.advantage_temperature to 0")
    if config.inference.accelerate in ("graphs", "both") and not config.inference.gpus:
        raise ConfigError(f"inference.accelerate = {config.inference.accelerate!r} needs a GPU: give each inference actor one with "
                          "inference.gpus, or take 'compile'")
    if 0 < config.rollout.horizon < config.sim.horizon:
        raise ConfigError(f"rollout.horizon = {config.rollout.horizon} is shorter than sim.horizon = {config.sim.horizon}: rollouts would "
                          "never see the end of an episode; set it to 0 or to more")
    if config.rollout.execute > config.model.chunk:
        raise ConfigError(f"rollout.execute = {config.rollout.execute} is longer than the chunk, model.chunk = {config.model.chunk}")
    scheme, mark, _ = config.replay.store.partition("://")
    if mark and scheme not in ("s3", "gs"):
        raise ConfigError(f"replay.store = {without_credentials(config.replay.store)!r} is neither a folder nor an s3:// or gs:// URI")
    if not config.sim.cameras:
        raise ConfigError("sim.wrist_cameras and sim.third_cameras are both empty: the policy needs at least one camera")
    if len(set(config.sim.cameras)) != len(config.sim.cameras):
        raise ConfigError(f"sim.wrist_cameras and sim.third_cameras name a camera twice: {', '.join(config.sim.cameras)}")
    if not config.name or any(c in config.name for c in "/\\\0") or config.name in (".", ".."):
        raise ConfigError(f"name = {config.name!r} is not a folder name: use letters, digits, '-' and '_'")
