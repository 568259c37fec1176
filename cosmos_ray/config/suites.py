"""The three suites with released weights: dimensions and evaluation settings of each (method 1.1 to 1.3, 2.7, 5.3, 6.1, 7.1, 8.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class Suite:
    """The setting of a released checkpoint, as its public evaluation sets it. The latent layout follows from the cameras alone."""

    wrist_cameras: tuple[str, ...]  #: what they show, in latent order
    third_cameras: tuple[str, ...]
    wrist_names: tuple[str, ...]  #: the same cameras as the suite's simulator or robot names them
    third_names: tuple[str, ...]
    chunk: int  #: actions per chunk K
    open_loop: int  #: how many of them are executed before the next query
    action_dim: int
    proprio_dim: int
    gamma: float  #: discount per control step
    steps: int  #: network evaluations per chunk
    jpeg: bool  #: frames go through JPEG at quality 95
    rendered: int  #: pixels a side of the simulator's frames
    control_freq: int  #: control steps per second
    horizon: int  #: control steps before an episode times out: the longest of the suite, where its tasks differ
    futures: int  #: imagined futures per candidate
    future_steps: int
    value_samples: int  #: per imagined future
    value_steps: int
    aggregate: str  #: how value samples become one score
    warmup: int  #: learning-rate warm-up in steps
    cycle: int  #: steps of the first learning-rate cycle
    refine_warmup: int
    refine_cycle: int
    image_size: int = 224  #: of the frames that the network sees
    seed: int = 195  #: of the published evaluations; 196 and 197 follow it
    simulated: bool = False  #: our simulator has its cameras; its scenes it has of no suite

    @property
    def cameras(self) -> tuple[str, ...]:
        return self.wrist_cameras + self.third_cameras

    def settings(self) -> dict[str, Any]:
        """``{"section.field": value}`` that the suite decides."""
        decided: dict[str, Any] = {
            "seed": self.seed, "sim.wrist_cameras": self.wrist_names, "sim.third_cameras": self.third_names, "sim.actions": "pose",
            "sim.quality": "full", "sim.image_size": self.rendered, "sim.control_freq": self.control_freq, "sim.horizon": self.horizon,
            "model.image_size": self.image_size, "model.chunk": self.chunk, "model.jpeg": self.jpeg,
            "rollout.execute": self.open_loop, "replay.gamma": self.gamma, "inference.steps": self.steps,
            "learner.warmup": self.warmup, "learner.cycle": self.cycle, "learner.refine_warmup": self.refine_warmup,
            "learner.refine_cycle": self.refine_cycle, "planner.futures": self.futures, "planner.future_steps": self.future_steps,
            "planner.value_samples": self.value_samples, "planner.value_steps": self.value_steps, "planner.aggregate": self.aggregate,
        }
        return decided if self.simulated else decided | {"sim.task": ""}


SUITES = {
    "libero": Suite(
        ("wrist",), ("primary",), ("robot0_eye_in_hand",), ("agentview",), simulated=True,
        chunk=16, open_loop=16, action_dim=7, proprio_dim=9, gamma=0.99, steps=5, jpeg=True, rendered=256, control_freq=20, horizon=520,
        futures=1, future_steps=1, value_samples=1, value_steps=1, aggregate="average",
        warmup=1000, cycle=30_000, refine_warmup=1000, refine_cycle=30_000),
    "robocasa": Suite(
        ("wrist",), ("primary", "secondary"), ("robot0_eye_in_hand",), ("robot0_agentview_left", "robot0_agentview_right"),
        chunk=32, open_loop=16, action_dim=7, proprio_dim=9, gamma=0.99, steps=5, jpeg=True, rendered=224, control_freq=20, horizon=500,
        futures=1, future_steps=1, value_samples=1, value_steps=1, aggregate="average",
        warmup=1000, cycle=30_000, refine_warmup=1000, refine_cycle=30_000),
    "aloha": Suite(
        ("left_wrist", "right_wrist"), ("primary",), ("cam_left_wrist", "cam_right_wrist"), ("cam_high",),
        chunk=50, open_loop=50, action_dim=14, proprio_dim=14, gamma=0.998, steps=10, jpeg=False, rendered=224, control_freq=25,
        horizon=1100, futures=3, future_steps=5, value_samples=5, value_steps=5, aggregate="majority_mean",
        warmup=2000, cycle=20_000, refine_warmup=1500, refine_cycle=15_000),
}


def check_sizes(suite: str, action_dim: int, proprio_dim: int, where: str) -> None:
    """ConfigError when the statistics in ``where`` are of other sizes than ``suite``, the name of one or ""."""
    known = SUITES.get(suite)
    if known and (action_dim, proprio_dim) != (known.action_dim, known.proprio_dim):
        raise ConfigError(f"{where} describes {action_dim} numbers per action and {proprio_dim} of proprioception, suite {suite!r} has "
                          f"{known.action_dim} and {known.proprio_dim}: give that suite's statistics, or another suite (model.suite)")
