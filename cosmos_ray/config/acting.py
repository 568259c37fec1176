"""Settings of what acts: inference, rollouts and planning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosmos_ray.config.option import option
from cosmos_ray.config.selector import NODES, selector
from cosmos_ray.errors import ConfigError

#: V(s') of imagined futures, Q(s, a), the mean of both, or the value that the policy generates jointly with the candidate
RankBy = Literal["future", "action", "both", "joint", "random", "medoid", "consensus"]
VALUED = ("future", "action", "both")  #: ranks by values that the planning network gives
JUDGED = (*VALUED, "consensus")  #: ranks that ask the planning network


@dataclass(frozen=True)
class InferenceConfig:
    """The shared pool that answers every rollout worker."""

    actors: int = option(1, "inference actors", low=1)
    max_actors: int = option(0, "most inference actors: more of them start while requests queue and there is room, and end when they are "
                             "idle; 0 = inference.actors", low=0, rare=True)
    gpus: float = option(0.0, "GPUs per inference actor, 0 = run on the CPU", low=0)
    max_batch: int = option(16, "most observation rows per forward pass", low=1)
    wait_ms: float = option(2.0, "ms to wait for requests to fill a batch; longer, up to a quarter of a batch's time, where that "
                            "fills it", low=0, high=1000)
    threads: int = option(1, "CPU threads per inference actor", low=1)
    steps: int = option(5, "network evaluations per action chunk", low=1, high=100)
    reference_steps: bool = option(False, "count steps as the public code does; its 2 steps are one evaluation", rare=True)
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "compute precision: 'auto', 'fp32', 'bf16'; auto is bf16 on a GPU and "
                                                        "fp32 on a CPU")
    accelerate: Literal["none", "compile", "graphs", "both"] = option(
        "none", "'compile' the network, CUDA 'graphs', or 'both'; graphs capture the sampler and need a GPU")
    timeout_s: float = option(60.0, "seconds a worker waits for an answer; retries included", low=1, rare=True)
    nodes: str = option("", NODES.format("the inference actors"), rare=True)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of inference that do not go together."""
        selector("inference.nodes", self.nodes)
        if 0 < self.max_actors < self.actors:
            raise ConfigError(f"inference.max_actors = {self.max_actors} is less than inference.actors = {self.actors}: raise it, or set "
                              "it to 0 for as many")
        if self.accelerate in ("graphs", "both") and not self.gpus:
            raise ConfigError(f"inference.accelerate = {self.accelerate!r} needs a GPU: give each inference actor one with inference.gpus, "
                              "or take 'compile'")


@dataclass(frozen=True)
class RolloutConfig:
    """The fleet that acts in the simulator. A :class:`RunConfig` fills in ``execute`` and ``horizon`` where they are not given."""

    workers: int = option(2, "rollout workers, one Ray actor (one process) each", low=1)
    envs_per_worker: int = option(6, "episodes that each worker runs at once", low=1)
    execute: int = option(None, "actions of a chunk to execute before the next query", low=1, follows="model.chunk")
    action_noise: float = option(0.0, "standard deviation of noise on executed actions; exploration", low=0, high=1)
    chunk_noise: float = option(0.0, "standard deviation of an offset on whole chunks; exploration: half of the chunks get an offset, "
                                "which moves the hand and stays the same for the chunk. For end-effector actions", low=0, high=1)
    horizon: int = option(None, "control steps before a rollout times out; evaluation uses sim.horizon. A longer rollout also sees how a "
                          "policy that went astray comes back; 0 with sim.suite = each task's own", low=0, follows="sim.horizon")
    planned: bool = option(False, "plan the rollouts from the second round on; best-of-N then chooses every chunk of the rollouts that "
                           "come before training, and the policy learns from what planning found")
    deadline_s: float = option(180.0, "seconds without an answer before a worker is replaced", low=5, rare=True)
    nodes: str = option("", NODES.format("the rollout workers"), rare=True)
    chunk_deadline_s: float = option(60.0, "seconds that a simulator may take for a reset or an action chunk; then its process is "
                                     "replaced and the episode runs again. At most half of rollout.deadline_s, which a demonstration has",
                                     low=1, rare=True)
    simulator_memory_mb: float = option(8000.0, "resident MB above which a worker's simulators get a new process, 0 = no cap; one "
                                        "that grows above it within a chunk counts as broken by that episode", low=0, rare=True)
    simulator_episodes: int = option(1000, "episodes after which a worker's simulators get a new process, 0 = never; running episodes go "
                                     "on in it", low=0, rare=True)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of rollouts that do not go together."""
        selector("rollout.nodes", self.nodes)


@dataclass(frozen=True)
class PlannerConfig:
    """Best-of-N planning (paper section on test-time planning)."""

    candidates: int = option(8, "action chunks proposed per decision (N)", low=1, high=1024)
    rank_by: RankBy = option("future", "value that ranks candidates: 'future', 'action', 'both', 'joint'; V(s') of imagined futures, "
                             "Q(s, a), the mean of the two, or the value that the policy generates jointly with each candidate, without "
                             "further evaluations. Controls that ask no value: 'random', 'medoid' of the candidates, 'consensus' of their "
                             "futures")
    spread: float = option(0.0, "standard deviation of an offset on every second candidate; the offset moves the hand. Give rollouts at "
                           "least as much rollout.chunk_noise, so that the world model has seen such chunks", low=0, high=1)
    futures: int = option(1, "imagined futures per candidate", low=1, high=64)
    future_steps: int = option(1, "network evaluations of the longest imagined future", low=1, high=100)
    value_samples: int = option(1, "value samples per imagined future", low=1, high=64)
    value_steps: int = option(1, "network evaluations of the longest value sample", low=1, high=100)
    ladder: Literal["rounded", "truncated"] = option(
        "rounded", "how the evaluations of an ensemble's members are spread from 1 to the longest; 'truncated' is the public code's",
        follows="model.fidelity", rare=True)
    aggregate: Literal["average", "lcb", "lcb_population", "success_vote", "majority_mean"] = option(
        "average", "how value samples become one score; 'lcb' is the mean less the samples' standard deviation, 'lcb_population' less the "
        "population's, as earlier versions had it")
    deadline_ms: float = option(
        0.0, "ms in which a decision is made, 0 = take what it takes; the planner then chooses candidates, steps and ensembles, at most as "
        "many as are set here, by what the network takes on this device, and answers with the best found. Choices depend on the clock: "
        "such an evaluation cannot be repeated bit for bit", low=0, high=600_000)
    depth: int = option(1, "chunks that a plan looks ahead, 1 to 3; from an imagined future the policy proposes again, the world model "
                        "imagines on, and the value judges the last state", low=1, high=3)
    branch: int = option(1, "chunks proposed in each imagined future, at planner.depth 2 and 3; the best of them counts", low=1, high=64,
                         rare=True)
    beam: int = option(0, "plans of one observation that are looked further into after each chunk, 0 = all; at planner.depth 2 and 3",
                       low=0, high=1024, rare=True)
    early_rejection: bool = option(
        False, "stop valuing a candidate that cannot win any more; the choice is the same with fewer evaluations, but the scores of the "
        "others are estimates", rare=True)

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of the planner that do not go together."""
        if self.rank_by == "joint" and self.spread:
            raise ConfigError(f"planner.spread = {self.spread:g} moves candidates after their joint value was generated: set it to 0, or "
                              "planner.rank_by to 'future', 'action' or 'both'")
        if self.deadline_ms:
            if self.rank_by not in (*VALUED, "joint"):
                raise ConfigError(f"planner.rank_by = {self.rank_by!r} compares all candidates at once, and with planner.deadline_ms they "
                                  "come one after another: set planner.deadline_ms to 0, or rank by a value")
            if self.depth > 1 or self.early_rejection:
                name = "depth" if self.depth > 1 else "early_rejection"
                raise ConfigError(f"planner.{name} does not go with planner.deadline_ms, which chooses how the time is spent: leave one of "
                                  "the two out")
        if self.depth == 1:
            for name, value in (("branch", self.branch - 1), ("beam", self.beam)):
                if value:
                    raise ConfigError(f"planner.{name} = {getattr(self, name)} acts where a plan looks further than one chunk: set "
                                      "planner.depth to 2 or 3")
            return
        if self.rank_by not in (*VALUED, "joint"):
            raise ConfigError(f"planner.rank_by = {self.rank_by!r} asks no value, so there is nothing to look ahead for: set planner.depth "
                              "to 1")
        if self.early_rejection:
            raise ConfigError(f"planner.early_rejection compares the candidates of one chunk, and planner.depth is {self.depth}: set one "
                              "of the two to false or 1; planner.beam drops plans at any depth")
        if self.depth == 3 and self.beam and self.futures > 1 and self.rank_by != "joint":
            raise ConfigError(f"planner.beam = {self.beam} keeps single plans, and at planner.depth 3 a plan with planner.futures = "
                              f"{self.futures} needs a next chunk in each future: set planner.beam to 0 or planner.futures to 1")
