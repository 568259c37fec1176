"""Draws training windows (s_t, K actions, s_{t+K}, value) from a replay store."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format.codec import decode_into, decode_jpeg
from cosmos_ray.replay.format.episode import SOURCES, TRAINED, EpisodeClass
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.frames import HotFrames
from cosmos_ray.replay.sampling.windows import Cell, Selection, Windows
from cosmos_ray.replay.store import ReplayStore

logger = logging.getLogger(__name__)

#: Makes the frames of steps that were not rendered: of an episode and steps, one JPEG per camera for each step.
Render = Callable[[EpisodeView, list[int]], dict[int, list[bytes]]]
#: Memory for a batch's array of this shape and dtype.
Empty = Callable[[tuple[int, ...], Any], np.ndarray]


@dataclass(frozen=True)
class WindowBatch:
    """``B`` windows; row ``i`` is the chunk of ``K`` actions taken from state ``t = offsets[i]`` of ``episodes[i]``.

    The future state is ``min(t + K, T)``. Where the episode ends inside the chunk, its last action is repeated. Where the state after
    the last action was not recorded, state ``T`` is that before it, and both have the value of the end.
    """

    images: np.ndarray  # (B, C, H, W, 3) uint8 RGB at t, cameras in the episode's order
    future_images: np.ndarray  # (B, C, H, W, 3) uint8 RGB at the future state
    proprio: np.ndarray  # (B, p) float32 at t
    future_proprio: np.ndarray  # (B, p) float32 at the future state
    actions: np.ndarray  # (B, K, d) float32, executed
    labels: np.ndarray  # (B, K, d) float32, what a policy should imitate
    value: np.ndarray  # (B,) float32 in [-1, 1], target at the future state
    instructions: list[str]  # at t
    sources: list[str]
    episodes: list[str]  # names, see EpisodeKey.name
    offsets: np.ndarray  # (B,) int64, t
    policy_versions: np.ndarray  # (B,) int64, policy that took the action at t, -1 for demonstrations

    def __len__(self) -> int:
        return len(self.offsets)


class Count(NamedTuple):
    """Size of a class of episodes."""

    episodes: int
    windows: int


class Picks(NamedTuple):
    """Windows that were drawn but not read yet."""

    rows: np.ndarray  # (B,) int64, of the index
    offsets: np.ndarray  # (B,) int64


class Layout(NamedTuple):
    """What all windows of a store have in common."""

    cameras: tuple[str, ...]
    frame: tuple[int, ...]  # (C, H, W, 3)
    action: int  # numbers
    proprio: int  # numbers


class Unusable(Exception):
    """An indexed episode cannot be read: forget it and draw again."""

    def __init__(self, name: str, damage: str = "") -> None:
        super().__init__(name)
        self.name, self.damage = name, damage


class WindowSampler:
    """Draws over the windows of a :class:`Selection`; an episode weighs as many windows as it has.

    A window starts at every ``t < T`` for which the frames of ``t`` and of ``min(t + chunk, T)`` are stored: every step
    of a demonstration, the chunk ends of a rollout. With ``render``, which makes missing frames, it starts at every step.
    What to draw is a selection or a word: ``demo``, ``success`` and ``failure`` (rollouts); ``rollout``, which takes each
    window from the successes with probability ``success_share`` and from the failures otherwise, and while one of the two is
    empty takes all from the other and counts them in :attr:`fallbacks`; ``all``, where every window is as likely as any other.
    Invalid and evaluation episodes are never drawn (``EpisodeSummary.episode_class``).

    Draws depend on ``seed``, on the calls before and on the set of known episodes, not on the order in which these were
    committed (with a ``half_life``, on that too). ``frame_cache_bytes`` bounds the decoded frames kept in memory, those of the
    newest episodes. Values discount with ``gamma`` per control step. Episodes that turn out to be damaged go to quarantine and
    the draw is repeated without them.
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
        render: Render | None = None,
    ) -> None:
        if chunk < 1 or not 0.0 <= success_share <= 1.0 or not 0.0 < gamma <= 1.0:
            raise StoreError(f"chunk {chunk} must be at least 1, success_share {success_share} within [0, 1] and gamma {gamma} in (0, 1]")
        self.store, self.chunk, self.gamma, self.render = store, chunk, gamma, render
        self.fallbacks = {"success": 0, "failure": 0}  # rollout windows that had to come from this class
        self.hot = HotFrames(frame_cache_bytes)
        self._words: dict[str, Selection] = {name: Selection({name: 1.0}) for name in TRAINED}
        self._words["rollout"] = Selection({"success": success_share, "failure": 1.0 - success_share})
        self._words["all"] = Selection()
        self._rng = np.random.default_rng(seed)
        self._windows = Windows(store.index, chunk, everywhere=render is not None)
        self._layout: Layout | None = None  # of every window, known from the first one
        self._layout_lock = threading.Lock()
        self.refresh()

    def refresh(self) -> int:
        """Take in episodes committed since the last call, by any process, and drop those that are gone; returns how many are new."""
        self.store.update()
        fresh, barren = self._windows.update()
        if barren:
            logger.warning("%d of %d new episodes have no two frames %d steps apart", barren, fresh, self.chunk)
        return fresh

    @property
    def excluded(self) -> int:
        """Known episodes of a class that is not trained on."""
        return self._windows.excluded

    def counts(self) -> dict[str, Count]:
        """Episodes and windows of ``demo``, ``success``, ``failure`` and ``rollout`` (the sum of the two before)."""
        counts: dict[str, Count] = {name: Count(*self._windows.count(name)) for name in TRAINED}
        success, failure = counts["success"], counts["failure"]
        counts["rollout"] = Count(success.episodes + failure.episodes, success.windows + failure.windows)
        return counts

    def draw(self, n: int, what: str | Selection = "all") -> WindowBatch:
        """``n`` windows, with replacement; StoreError if there are none or the word is unknown."""
        return draw_from(WindowStream(self, n, what))

    # ---------------------------------------------------------------- the two halves of a draw

    def pick(self, n: int, what: str | Selection = "all") -> Picks:
        """Decide on ``n`` windows: the random part, without reading anything."""
        if isinstance(what, str) and what not in self._words:
            raise StoreError(f"episode class {what!r} is unknown: use one of {', '.join(self._words)}, or a Selection")
        if n < 1:
            raise StoreError(f"{n} windows cannot be drawn: at least one")
        selection = self._words[what] if isinstance(what, str) else what
        cells, shares = self._cells(selection)
        wanted = self._rng.random(n), self._rng.random(n), self._rng.random(n)  # cell, episode, window
        full = np.array([bool(len(cell.rows)) for cell in cells])
        if not (full & (shares > 0)).any():
            if what != "rollout" or not full.any():
                asked = f"class {what!r}" if isinstance(what, str) else f"{what}"
                raise StoreError(
                    f"{asked} of {self.store.root} has no window of {self.chunk} steps to draw "
                    f"({self._episodes(what)} episodes): collect episodes and refresh first"
                )
            shares = full.astype(np.float64)
        if what == "rollout" and not full.all():
            self.fallbacks[cells[int(full.argmax())].episode_class or ""] += n
        ends = np.cumsum(np.where(full, shares, 0.0))
        of_cell = _locate(ends, wanted[0])
        rows, offsets = np.empty(n, np.int64), np.empty(n, np.int64)
        for number in np.unique(of_cell):
            cell, mine = cells[number], np.flatnonzero(of_cell == number)
            rows[mine] = cell.rows[_locate(cell.ends, wanted[1][mine])]
        for i, row in enumerate(rows):
            starts = self._windows.offsets(row)
            offsets[i] = starts[int(wanted[2][i] * len(starts))]
        return Picks(rows, offsets)

    def build(self, picks: Picks, empty: Empty = np.empty) -> WindowBatch:
        """Read and decode the windows into memory from ``empty``. Any thread may call it. Unusable if one cannot be read."""
        index, n = self.store.index, len(picks.rows)
        names = [index.names[row] for row in picks.rows]
        lengths, scores = index["length"][picks.rows], index["score"][picks.rows]
        future = np.minimum(picks.offsets + self.chunk, lengths)
        layout = self._layout or self._find_layout(names[0], int(picks.offsets[0]))
        out = {
            "images": empty((n, *layout.frame), np.uint8),
            "future_images": empty((n, *layout.frame), np.uint8),
            "proprio": empty((n, layout.proprio), np.float32),
            "future_proprio": empty((n, layout.proprio), np.float32),
            "actions": empty((n, self.chunk, layout.action), np.float32),
            "labels": empty((n, self.chunk, layout.action), np.float32),
            "policy_versions": np.empty(n, np.int64),
        }
        instructions, ends = [], np.empty(n, np.int64)
        for i, name in enumerate(names):
            try:
                view = self.store.view(name)
                self._fill(out, i, view, int(picks.offsets[i]), int(future[i]))
            except FileNotFoundError as error:
                raise Unusable(name) from error
            except DamagedEpisode as error:
                raise Unusable(name, str(error)) from error
            except NewerSchema as error:
                raise Unusable(name) from error
            instructions.append(view.instruction_at(int(picks.offsets[i])))
            ends[i] = view.last_seen
        steps_to_end = np.maximum(ends - future, 0).astype(np.float64)
        value = (2.0 * self.gamma**steps_to_end * scores - 1.0).astype(np.float32)  # as sampling.returns
        sources = [SOURCES[number] for number in index["source"][picks.rows]]
        return WindowBatch(**out, value=value, instructions=instructions, sources=sources, episodes=names, offsets=picks.offsets)

    def forget(self, unusable: Unusable) -> None:
        """Drop an episode that cannot be read; a damaged one goes to quarantine."""
        if unusable.damage:
            self.store.discard(unusable.name, unusable.damage)
        else:
            logger.warning("episode %s is gone from the store or of a newer schema, dropping it", unusable.name)
            self.store.index.remove(unusable.name)
        self.hot.drop(unusable.name)
        self._windows.update()

    def snapshot(self) -> dict[str, Any]:
        """The state of the draws alone."""
        return {"rng": self._rng.bit_generator.state, "fallbacks": dict(self.fallbacks)}

    def restore(self, state: dict[str, Any]) -> None:
        """Draw as from :meth:`snapshot` on."""
        self._rng.bit_generator.state = state["rng"]
        self.fallbacks = dict(state["fallbacks"])

    # ---------------------------------------------------------------- resume

    def state_dict(self, snapshot: dict[str, Any] | None = None) -> dict[str, Any]:
        """Plain values from which a sampler over the same episodes continues with the same draws, from now or a snapshot on."""
        return {**(snapshot or self.snapshot()), "episodes": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken; with other episodes the draws differ, which is logged."""
        self.restore(state)
        if state["episodes"] != self._digest():
            logger.info("the store holds other episodes than when the sampler was saved: draws will differ")

    def _digest(self) -> str:
        """Hash of the names of every episode that can be drawn."""
        names = self.store.index.names
        return hashlib.sha256("\n".join(names[row] for row in self._windows.names()).encode()).hexdigest()

    # ---------------------------------------------------------------- inside

    def _cells(self, selection: Selection) -> tuple[list[Cell], np.ndarray]:
        """Where a selection draws from, and the share of each."""
        classes: list[EpisodeClass | None] = list(selection.classes or [None])
        tasks: list[str | None] = list(selection.tasks or [None])
        cells = [self._windows.cell(name, task, selection) for name in classes for task in tasks]
        weights = [np.array(list(shares.values())) if shares else np.ones(1) for shares in (selection.classes, selection.tasks)]
        of_class, of_task = (shares / shares.max() for shares in weights)
        return cells, np.outer(of_class, of_task).reshape(-1)  # of shares of at most one: the products stay finite

    def _episodes(self, what: str | Selection) -> int:
        """How many episodes there are where a draw found no window, for the message."""
        counts = self.counts()
        if isinstance(what, str) and what in counts:
            return counts[what].episodes
        return counts["demo"].episodes + counts["rollout"].episodes

    def _find_layout(self, name: str, step: int) -> Layout:
        """Cameras, frame shape and vector sizes, from the first window ever read."""
        try:
            view = self.store.view(name)
            shapes = []
            for camera, jpeg in self._jpegs(view, step):
                try:
                    shapes.append(decode_jpeg(jpeg).shape)
                except StoreError as error:
                    raise _undecodable(view, camera, step, error) from error
            if len(set(shapes)) > 1:
                raise StoreError(f"episode {name} has cameras of several image sizes, {shapes}: keep one size to a store, and import such "
                                 "files with --resize")
            frame = (len(shapes), *shapes[0])
            layout = Layout(view.cameras, frame, view.column("action").shape[1], view.column("proprio").shape[1])
        except FileNotFoundError as error:
            raise Unusable(name) from error
        except NewerSchema as error:
            raise Unusable(name) from error
        except DamagedEpisode as error:
            raise Unusable(name, str(error)) from error
        with self._layout_lock:  # threads may have begun with different episodes: the first one's counts for all
            self._layout = self._layout or layout
            return self._layout

    def _fill(self, out: dict[str, np.ndarray], i: int, view: EpisodeView, now: int, future: int) -> None:
        """Write window ``now`` of an episode into row ``i`` of the batch."""
        actions, labels, proprio = view.column("action"), view.column("label"), view.column("proprio")
        self._check_layout(view, out["images"].shape[1:], actions, proprio)
        self._fill_frames(out["images"][i], view, now)
        self._fill_frames(out["future_images"][i], view, future)
        out["proprio"][i], out["future_proprio"][i] = proprio[now], proprio[future]
        end = min(now + self.chunk, view.length)
        for key, values in (("actions", actions), ("labels", labels)):
            rows = out[key][i]
            rows[: end - now] = values[now:end]
            rows[end - now :] = values[view.length - 1]
        out["policy_versions"][i] = view.column("policy_version")[now]

    def _fill_frames(self, out: np.ndarray, view: EpisodeView, step: int) -> None:
        """Decode the frames of one step into ``out``, ``(C, H, W, 3)`` uint8, or copy them from where they are kept."""
        summary = view.summary
        hot = self.hot.get(summary.name, step, summary.created)
        if hot is not None:
            out[...] = hot
            return
        for number, (camera, jpeg) in enumerate(self._jpegs(view, step)):
            try:
                shape = decode_into(jpeg, out[number])
            except StoreError as error:
                raise _undecodable(view, camera, step, error) from error
            if shape != out.shape[1:]:
                self._check_layout(view, (len(out), *shape), view.column("action"), view.column("proprio"))
        if self.hot.limit:
            steps = np.arange(view.length + 1) if self.render is not None else summary.frame_steps
            self.hot.put(summary.name, summary.created, steps, step, out)

    def _jpegs(self, view: EpisodeView, step: int) -> list[tuple[str, Any]]:
        """The frames of a step by camera, made where they are missing."""
        jpegs: list[Any] = [view.frame(camera, step) for camera in view.cameras]
        if any(jpeg is None for jpeg in jpegs):
            if self.render is None:
                raise DamagedEpisode(f"{view.path} has no frame at step {step}, its header says it has")
            jpegs = list(self.render(view, [step])[step])
        return list(zip(view.cameras, jpegs, strict=True))

    def _check_layout(self, view: EpisodeView, frame: tuple[int, ...], actions: np.ndarray, proprio: np.ndarray) -> None:
        layout = Layout(view.cameras, frame, actions.shape[1], proprio.shape[1])
        if layout != self._layout:
            raise StoreError(
                f"episode {view.summary.name} has cameras, frames, actions and proprio of {tuple(layout)}, other episodes "
                f"{tuple(self._layout or ())}: keep one robot and image size to a store"
            )


class Source(Protocol):
    """Something that makes batches in two steps: a quick decision, and the work, which any thread may do."""

    def pick(self) -> Any: ...

    def build(self, picks: Any, empty: Empty = np.empty) -> Any: ...

    def forget(self, unusable: Unusable) -> None: ...

    def snapshot(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class WindowStream:
    """Batches of ``n`` windows of one selection from a sampler; :attr:`what` may be changed while it runs."""

    def __init__(self, sampler: WindowSampler, n: int, what: str | Selection = "all") -> None:
        self.sampler, self.n, self.what = sampler, n, what
        self.forget, self.snapshot, self.restore = sampler.forget, sampler.snapshot, sampler.restore

    def pick(self) -> Picks:
        return self.sampler.pick(self.n, self.what)

    def build(self, picks: Picks, empty: Empty = np.empty) -> WindowBatch:
        return self.sampler.build(picks, empty)


def draw_from(source: Source) -> Any:
    """The next batch of ``source``, made at once. The source forgets an episode that cannot be read, and draws as if it had never been
    there. A draw that fails leaves the source as before."""
    state = source.snapshot()
    while True:
        try:
            return source.build(source.pick())
        except Unusable as unusable:
            source.restore(state)
            source.forget(unusable)
        except StoreError:
            source.restore(state)
            raise


def _undecodable(view: EpisodeView, camera: str, step: int, error: StoreError) -> DamagedEpisode:
    return DamagedEpisode(f"{view.path}: frame of {camera} at step {step}: {error}")


def _locate(ends: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Which part each of ``where`` in [0, 1) falls into, of parts whose running total is ``ends``."""
    last = np.searchsorted(ends, ends[-1])  # rounding must not lead past the last part that is not empty
    return np.minimum(np.searchsorted(ends, where * ends[-1], side="right"), last)
