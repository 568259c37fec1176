"""Verification, which reads every byte of a store and checks it, and repair of what verification finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import manifest, removals
from cosmos_ray.replay.catalog import EPISODES, SUFFIX, episode_path
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.quarantine import FOLDER as QUARANTINE
from cosmos_ray.replay.files.quarantine import LOG
from cosmos_ray.replay.files.storage import Listing
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore

Progress = Callable[[int, int], None]


Fault = Literal["damaged", "newer", "misplaced", "evicted", "stray", "foreign"]


@dataclass(frozen=True)
class Problem:
    """A fault of one file."""

    path: str  #: in the store
    fault: Fault
    reason: str


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found."""

    episodes: int  #: readable ones, each counted once
    size: int  #: bytes of all that was read
    quarantined: int  #: files in quarantine
    problems: tuple[Problem, ...] = ()


@dataclass
class Repair:
    """What :func:`repair` did."""

    quarantined: list[Problem] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)  #: episodes that were in quarantine and are whole
    salvaged: dict[str, int] = field(default_factory=dict)  #: episode -> steps whose damaged frames were dropped
    leftovers: int = 0  #: files of evicted episodes that were deleted


def verify(store: ReplayStore, *, decode: bool = False, threads: int = 1, progress: Progress | None = None) -> Verification:
    """Read everything and change nothing. With ``decode`` every JPEG is decoded too. StoreError if the store cannot be listed."""
    with explained("list", store.storage.name):
        store.catalog.look_for_removals()
        listings = list(store.storage.scan(EPISODES, {}, store.stray_seconds))
        problems = [problem for listing in listings for problem in _misfits(listing)] + list(_removal_problems(store))
    paths = [f"{listing.folder}/{file}" for listing in listings for file in listing.files]
    size = done = episodes = 0

    with ThreadPoolExecutor(max(1, threads)) as pool, explained("verify", store.storage.name):
        for read, problem in pool.map(lambda path: _check_file(store, path, decode), paths):
            size += read
            problems += [problem] if problem else []
            episodes += bool(read) and problem is None
            done += 1
            if progress:
                progress(done, len(paths))
    with explained("list", store.storage.where(QUARANTINE)):
        quarantined = sum(1 for _ in _quarantined(store))
    return Verification(episodes, size, quarantined, tuple(problems))


def repair(root: str | Path, *, threads: int = 1, progress: Progress | None = None) -> Repair:
    """Quarantine the files that :func:`verify` finds, bring back the quarantined episodes that can be read, and write a new manifest.

    An episode of which only frames are damaged comes back without these (windows that need them are gone, or rendered again
    from the stored states). Repair deletes nothing but files of evicted episodes. StoreError if the store cannot be written.
    """
    store, done = ReplayStore(root, create=False), Repair()
    with explained("repair", store.storage.name):
        store.storage.remove(manifest.FILE)
        for problem in verify(store, decode=True, threads=threads, progress=progress).problems:
            if problem.path.startswith(f"{EPISODES}/"):
                _put_away(store, problem, done)
        store.update()
        for path in list(_quarantined(store)):
            if path.endswith(SUFFIX):
                _bring_back(store, path, done)
    store.save_manifest()
    return done


def _misfits(listing: Listing) -> Iterator[Problem]:
    for name in listing.strays:
        yield Problem(f"{listing.folder}/{name}", "stray", "temporary file left behind, its writer is gone")
    for name in listing.others:
        yield Problem(f"{listing.folder}/{name}", "foreign", "neither a file nor a directory")


def _removal_problems(store: ReplayStore) -> Iterator[Problem]:
    """Faults in the records of evicted episodes. Nothing can repair them; their readable lines still count."""
    for listing in store.storage.scan(removals.FOLDER, {}, store.stray_seconds):
        yield from _misfits(listing)
        for name in listing.files:
            path = f"{listing.folder}/{name}"
            damaged = removals.read_records(store.storage.read(path))[1]
            if damaged:
                yield Problem(path, "damaged", f"{damaged} lines cannot be read: what was evicted there may be collected again")


def _check_file(store: ReplayStore, path: str, decode: bool) -> tuple[int, Problem | None]:
    """Bytes of one file, all read, and what is wrong with it. 0 and None if it was deleted meanwhile."""
    where, size = store.storage.where(path), 0
    if not path.endswith(SUFFIX):
        return 0, Problem(path, "foreign", f"{where} is no file of a replay store")
    try:
        store.storage.forget_copy(path)  # the file itself is to be checked
        file = store.storage.open(path)
        size = file.size()
        view = EpisodeView(file, where)
        name = path.rpartition("/")[2].removesuffix(SUFFIX)
        if view.summary.name != name or episode_path(name) != path:
            return size, Problem(path, "misplaced", f"{where} holds episode {view.summary.name}")
        if name in store.catalog.removals.evicted:
            return size, Problem(path, "evicted", "evicted before, its file was left behind")
        view.check()
        if decode:
            _decode(view)
        return size, None
    except FileNotFoundError:
        return 0, None
    except NewerSchema as error:
        return size, Problem(path, "newer", str(error))
    except StoreError as error:
        return size, Problem(path, "damaged", str(error))


def _decode(view: EpisodeView) -> None:
    for step in view.summary.frame_steps:
        for camera in view.cameras:
            try:
                decode_jpeg(view.stored_frame(camera, int(step)))
            except StoreError as error:
                raise DamagedEpisode(f"{view.path}: frame of {camera} at step {step}: {error}") from error


def _put_away(store: ReplayStore, problem: Problem, done: Repair) -> None:
    """Take a file out of the store."""
    if problem.fault == "evicted":
        store.storage.remove(problem.path)
        done.leftovers += 1
    elif problem.fault != "newer" and store.quarantine.take(problem.path, problem.reason):
        done.quarantined.append(problem)


def _quarantined(store: ReplayStore) -> Iterator[str]:
    for listing in store.storage.scan(QUARANTINE, {}, 0.0):
        if listing.folder == QUARANTINE:
            yield from (path for file in (*listing.files, *listing.strays, *listing.others) if (path := f"{QUARANTINE}/{file}") != LOG)


def _bring_back(store: ReplayStore, path: str, done: Repair) -> None:
    """Commit again what a file in quarantine still has, unless its episode is there."""
    view = _readable(store, path)
    episode = salvage(view) if view is not None and view.summary.name not in store else None
    if view is None or episode is None or not store.commit(episode, created=view.summary.created):
        return
    dropped = len(view.summary.frame_steps) - len(episode.frames)
    if dropped:
        done.salvaged[view.summary.name] = dropped
    else:
        done.restored.append(view.summary.name)


def _readable(store: ReplayStore, path: str) -> EpisodeView | None:
    """The episode of a file in quarantine, if as much as its header can be read."""
    where = store.storage.where(path)
    try:
        file = store.storage.open(path)
    except (OSError, StoreError):
        return None  # not a file, gone, or too large
    try:
        return EpisodeView(file, where)
    except StoreError:
        pass  # its end may be lost
    try:
        return EpisodeView.without_footer(file.read_buffer(), where)
    except StoreError:
        return None


def salvage(view: EpisodeView) -> Episode | None:
    """The episode without the steps whose frames are damaged; None if more than frames is damaged."""
    summary, info = view.summary, dict(view.header["info"])
    try:
        columns = {a: view.column(c).copy() for c, a in {**schema.STATE_COLUMNS, **schema.STEP_COLUMNS}.items()}
        frames = {step: images for step in map(int, summary.frame_steps) if (images := _whole_frames(view, step)) is not None}
        if len(frames) < len(summary.frame_steps):
            info["dropped_frames"] = len(summary.frame_steps) - len(frames)
        return Episode(
            key=summary.key, instruction=view.instruction, cameras=view.cameras, success=summary.success,
            episode_return=summary.episode_return, timed_out=summary.timed_out, invalid=summary.invalid,
            policy_version=summary.policy_version, frames=frames, info=info, score=view.header.get("score"), **columns,
        )  # fmt: skip
    except StoreError:
        return None


def _whole_frames(view: EpisodeView, step: int) -> list[bytes] | None:
    images = []
    for camera in view.cameras:
        try:
            jpeg = view.stored_frame(camera, step)
            decode_jpeg(jpeg)
        except StoreError:
            return None
        images.append(jpeg.tobytes())
    return images
