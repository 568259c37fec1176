"""What the driver asks of a worker, and what the worker answers.

A ticket is idempotent: its key decides the episode's name in the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cosmos_ray.errors import StoreError, StoreUnavailable
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.replay.format.episode import EpisodeKey, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.seeds import mix_seed


def task_and_state(tasks: Sequence[str], number: int) -> tuple[str, int]:
    """Task, and number of its initial state, of episode ``number`` of a run with these tasks, which take turns."""
    return tasks[number % len(tasks)], number // len(tasks)


def rollout_noise_seed(seed: int) -> int:
    """Noise seed of the rollout that begins in initial state ``seed``."""
    return mix_seed(seed, 11)


def evaluation_noise_seed(seed: int) -> int:
    """Noise seed of the held-out episode that begins in initial state ``seed``: every arm, audit and filmstrip of the state shares it."""
    return mix_seed(seed, 13)


def decision_noise_seed(noise_seed: int, step: int) -> int:
    """Seed of the sampler's noise for the decision at control step ``step`` of the episode with this noise seed."""
    return mix_seed(noise_seed, step)


@dataclass(frozen=True)
class EpisodeTicket:
    """One episode to run with the policy."""

    key: EpisodeKey
    noise_seed: int  #: fixes the sampler's noise of every decision of the episode
    acting: ActingPolicy = ActingPolicy()  #: evaluation and planned rollouts insist on a version
    action_noise: float = 0.0  #: standard deviation of exploration noise on executed actions
    chunk_noise: float = 0.0  #: standard deviation of the offset that half of the chunks are executed with
    horizon: int = 0  #: control steps before the episode times out; 0 takes the environment's own
    frame_stride: int = 0  #: store a frame every so many control steps besides the chunk ends; 0 stores chunk ends only
    arm: str = ""  #: label kept with the episode (evaluation arm)


@dataclass(frozen=True)
class Finished:
    """The end of an episode: committed in the store, unless it :attr:`broke <broken>` its simulator."""

    name: str  #: of the episode in the store
    success: bool
    length: int  #: control steps
    invalid: str
    new: bool  #: False when the store already had it
    seconds: float  #: wall time from reset to commit, in this worker
    policy_version: int
    broken: str = ""  #: why the ticket broke its simulator; then there is no episode to store, and the ticket runs again


@dataclass(frozen=True)
class Waiting:
    """A worker's word, among its answers, that it cannot go on at the moment."""

    on: str  #: what the worker waits for


@dataclass(frozen=True)
class SimulatorDied:
    """A worker's word, among its answers, that the process of its simulators died and another one starts."""

    why: str
    then: str  #: what became of the episodes in it


#: What a worker says after a turn.
Answer = Finished | Waiting | SimulatorDied


def stored_result(store: ReplayStore, name: str) -> Finished | None:
    """The result of an episode that the store holds, or held before its eviction. None when the episode has to run; a damaged file
    goes to quarantine first."""
    if name not in store:
        return None
    if (gone := store.evicted(name)) is not None:
        return Finished(name, gone["success"], gone["length"], gone["invalid"], False, 0.0, gone["policy_version"])
    try:
        episode = store.read(name)
    except StoreUnavailable:
        raise
    except StoreError:
        return None
    return Finished(name, episode.success, episode.length, episode.invalid, False, 0.0, episode.policy_version)


def demonstrations(store: ReplayStore, tasks: Sequence[str], count: int) -> tuple[int, dict[str, int]]:
    """How many demonstrations of ``tasks`` the store holds, and how many each task lacks of its even share of ``count``."""
    held = Counter(s.task for s in store.summaries() if s.episode_class == "demo" and s.task in tasks)
    return held.total(), {task: max(0, len(range(place, count, len(tasks))) - held[task]) for place, task in enumerate(tasks)}


def own_rollouts(store: ReplayStore, run: str, tasks: Collection[str]) -> list[EpisodeSummary]:
    """Summaries of the policy's rollouts of ``tasks`` in the store, without failed demonstrations. ``run`` is the run's identity."""
    return [s for s in store.summaries() if s.of_policy and s.key.run == run and s.task in tasks]
