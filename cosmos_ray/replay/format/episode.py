"""One finished episode as the replay store keeps it, and the key that names it for ever."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import encode_cameras

SOURCES = ("demo", "rollout", "eval")

#: What an episode is to training and upkeep: exactly one of these.
EpisodeClass = Literal["demo", "success", "failure", "evaluation", "invalid"]
CLASSES: tuple[EpisodeClass, ...] = get_args(EpisodeClass)
TRAINED: tuple[EpisodeClass, ...] = ("demo", "success", "failure")  # the classes that training windows are drawn from

#: Entry of :attr:`Episode.info`: true where the state after the last action was not recorded, and row ``T`` repeats row ``T - 1``.
LAST_STATE_REPEATED = "last_state_repeated"


def class_of(source: str, success: bool, invalid: bool) -> EpisodeClass:
    """The class of an episode; no other code decides it.

    An evaluation is one whatever became of it, because its seeds are held out. Training draws from neither evaluations nor
    invalid episodes: those whose simulation broke, and demonstrations that did not succeed. The others are demonstrations, and
    rollouts that succeeded or failed.
    """
    if source == "eval":
        return "evaluation"
    if invalid or (source == "demo" and not success):
        return "invalid"
    if source == "demo":
        return "demo"
    return "success" if success else "failure"


#: :func:`class_of` for many episodes at once: ``CLASS_NUMBERS[number in SOURCES, success, invalid]`` is the number in ``CLASSES``.
CLASS_NUMBERS = np.array([[[CLASSES.index(class_of(source, success, invalid)) for invalid in (False, True)] for success in (False, True)]
                          for source in SOURCES], np.int8)  # fmt: skip


def outcome(success: bool, score: float | None) -> float:
    """``score`` of a graded episode; 1.0 or 0.0 of one that only succeeded or failed (None). StoreError outside of [0, 1]."""
    if score is None:
        return float(success)
    if not 0.0 <= score <= 1.0:
        raise StoreError(f"score {score} must lie in [0, 1], or be None where success was not graded")
    return float(score)


@dataclass(frozen=True)
class EpisodeKey:
    """What makes an episode that episode: committing the same key twice is one commit.

    ``seed`` is the reset seed, ``attempt`` counts repeats of one seed within a run (0 for the first), ``source`` is
    one of :data:`SOURCES`. ``initial_state`` says what the episode was reset to where the seed alone does not, such as an
    index into a benchmark's fixed initial states. StoreError for any other source or a negative number.
    """

    run: str
    task: str
    source: str
    seed: int
    attempt: int = 0
    initial_state: str = ""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise StoreError(f"episode source {self.source!r} is unknown: use one of {', '.join(SOURCES)}")
        if self.seed < 0 or self.attempt < 0:
            raise StoreError(f"episode seed {self.seed} and attempt {self.attempt} must not be negative")
        if not isinstance(self.initial_state, str):
            raise StoreError(f"episode initial state {self.initial_state!r} must be text")

    @property
    def name(self) -> str:
        """File-system-safe name, a function of the key alone, e.g. ``rollout-Lift-00001234-a0-1f0c9a3e``."""
        parts = [self.run, self.task, self.source, int(self.seed), int(self.attempt)]
        # Left out where it is empty: names are as they were before there was one.
        text = json.dumps(parts + [self.initial_state] if self.initial_state else parts)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        task = re.sub(r"[^A-Za-z0-9_]", "_", self.task)[:80]
        return f"{self.source}-{task}-{self.seed:08d}-a{self.attempt}-{digest}"


@dataclass
class Episode:
    """``T`` executed actions and the ``T + 1`` states around them (row 0 is the reset state).

    Arrays are converted to the dtypes below on construction; StoreError names the field whose shape does not fit.
    Frames exist only for the rendered steps: all ``T + 1`` in demos, chunk ends in rollouts.
    """

    key: EpisodeKey
    instruction: str
    cameras: tuple[str, ...]
    success: bool
    episode_return: float
    timed_out: bool
    invalid: str  # "" or why the simulation broke; invalid episodes are kept but never sampled
    policy_version: int  # version that began the episode, -1 for demonstrations
    actions: np.ndarray  # (T, d) float32, executed
    labels: np.ndarray  # (T, d) float32, what a policy should imitate
    rewards: np.ndarray  # (T,) float32
    proprio: np.ndarray  # (T + 1, p) float32
    states: np.ndarray  # (T + 1, S) float64, full restorable simulator state
    step_versions: np.ndarray  # (T,) int64, policy version of each executed action
    predicted_values: np.ndarray  # (T,) float32, nan where no value was predicted
    frames: dict[int, list[bytes]]  # step index 0..T -> one JPEG per camera, in the order of ``cameras``
    info: dict[str, Any] = field(default_factory=dict)  # JSON: fingerprint, arm, planner, horizon, ...
    score: float | None = None  # how far it got, in [0, 1], where that was graded: a failure may have done a part

    def __post_init__(self) -> None:
        self.cameras = tuple(self.cameras)
        outcome(self.success, self.score)
        spoken(self.info, self.instruction)
        steps = len(self.actions)
        if steps == 0:
            raise StoreError(f"episode {self.key.name} has no action: there is nothing to store")
        shapes = {  # rows, dimensions, dtype
            "actions": (steps, 2, np.float32),
            "labels": (steps, 2, np.float32),
            "rewards": (steps, 1, np.float32),
            "proprio": (steps + 1, 2, np.float32),
            "states": (steps + 1, 2, np.float64),
            "step_versions": (steps, 1, np.int64),
            "predicted_values": (steps, 1, np.float32),
        }
        for name, (rows, dimensions, dtype) in shapes.items():
            array = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if array.ndim != dimensions or array.shape[0] != rows or 0 in array.shape:
                raise StoreError(
                    f"episode {self.key.name}: {name} has shape {array.shape}, expected {rows} rows of a "
                    f"{dimensions}-dimensional array ({steps} actions)"
                )
            setattr(self, name, array)
        if self.labels.shape != self.actions.shape:
            raise StoreError(f"episode {self.key.name}: labels and actions differ in shape")
        for step, images in self.frames.items():
            if not 0 <= step <= steps or len(images) != len(self.cameras) or not all(images):
                raise StoreError(
                    f"episode {self.key.name}: frames of step {step} must be one JPEG for each of "
                    f"{len(self.cameras)} cameras at a step in 0..{steps}"
                )

    @property
    def length(self) -> int:
        """Number of executed actions ``T``."""
        return len(self.actions)

    @property
    def instructions(self) -> tuple[str, ...]:
        """Every text of the episode once, in the order of their first steps; see :func:`spoken`."""
        return tuple(dict.fromkeys(text for _, text in spoken(self.info, self.instruction)))

    @property
    def embodiment(self) -> Embodiment:
        """What the policy sees and moves here."""
        return Embodiment(self.cameras, self.actions.shape[1], self.proprio.shape[1], control_rate(self.info),
                          quality=render_quality(self.info))

    @classmethod
    def from_trajectory(
        cls,
        trajectory: Any,
        key: EpisodeKey,
        *,
        policy_version: int,
        step_versions: np.ndarray | list[int] | None = None,
        predicted_values: np.ndarray | list[float] | None = None,
        info: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> Episode:
        """Encode a finished trajectory (any object with the attributes of ``sim.trajectory.Trajectory``).

        ``step_versions`` (T,) defaults to ``policy_version`` throughout, ``predicted_values`` (T,) to nan. Frames are
        encoded as JPEG here, so this costs more than the commit: call it outside of any lock.
        StoreError if the trajectory has no action, belongs to another task or its lists disagree in length, or if
        ``score`` is not in [0, 1].
        """
        steps = len(trajectory.actions)
        if trajectory.task != key.task:
            raise StoreError(f"a trajectory of task {trajectory.task!r} does not fit a key of task {key.task!r}")
        return cls(
            key=key,
            instruction=trajectory.instruction,
            cameras=tuple(trajectory.cameras),
            success=bool(trajectory.success),
            episode_return=float(np.sum(trajectory.rewards, dtype=np.float64)),
            timed_out=bool(trajectory.timed_out),
            invalid=str(trajectory.invalid),
            policy_version=int(policy_version),
            actions=trajectory.actions,
            labels=trajectory.labels,
            rewards=trajectory.rewards,
            proprio=trajectory.proprio,
            states=trajectory.states,
            step_versions=np.full(steps, policy_version) if step_versions is None else np.asarray(step_versions),
            predicted_values=np.full(steps, np.nan) if predicted_values is None else np.asarray(predicted_values),
            frames={int(step): encode_cameras(images) for step, images in sorted(trajectory.frames.items())},
            info=dict(info or {}),
            score=score,
        )


@dataclass(frozen=True)
class EpisodeSummary:
    """What is known of a stored episode without touching its data pages."""

    key: EpisodeKey
    name: str
    path: str
    success: bool
    score: float  # in [0, 1]: as graded, or 1.0 for a success and 0.0 for a failure
    episode_return: float
    length: int  # executed actions T
    timed_out: bool
    invalid: str
    policy_version: int
    frame_ranges: tuple[tuple[int, int, int], ...]  # (start, stop, stride) of the steps in 0..T that have frames, ascending
    created: float = 0.0  # Unix seconds of the commit; 0 where the file does not say it
    size: int = 0  # bytes in the store

    @property
    def source(self) -> str:
        return self.key.source

    @property
    def task(self) -> str:
        return self.key.task

    @property
    def frame_steps(self) -> np.ndarray:
        """(n,) int32, ascending: the steps 0..T that have frames."""
        return expand_ranges(self.frame_ranges)

    @property
    def episode_class(self) -> EpisodeClass:
        """What the episode is to training and upkeep; see :func:`class_of`."""
        return class_of(self.source, self.success, bool(self.invalid))

    @property
    def of_policy(self) -> bool:
        """Whether a policy acted to train from it: neither an evaluation nor an attempt of the scripted expert."""
        return self.source == "rollout" and self.policy_version >= 0


def spoken(info: dict[str, Any], instruction: str) -> list[tuple[int, str]]:
    """(first step, text) of an episode's instructions, ascending from step 0.

    An episode has one instruction, unless ``info["instructions"]`` has such pairs: then ``instruction`` is the first one's text.
    StoreError if these are no such pairs.
    """
    pairs = info.get("instructions") or [[0, instruction]]
    steps = [pair[0] for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 and type(pair[0]) is int
             and isinstance(pair[1], str)] if isinstance(pairs, list | tuple) else []  # fmt: skip
    if len(steps) != len(pairs) or steps != sorted(set(steps)) or steps[0] != 0:
        raise StoreError(f"instructions {str(pairs)[:80]} are not (first step, text) from step 0 on")
    return [(step, text) for step, text in pairs]


def control_rate(info: dict[str, Any]) -> float:
    """Control steps per second of an episode, 0.0 where it does not say.

    They are ``info["control_freq"]``; episodes of earlier versions have them in the simulator's fingerprint or, imported, as ``fps``.
    """
    fingerprint = info.get("fingerprint")
    said = info.get("control_freq") or (fingerprint.get("control_freq") if isinstance(fingerprint, dict) else None) or info.get("fps")
    try:
        rate = float(said or 0.0)
    except (TypeError, ValueError):
        return 0.0
    return rate if 0.0 < rate < float("inf") else 0.0


def render_quality(info: dict[str, Any]) -> str:
    """"fast" or "full": how the simulator rendered the frames of an episode, as its fingerprint says; "" where there is none."""
    fingerprint = info.get("fingerprint")
    rendered = fingerprint.get("render") if isinstance(fingerprint, dict) else None
    return "" if not isinstance(rendered, str) else "full" if rendered.endswith(" full") else "fast"


def expand_ranges(ranges: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """The steps of ``(start, stop, stride)`` ranges, (n,) int32."""
    return np.concatenate([np.arange(*r, dtype=np.int32) for r in ranges]) if ranges else np.zeros(0, np.int32)
