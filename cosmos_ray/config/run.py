"""All settings of a run, and the checks of settings of two sections."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from cosmos_ray.config.acting import VALUED, InferenceConfig, PlannerConfig, RolloutConfig
from cosmos_ray.config.learner import LearnerConfig
from cosmos_ray.config.model import ModelConfig
from cosmos_ray.config.option import check_ranges, filled, option
from cosmos_ray.config.replay import ReplayConfig
from cosmos_ray.config.sim import SimConfig
from cosmos_ray.config.suites import SUITES
from cosmos_ray.errors import ConfigError
from cosmos_ray.uri import uri_problem


@dataclass(frozen=True)
class RunConfig:
    """One run: where it lives, how much it does, and the settings of every part.

    Every value is the one that acts: what was not given has the value of what it follows.
    """

    name: str = option("demo", "name of the run, a folder under --root")
    root: str = option("runs", "folder that holds runs, or an s3:// or gs:// URI")
    seed: int = option(0, "seed of everything random in the run", low=0, high=10**6)
    init: str = option("", "weights that `pretrain` starts from; a checkpoint of ours or any format that `import` reads; empty = random "
                       "weights")
    demos: int = option(120, "demonstrations in the store after `collect`", low=1, high=500_000)
    pretrain_steps: int = option(600, "learner steps of `pretrain`", low=1)
    rollouts: int = option(80, "rollout episodes in the store after `rollout`", low=0, high=500_000)
    rounds: int = option(1, "rounds of `refine`; each round after the first collects as many rollouts with the newest policy and trains "
                         "as many steps from it", low=1, high=1000)
    keep_rounds: str = option("all", "rounds to keep, all, last:N or best:N; the best by success in `evaluate --round all`. The "
                              "newest round always stays, the one that it began from too, and with best:N those that were not evaluated",
                              rare=True)
    refine_steps: int = option(600, "learner steps of `refine`, each round", low=1)
    planning_steps: int = option(0, "steps to train a separate planning network, 0 = none; each round trains it for so many steps, the "
                                 "first round from the base policy. Without it the refined network plans. The network's world model and "
                                 "value rank candidates, and its value weighs rollouts for learner.advantage_temperature", low=0)
    refine_rollouts: int = option(60, "rollout episodes collected during `refine`, each round", low=0, high=500_000)
    publish_every: int = option(50, "learner steps between weight pushes in `refine`", low=1)
    eval_episodes: int = option(50, "held-out initial states per evaluated arm", low=1, high=500_000)
    repeat: int = option(0, "stored episodes per arm that `evaluate` repeats; it compares them step by step", low=0)
    plan_seed: int = option(0, "number of the held-out initial state of `plan`", low=0)
    address: str = option("", "Ray cluster to join, host:port or auto; empty = $RAY_ADDRESS if set, else a local Ray", rare=True)
    wandb: Literal["off", "offline", "online"] = option("off", "Weights & Biases mode: 'off', 'offline', 'online'", rare=True)
    sim: SimConfig = field(default_factory=SimConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)

    def __post_init__(self):
        rollout = filled(self.rollout, {"execute": self.model.chunk, "horizon": self.sim.horizon})
        object.__setattr__(self, "rollout", rollout)
        object.__setattr__(self, "learner", filled(self.learner, {"planning_world_weight": self.model.world_weight}))

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of two sections that do not go together."""
        rounds_to_keep(self.keep_rounds)
        learner, planner = self.learner, self.planner
        if planner.rank_by in VALUED and learner.value_mode not in (planner.rank_by, "both"):  # policy samples train the joint value
            raise ConfigError(f"planner.rank_by = {planner.rank_by!r} ranks by what learner.value_mode = {learner.value_mode!r} does not "
                              "train: set learner.value_mode to it or to 'both'")
        if self.repeat and planner.deadline_ms:
            raise ConfigError(f"repeat = {self.repeat} compares episodes bit for bit, and with planner.deadline_ms choices depend on the "
                              "clock: set one of the two to 0")
        if learner.advantage_temperature and not self.planning_steps:
            raise ConfigError("learner.advantage_temperature weighs by the value of the planning network: set planning_steps, as many as "
                              "refine_steps, or learner.advantage_temperature to 0")
        if not self.rollout.horizon and not self.sim.suite:
            raise ConfigError("rollout.horizon = 0 is out of range: it must be at least 1")
        own = [*(SimConfig(task=name).horizon for name in self.sim.names or ("",)),
               *(suite.horizon for name, suite in SUITES.items() if name == self.model.suite)]
        if 0 < self.rollout.horizon < self.sim.horizon and self.sim.horizon not in own:  # a horizon that was asked for
            raise ConfigError(f"rollout.horizon = {self.rollout.horizon} is shorter than sim.horizon = {self.sim.horizon}: rollouts would "
                              f"never see the end of an episode; set it to {self.sim.horizon} or more")
        if self.rollout.execute > self.model.chunk:
            raise ConfigError(f"rollout.execute = {self.rollout.execute} is longer than the chunk, model.chunk = {self.model.chunk}")
        if problem := uri_problem(self.root):
            raise ConfigError(f"root: {problem}")
        if not self.name or any(c in self.name for c in "/\\\0") or self.name in (".", ".."):
            raise ConfigError(f"name = {self.name!r} is not a folder name: use letters, digits, '-' and '_'")


def rounds_to_keep(text: str) -> tuple[str, int]:
    """What ``keep_rounds`` says: ("all", 0), or "last" or "best" and how many. :class:`ConfigError` for another text."""
    found = re.fullmatch(r"(all)|(last|best):([1-9]\d{0,3})", text)
    if not found:
        raise ConfigError(f"keep_rounds = {text!r} is none of all, last:N and best:N, such as last:3")
    return found[1] or found[2], int(found[3] or 0)


def check_plain(name: str) -> None:
    """Raise :class:`ConfigError` for the name of a new run that files, shells and links do not all take as it is."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,99}", name):
        raise ConfigError(f"name = {name!r} is no plain name: use letters, digits, '-', '_' and '.', at most 100, not a '-' or '.' first")


def check(config: RunConfig) -> None:
    """Raise :class:`ConfigError` for the first setting that is out of its range or choices, then for settings that do not go together."""
    check_ranges(config)
    for part in (config.learner, config.inference, config.rollout, config.planner, config.sim, config.model, config.replay, config):
        part.check()
