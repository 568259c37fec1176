"""From replay windows to training batches: how many samples of each type, and from which episodes (method 2.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cosmos_ray.config import LearnerConfig, ReplayConfig
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.training_batch import TrainingBatch
from cosmos_ray.replay.format.episode import EpisodeClass
from cosmos_ray.replay.sampling.sampler import Empty, Picks, Unusable, WindowSampler, draw_from
from cosmos_ray.replay.sampling.windows import Selection

#: The sample types of each value mode.
VALUE_TYPES = {"full": (SampleType.VALUE_FULL,), "future": (SampleType.VALUE_FUTURE,), "action": (SampleType.VALUE_ACTION,),
               "both": (SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION)}


@dataclass(frozen=True)
class Mixture:
    """Shares of a batch. Policy samples come from demonstrations and successful rollouts; all other samples come from rollouts."""

    policy: float
    world: float
    value: float
    value_types: tuple[SampleType, ...]  #: value samples have these types in equal parts
    success_share: float  #: share of the rollout samples from successes
    demos_as_success: bool  #: demonstrations stand in for successes: base training has no rollouts yet (method section 3)
    self_imitation: float = 0.0  #: share of the policy samples from rollouts
    weighted: bool = False  #: policy samples from rollouts include failures, imitate the executed actions and are weighted by advantage
    by_task: bool = False  #: each class of episodes is drawn from all tasks in equal parts, else every window is as likely as any other

    @classmethod
    def base(cls, learner: LearnerConfig, replay: ReplayConfig) -> Mixture:
        """The mixture of training on demonstrations, 50/25/25 by default."""
        policy, world, value = learner.base_mix
        return cls(policy, world, value, VALUE_TYPES[learner.base_value_mode], replay.success_share, True,
                   0.0 if learner.advantage_temperature else learner.self_imitation)

    @classmethod
    def refinement(cls, learner: LearnerConfig, replay: ReplayConfig) -> Mixture:
        """The mixture of refining on rollouts."""
        policy, world, value = learner.refine_mix
        return cls(policy, world, value, VALUE_TYPES[learner.value_mode], replay.success_share, False,
                   learner.self_imitation, learner.advantage_temperature > 0)

    @classmethod
    def for_planning_network(cls, learner: LearnerConfig, replay: ReplayConfig) -> Mixture:
        """The mixture of the planning network."""
        policy, world, value = learner.planning_mix
        return cls(policy, world, value, VALUE_TYPES[learner.value_mode], replay.success_share, False)


def evenly(sampler: WindowSampler, episode_class: EpisodeClass) -> Selection:
    """Windows of a class, of all tasks of the store in equal parts. The share of a task without windows goes to the others."""
    return Selection({episode_class: 1.0}, {task: 1.0 for task in sampler.store.index.tables["task"].values if task})


class BatchPicks(NamedTuple):
    """The windows of a batch and the type of each sample, decided on but not read yet."""

    windows: Picks
    sample_types: np.ndarray  #: (B,) int, a SampleType each


class BatchSource:
    """Draws the batches of a :class:`Mixture` from a :class:`WindowSampler`.

    Counts follow the shares exactly over time: the next batch owes the fraction of a sample that one batch cannot give. Another class
    replaces an empty one: successes and failures replace each other, and demonstrations replace both. Only demonstrations replace
    rollouts that the policy imitates.
    """

    def __init__(self, sampler: WindowSampler, mixture: Mixture, batch_size: int):
        self.sampler, self.mixture, self.batch_size = sampler, mixture, batch_size
        m = mixture
        success: EpisodeClass = "demo" if m.demos_as_success else "success"
        self._cells: list[tuple[EpisodeClass, SampleType, float]] = [("demo", SampleType.POLICY, m.policy * (1 - m.self_imitation))]
        if m.self_imitation:
            own, failed = m.policy * m.self_imitation, 1 - m.success_share if m.weighted else 0.0
            self._cells.append(("success", SampleType.POLICY, own * (1 - failed)))
            if m.weighted:
                self._cells.append(("failure", SampleType.POLICY, own * failed))
        values = [(value_type, m.value / len(m.value_types)) for value_type in m.value_types]
        for sample_type, share in ((SampleType.WORLD_MODEL, m.world), *values):
            self._cells += [(success, sample_type, share * m.success_share), ("failure", sample_type, share * (1 - m.success_share))]
        self._owed = np.zeros(len(self._cells))

    def draw(self) -> TrainingBatch:
        """The next batch of ``batch_size`` samples. StoreError when the store holds no demonstration."""
        return draw_from(self)

    def pick(self) -> BatchPicks:
        """Decide on the next batch's windows and sample types."""
        picks, sample_types = [], []
        for (name, sample_type, _), count in zip(self._cells, self._counts(), strict=True):
            if count:
                picks.append(self.sampler.pick(int(count), self._what(self._filled(name, sample_type))))
                sample_types += [int(sample_type)] * int(count)
        return BatchPicks(Picks(*(np.concatenate(parts) for parts in zip(*picks, strict=True))), np.array(sample_types))

    def build(self, picks: BatchPicks, empty: Empty = np.empty) -> TrainingBatch:
        """Read the picked windows; see :meth:`WindowSampler.build`."""
        windows = self.sampler.build(picks.windows, empty)
        policy = picks.sample_types == SampleType.POLICY
        own = policy & (np.array(windows.sources) != "demo") & self.mixture.weighted
        windows.actions[policy & ~own] = windows.labels[policy & ~own]
        # With the version: an episode that was lost and run again may differ under the same name.
        names = [f"{episode}@{t}v{version}"
                 for episode, t, version in zip(windows.episodes, windows.offsets, windows.policy_versions, strict=True)]
        return TrainingBatch(images=windows.images, future_images=windows.future_images, proprio=windows.proprio,
                             future_proprio=windows.future_proprio, value=windows.value, actions=windows.actions,
                             instructions=windows.instructions, sample_types=picks.sample_types, windows=names, own=own)

    def forget(self, unusable: Unusable) -> None:
        self.sampler.forget(unusable)

    def _counts(self) -> np.ndarray:
        """Whole samples per cell, in sum the batch size. Each sample goes to the cell with the largest debt."""
        shares = np.array([share for _, _, share in self._cells])
        counts = np.zeros(len(shares), int)
        for _ in range(self.batch_size):
            self._owed += shares
            cell = int(self._owed.argmax())
            self._owed[cell] -= 1
            counts[cell] += 1
        return counts

    def _what(self, episode_class: EpisodeClass) -> EpisodeClass | Selection:
        return evenly(self.sampler, episode_class) if self.mixture.by_task else episode_class

    def _filled(self, name: EpisodeClass, sample_type: SampleType) -> EpisodeClass:
        """The class ``name``, or its replacement while it is empty."""
        if name == "demo":
            return "demo"
        counts = self.sampler.counts()
        others = () if sample_type == SampleType.POLICY else ("success", "failure")
        return next((other for other in (name, *others) if counts[other].windows), "demo")

    def snapshot(self) -> dict:
        """The state of the stream alone."""
        return {"owed": self._owed.tolist(), "sampler": self.sampler.snapshot()}

    def restore(self, state: dict) -> None:
        self._owed = np.array(state["owed"])
        self.sampler.restore(state["sampler"])

    def state_dict(self, snapshot: dict | None = None) -> dict:
        """JSON-serialisable state to continue the stream from, now or as of a :meth:`snapshot`."""
        state = snapshot or self.snapshot()
        return {**state, "sampler": self.sampler.state_dict(state["sampler"])}

    def load_state_dict(self, state: dict) -> None:
        owed = np.array(state["owed"])
        self._owed = owed if len(owed) == len(self._cells) else np.zeros(len(self._cells))  # another mixture than when it was saved
        self.sampler.load_state_dict(state["sampler"])
