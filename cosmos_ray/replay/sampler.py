"""Draws training windows (s_t, K actions, s_{t+K}, value) from a replay store."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.cache import LeastRecentlyUsed
from cosmos_ray.replay.codec import decode_jpeg
from cosmos_ray.replay.episode import EpisodeSummary
from cosmos_ray.replay.returns import value_targets
from cosmos_ray.replay.schema import DamagedEpisode, EpisodeView
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.strata import Stratum, window_offsets

logger = logging.getLogger(__name__)

STRATA = ("demo", "success", "failure")


@dataclass(frozen=True)
class WindowBatch:
    """``B`` windows; row ``i`` is the chunk of ``K`` actions taken from state ``t = offsets[i]`` of ``episodes[i]``.

    The future state is ``min(t + K, T)``. Where the episode ends inside the chunk, its last action is repeated.
    """

    images: np.ndarray  # (B, C, H, W, 3) uint8 RGB at t, cameras in the episode's order
    future_images: np.ndarray  # (B, C, H, W, 3) uint8 RGB at the future state
    proprio: np.ndarray  # (B, p) float32 at t
    future_proprio: np.ndarray  # (B, p) float32 at the future state
    actions: np.ndarray  # (B, K, d) float32, executed
    labels: np.ndarray  # (B, K, d) float32, what a policy should imitate
    value: np.ndarray  # (B,) float32 in [-1, 1], target at the future state
    value_now: np.ndarray  # (B,) float32 in [-1, 1], target at t
    instructions: list[str]
    sources: list[str]
    episodes: list[str]  # names, see EpisodeKey.name
    offsets: np.ndarray  # (B,) int64, t
    policy_versions: np.ndarray  # (B,) int64, policy that took the action at t, -1 for demonstrations

    def __len__(self) -> int:
        return len(self.offsets)


class Count(NamedTuple):
    """Size of a stratum."""

    episodes: int
    windows: int


class _Unusable(Exception):
    """An episode that was indexed cannot be read any more."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class WindowSampler:
    """Uniform draws over the windows of a stratum, so episodes weigh as many windows as they have.

    A window starts at every ``t < T`` for which the frames of ``t`` and of ``min(t + chunk, T)`` are stored: every step
    of a demonstration, the chunk ends of a rollout. Strata are ``demo``, ``success`` and ``failure`` (rollouts), and
    ``rollout``, which takes each window from the successes with probability ``success_share`` and from the failures
    otherwise; while one of the two is empty it takes all from the other and counts them in :attr:`fallbacks`.
    Invalid and evaluation episodes are never drawn (``EpisodeSummary.stratum``).

    Draws depend on ``seed``, on the calls before and on the set of known episodes, not on the order in which these were
    committed. ``frame_cache_bytes`` bounds the decoded frames kept in memory. Values discount with ``gamma`` per
    control step. Episodes that turn out to be damaged go to quarantine and the draw is repeated without them.
    """

    def __init__(
        self,
        store: ReplayStore,
        *,
        chunk: int,
        gamma: float,
        seed: int,
        success_share: float = 0.5,
        frame_cache_bytes: int = 256 << 20,
    ) -> None:
        if chunk < 1 or not 0.0 <= success_share <= 1.0:
            raise StoreError(f"chunk {chunk} must be at least 1 and success_share {success_share} within [0, 1]")
        self.store = store
        self.chunk = chunk
        self.gamma = gamma
        self.success_share = success_share
        self.excluded = 0  # known episodes that belong to no stratum
        self.fallbacks = {"success": 0, "failure": 0}  # rollout windows that had to come from this stratum
        self._rng = np.random.default_rng(seed)
        self._strata = {name: Stratum() for name in STRATA}
        self._cursor = 0  # how far the store's episodes have been taken in
        self._frames: LeastRecentlyUsed[tuple[str, int], np.ndarray] = LeastRecentlyUsed(frame_cache_bytes)
        self._layout: tuple | None = None  # cameras, frame, action and proprio shape of every window
        self.refresh()

    def refresh(self) -> int:
        """Take in episodes committed since the last call, by any process; returns how many."""
        self.store.refresh()
        fresh, self._cursor = self.store.since(self._cursor)
        barren = 0
        for summary in fresh:
            if not summary.stratum:
                self.excluded += 1
                continue
            offsets = window_offsets(summary.frame_steps, summary.length, self.chunk)
            self._strata[summary.stratum].add(summary, offsets)
            barren += not len(offsets)
        if barren:
            logger.warning("%d of %d new episodes have no two frames %d steps apart", barren, len(fresh), self.chunk)
        return len(fresh)

    def counts(self) -> dict[str, Count]:
        """Episodes and windows of ``demo``, ``success``, ``failure`` and ``rollout`` (the sum of the two before)."""
        counts = {name: Count(len(stratum.names), stratum.windows) for name, stratum in self._strata.items()}
        success, failure = counts["success"], counts["failure"]
        counts["rollout"] = Count(success.episodes + failure.episodes, success.windows + failure.windows)
        return counts

    def draw(self, n: int, stratum: str) -> WindowBatch:
        """``n`` windows of ``stratum``, with replacement; StoreError if it has none or the name is unknown."""
        start = self._rng.bit_generator.state
        while True:
            picks, fallback = self._pick(n, stratum)
            try:
                batch = self._assemble(picks)
            except _Unusable as unusable:
                # From the same random state: as if the episode had never been there.
                self._rng.bit_generator.state = start
                for known in self._strata.values():
                    known.remove(unusable.name)
                continue
            if fallback:
                self.fallbacks[fallback] += n
            return batch

    def state_dict(self) -> dict[str, Any]:
        """Plain values from which a sampler over the same episodes continues with the same draws."""
        return {
            "rng": self._rng.bit_generator.state,
            "fallbacks": dict(self.fallbacks),
            "episodes": self._digest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; with other episodes the draws differ, which is logged."""
        self._rng.bit_generator.state = state["rng"]
        self.fallbacks = dict(state["fallbacks"])
        if state["episodes"] != self._digest():
            logger.info("the store holds other episodes than when the sampler was saved: draws will differ")

    def _pick(self, n: int, stratum: str) -> tuple[list[tuple[EpisodeSummary, int]], str]:
        """``n`` windows, and the stratum that had to replace the other one, or ""."""
        fallback = ""
        if stratum == "rollout":
            success = self._rng.random(n) < self.success_share
            windows = {name: self._strata[name].windows for name in ("success", "failure")}
            if not windows["success"] or not windows["failure"]:
                fallback = "success" if windows["success"] else "failure"
                success[:] = fallback == "success"
            sources = [self._strata["success" if flag else "failure"] for flag in success]
        elif stratum in self._strata:
            sources = [self._strata[stratum]] * n
        else:
            raise StoreError(f"stratum {stratum!r} is unknown: use one of {', '.join((*STRATA, 'rollout'))}")
        totals = np.array([source.windows for source in sources], dtype=np.int64)
        if not totals.all():
            raise StoreError(
                f"stratum {stratum!r} of {self.store.root} has no window of {self.chunk} steps to draw "
                f"({self.counts()[stratum].episodes} episodes): collect episodes and refresh first"
            )
        indices = self._rng.integers(0, totals)
        return [source.window(int(index)) for source, index in zip(sources, indices, strict=True)], fallback

    def _assemble(self, picks: list[tuple[EpisodeSummary, int]]) -> WindowBatch:
        """Read and stack the windows, one visit per episode."""
        rows_of: dict[str, list[int]] = {}
        for row, (summary, _) in enumerate(picks):
            rows_of.setdefault(summary.name, []).append(row)
        offsets = np.array([offset for _, offset in picks], dtype=np.int64)
        arrays: dict[str, np.ndarray] = {}
        instructions = [""] * len(picks)
        for name, members in rows_of.items():
            rows = np.array(members)
            try:
                view = self.store.view(name)
                parts = self._windows(view, picks[members[0]][0], offsets[rows])
            except FileNotFoundError as error:
                logger.warning("episode %s is gone from the store, dropping it", name)
                raise _Unusable(name) from error
            except DamagedEpisode as error:
                self.store.discard(name, str(error))
                raise _Unusable(name) from error
            for field, values in parts.items():
                if field not in arrays:
                    arrays[field] = np.empty((len(picks), *values.shape[1:]), values.dtype)
                arrays[field][rows] = values
            for row in members:
                instructions[row] = view.instruction
        return WindowBatch(
            **arrays,
            instructions=instructions,
            sources=[summary.source for summary, _ in picks],
            episodes=[summary.name for summary, _ in picks],
            offsets=offsets,
        )

    def _windows(self, view: EpisodeView, summary: EpisodeSummary, now: np.ndarray) -> dict[str, np.ndarray]:
        """The array fields of the windows at offsets ``now`` of one episode."""
        future = np.minimum(now + self.chunk, view.length)
        steps = np.minimum(now[:, None] + np.arange(self.chunk), view.length - 1)
        proprio = view.column("proprio")
        value = value_targets(view.length, summary.score, self.gamma)
        parts = {
            "images": np.stack([self._frame(view, summary.name, int(step)) for step in now]),
            "future_images": np.stack([self._frame(view, summary.name, int(step)) for step in future]),
            "proprio": proprio[now],
            "future_proprio": proprio[future],
            "actions": view.column("action")[steps],
            "labels": view.column("label")[steps],
            "value": value[future],
            "value_now": value[now],
            "policy_versions": view.column("policy_version")[now],
        }
        layout = (view.cameras, *(parts[field].shape[1:] for field in ("images", "actions", "proprio")))
        self._layout = self._layout or layout
        if layout != self._layout:
            raise StoreError(
                f"episode {summary.name} has cameras, frames, actions and proprio of {layout}, other episodes "
                f"{self._layout}: keep one robot and image size to a store"
            )
        return parts

    def _frame(self, view: EpisodeView, name: str, step: int) -> np.ndarray:
        """Decoded frames of one step, ``(C, H, W, 3)`` uint8, from the cache if they are there."""
        frame = self._frames.get((name, step))
        if frame is None:
            images = []
            for camera in view.cameras:
                offsets, data = view.frame_column(camera)
                try:
                    images.append(decode_jpeg(data[offsets[step] : offsets[step + 1]]))
                except StoreError as error:
                    raise DamagedEpisode(f"{view.path}: frame of {camera} at step {step}: {error}") from error
            if any(image.shape != images[0].shape for image in images):
                raise DamagedEpisode(f"{view.path}: the cameras differ in image size at step {step}")
            frame = np.stack(images)
            self._frames.put((name, step), frame, frame.nbytes)
        return frame

    def _digest(self) -> str:
        """Hash of the names of every episode that can be drawn."""
        text = "\n".join(name for stratum in self._strata.values() for name in stratum.names)
        return hashlib.sha256(text.encode()).hexdigest()
