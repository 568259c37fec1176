"""What a worker is asked to do, and what it answers. Tickets are idempotent: the key decides the episode's name in the store."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_ray.config import PlannerConfig
from cosmos_ray.errors import ConfigError, StoreError, StoreUnavailable
from cosmos_ray.replay.format.episode import EpisodeKey, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore

SPAN = 1_000_000  #: initial-state seeds per purpose and run seed
PURPOSES = {"demo": 0, "rollout": 1, "eval": 2}


def state_seed(purpose: str, run_seed: int, index: int) -> int:
    """Seed of the initial state. Demonstrations, rollouts and evaluation never share one, so evaluation is held out by construction."""
    if not 0 <= index < SPAN:
        raise ConfigError(f"episode index {index} is out of range: a run has at most {SPAN} {purpose} episodes")
    return (run_seed * len(PURPOSES) + PURPOSES[purpose]) * SPAN + index


@dataclass(frozen=True)
class EpisodeTicket:
    """One episode to run with the policy."""

    key: EpisodeKey
    noise_seed: int  #: fixes the sampler's noise of every decision of the episode
    planner: PlannerConfig | None = None
    version: int | None = None  #: insist on this policy version (evaluation, planned rollouts)
    judge: str = ""  #: checkpoint of the network that has to judge candidates, where it is not the policy (the same)
    action_noise: float = 0.0  #: standard deviation of exploration noise on executed actions
    chunk_noise: float = 0.0  #: standard deviation of the offset that half of the chunks are executed with
    horizon: int = 0  #: control steps before it times out; 0 takes the environment's own
    frame_stride: int = 0  #: also store frames every this many steps; 0 keeps chunk ends only
    arm: str = ""  #: label kept with the episode (evaluation arm)


@dataclass(frozen=True)
class Finished:
    """An episode that is committed in the store."""

    name: str  #: of the episode in the store
    success: bool
    length: int  #: control steps
    invalid: str
    new: bool  #: False when the store already had it
    seconds: float  #: wall time from reset to commit, in this worker
    policy_version: int


def stored_result(store: ReplayStore, name: str) -> Finished | None:
    """The result of an episode that the store already holds or held before it was evicted, None when it has to run (a damaged
    one goes to quarantine)."""
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


def own_rollouts(store: ReplayStore, run: str, task: str) -> list[EpisodeSummary]:
    """Summaries of a run's policy rollouts in the store, failed demonstrations aside."""
    return [s for s in store.summaries() if s.source == "rollout" and s.policy_version >= 0 and s.key.run == run and s.task == task]
