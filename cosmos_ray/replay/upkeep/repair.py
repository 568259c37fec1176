"""Every byte of a store read and compared with its checksum, and what can be mended mended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import manifest, removals
from cosmos_ray.replay.catalog import EPISODES, PACKS, SUFFIX, episode_path
from cosmos_ray.replay.files.durable import explained
from cosmos_ray.replay.files.quarantine import FOLDER as QUARANTINE
from cosmos_ray.replay.files.quarantine import LOG
from cosmos_ray.replay.files.storage import Listing
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import Episode
from cosmos_ray.replay.format.pack import Pack, recover
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be."""

    path: str  #: in the store; ``pack#slot`` for an episode of a pack
    kind: str  #: damaged, newer, misplaced, doubled, evicted, stray or foreign
    reason: str


@dataclass(frozen=True)
class Audit:
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
    doubles: int = 0  #: files deleted because their episode is in a pack too, or evicted


def verify(store: ReplayStore, *, decode: bool = False, threads: int = 1, progress: Progress | None = None) -> Audit:
    """Read everything and change nothing. With ``decode`` every JPEG is decoded too. StoreError if the store cannot be listed."""
    with explained("list", store.storage.name):
        store.catalog.look_for_removals()
        listings = [listing for folder in (PACKS, EPISODES) for listing in store.storage.scan(folder, {}, store.stray_seconds)]
        problems = [problem for listing in listings for problem in _misfits(listing)] + list(_removal_problems(store))
    paths = [f"{listing.folder}/{file}" for listing in listings for file in listing.files]
    seen: dict[str, str] = {}
    size = done = 0

    with ThreadPoolExecutor(max(1, threads)) as pool, explained("verify", store.storage.name):
        for read, names, found in pool.map(lambda path: _check_file(store, path, decode), paths):
            size += read
            problems += found
            for name, where in names:
                if name in seen:
                    problems.append(Problem(where, "doubled", f"episode {name} is in {seen[name]} too; readers take it once"))
                seen.setdefault(name, where)
            done += 1
            if progress:
                progress(done, len(paths))
    with explained("list", store.storage.where(QUARANTINE)):
        quarantined = sum(1 for _ in _quarantined(store))
    return Audit(len(seen), size, quarantined, tuple(problems))


def repair(root: str | Path, *, threads: int = 1, progress: Progress | None = None) -> Repair:
    """Quarantine what :func:`verify` finds, then bring back from quarantine what can be read, and write a new manifest.

    An episode of which only frames are damaged comes back without these (windows that need them are gone, or rendered again
    from the stored states); a pack whose end is lost gives back the episodes before. Nothing is deleted but copies of what is
    in a pack. StoreError if the store cannot be written.
    """
    store, done = ReplayStore(root, create=False), Repair()
    with explained("repair", store.storage.name):
        store.storage.remove(manifest.FILE)
        problems = verify(store, decode=True, threads=threads, progress=progress).problems
        for problem in problems:
            if problem.path.startswith((f"{PACKS}/", f"{EPISODES}/")) and "#" not in problem.path:
                _put_away(store, problem, done)
        store.update()
        for problem in (p for p in problems if "#" in p.path and p.kind == "damaged"):
            _put_away_packed(store, problem, done)
        for path, name in sorted(store.catalog.removals.damaged):
            if name not in store:
                _salvage_packed(store, path, name, done)
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
    """What is wrong with the records of removed episodes. Nothing can mend them; what they say still counts where it can be read."""
    for listing in store.storage.scan(removals.FOLDER, {}, store.stray_seconds):
        yield from _misfits(listing)
        for name in listing.files:
            path = f"{listing.folder}/{name}"
            damaged = removals.read_records(store.storage.read(path))[1]
            if damaged:
                yield Problem(path, "damaged", f"{damaged} lines cannot be read: what was evicted there may be collected again")


def _check_file(store: ReplayStore, path: str, decode: bool) -> tuple[int, list[tuple[str, str]], list[Problem]]:
    """Bytes read, (name, place) of the whole episodes, and the problems of one file."""
    where = store.storage.where(path)
    if not path.endswith(SUFFIX):
        return 0, [], [Problem(path, "foreign", f"{where} is no file of a replay store")]
    try:
        store.storage.forget_copy(path)  # the file itself is to be checked
        file = store.storage.open(path)
        size = file.size()
        if not path.startswith(PACKS + "/"):
            view = EpisodeView(file, where)
            name = path.rpartition("/")[2].removesuffix(SUFFIX)
            if view.summary.name != name or episode_path(name) != path:
                return size, [], [Problem(path, "misplaced", f"{where} holds episode {view.summary.name}")]
            if store.catalog.is_removed(name, path):
                return size, [], [Problem(path, "evicted", "evicted before, its file was left behind")]
            views = [(0, view)]
        else:
            views = list(Pack(file, where).views())
    except FileNotFoundError:
        return 0, [], []  # deleted meanwhile
    except NewerSchema as error:
        return 0, [], [Problem(path, "newer", str(error))]
    except StoreError as error:
        return 0, [], [Problem(path, "damaged", str(error))]
    names, problems = [], []
    for slot, view in views:
        place = path if len(views) == 1 and not path.startswith(PACKS + "/") else f"{path}#{slot}"
        try:
            if not isinstance(view, EpisodeView):
                raise view
            if store.catalog.is_removed(view.summary.name, path):
                continue
            view.check()
            if decode:
                _decode(view)
            names.append((view.summary.name, place))
        except NewerSchema as error:
            problems.append(Problem(place, "newer", str(error)))
        except StoreError as error:
            problems.append(Problem(place, "damaged", str(error)))
    return size, names, problems


def _decode(view: EpisodeView) -> None:
    for step in view.summary.frame_steps:
        for camera in view.cameras:
            try:
                decode_jpeg(view.frame(camera, int(step)))
            except StoreError as error:
                raise DamagedEpisode(f"{view.path}: frame of {camera} at step {step}: {error}") from error


def _put_away(store: ReplayStore, problem: Problem, done: Repair) -> None:
    """Take a file out of the store."""
    if problem.kind in ("doubled", "evicted"):  # packs are read first, so a double is the file of its own
        store.storage.remove(problem.path)
        done.doubles += 1
    elif problem.kind != "newer" and store.quarantine.take(problem.path, problem.reason):
        done.quarantined.append(problem)


def _put_away_packed(store: ReplayStore, problem: Problem, done: Repair) -> None:
    """Stop reading a damaged episode of a pack, which stays where it is."""
    path, _, slot = problem.path.partition("#")
    try:
        summary = store.catalog.pack(path).view(int(slot)).summary
    except (StoreError, FileNotFoundError):
        return  # not even its header: it is not in the index
    if store.index.place(summary.name) == (path, int(slot)):
        store.discard(summary.name, problem.reason)
    else:
        store.catalog.strike(summary, path, problem.reason)  # another copy of it is the one that counts
    done.quarantined.append(problem)


def _salvage_packed(store: ReplayStore, path: str, name: str, done: Repair) -> None:
    """Commit again what can be read of a damaged episode of a pack."""
    try:
        views = [view for _, view in store.catalog.pack(path).views() if isinstance(view, EpisodeView)]
    except (StoreError, FileNotFoundError):
        return
    for view in (view for view in views if view.summary.name == name):
        _commit_again(store, view, done)


def _quarantined(store: ReplayStore) -> Iterator[str]:
    for listing in store.storage.scan(QUARANTINE, {}, 0.0):
        if listing.folder == QUARANTINE:
            yield from (path for file in (*listing.files, *listing.strays, *listing.others) if (path := f"{QUARANTINE}/{file}") != LOG)


def _bring_back(store: ReplayStore, path: str, done: Repair) -> None:
    """Commit again what a file in quarantine still has, unless it is there."""
    for view in _readable(store, path):
        if view.summary.name not in store:
            _commit_again(store, view, done)


def _commit_again(store: ReplayStore, view: EpisodeView, done: Repair) -> None:
    episode = salvage(view)
    if episode is None or not store.commit(episode, created=view.summary.created):
        return
    dropped = len(view.summary.frame_steps) - len(episode.frames)
    if dropped:
        done.salvaged[view.summary.name] = dropped
    else:
        done.restored.append(view.summary.name)


def _readable(store: ReplayStore, path: str) -> Iterator[EpisodeView]:
    """The episodes of a file in quarantine, as far as they have a header."""
    where = store.storage.where(path)
    try:
        file = store.storage.open(path)
    except OSError:
        return  # not a file, or gone
    try:
        yield EpisodeView(file, where)
        return
    except StoreError:
        pass  # a pack, or nothing that can be read
    try:
        views = [view for _, view in Pack(file, where).views()]
    except StoreError:
        views = recover(file, where)
    yield from (view for view in views if isinstance(view, EpisodeView))


def salvage(view: EpisodeView) -> Episode | None:
    """The episode without the steps of which a frame is damaged; None where more than frames is damaged."""
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
            jpeg = view.frame(camera, step)
            decode_jpeg(np.zeros(0, np.uint8) if jpeg is None else jpeg)
        except StoreError:
            return None
        images.append(jpeg.tobytes())
    return images
