"""Episodes of others' files into a store: what every format shares.

A format is a *reader*: a generator ``read(path, options, notes)`` over the episodes of one path. It yields an
:class:`~cosmos_ray.replay.format.episode.Episode`, or a :class:`Skip` for what cannot be read, and says in ``notes`` what it assumed
or left out. :func:`import_episodes` does the rest: it renames, orders and resizes cameras, holds each episode against the store and
commits it, so that a store has nothing that training would refuse.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import simplejpeg

from cosmos_ray.embodiment import Embodiment, third_person
from cosmos_ray.errors import BadFile, ConfigError, StoreError
from cosmos_ray.replay.exchange.exchanged import ImportSummary, Progress
from cosmos_ray.replay.exchange.recorded_states import RenderRecorded
from cosmos_ray.replay.format.codec import MOST_PIXELS, decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import Episode, spoken
from cosmos_ray.replay.format.schema import DamagedEpisode, NewerSchema
from cosmos_ray.replay.store import ReplayStore, is_store

SMALLEST, LARGEST = 16, 4096  # pixels of a side, of resized frames
SLOWEST, FASTEST = 0.5, 10_000.0  # control steps per second
_PLAIN = re.compile(r"[A-Za-z0-9_-]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")


@dataclass(frozen=True)
class ImportOptions:
    """What a user says about files beyond what they say themselves. A reader uses what its format leaves open."""

    task: str = ""  #: name of the task; "" is what the file says
    instruction: str = ""  #: for every episode; "" is what the file says
    flip: bool | None = None  #: turn pictures upside down; None is as the file's convention says
    source: str = ""  #: ``demo``, ``rollout`` or ``eval``; "" is what the file says
    policy_version: int = 0  #: of rollouts that do not say theirs
    control_freq: float = 0.0  #: control steps per second where the file does not say; 0 is not known
    filter: str = ""  #: of robomimic: take the demonstrations of this list under ``mask``; "" is all
    render: RenderRecorded | None = None  #: draws simulator states that were recorded without pictures; None leaves them out
    keys: Mapping[str, str] = field(default_factory=dict)  #: name that the format has -> name in the file
    cameras: tuple[str, ...] = ()  #: take these alone, by their names in the file; none is all
    rename_camera: Mapping[str, str] = field(default_factory=dict)  #: name in the file -> name in the store
    resize: int = 0  #: frames become N x N pixels; 0 leaves them as they are

    def __post_init__(self) -> None:
        if self.resize and not SMALLEST <= self.resize <= LARGEST:
            raise ConfigError(f"frames cannot be resized to {self.resize} pixels: give {SMALLEST} to {LARGEST}, or 0 to leave them as "
                              "they are")
        if self.control_freq and not SLOWEST <= self.control_freq <= FASTEST:
            raise ConfigError(f"{self.control_freq:g} control steps per second (not the seconds of a step): give {SLOWEST:g} to "
                              f"{FASTEST:g}, or 0 where it is not known")
        if wrong := [name for name in self.rename_camera.values() if not _PLAIN.fullmatch(name)]:
            raise ConfigError(f"--rename-camera {wrong[0]!r} is no plain name: use letters, digits, '-', '_' and '.', not a '.' first or "
                              "last")

    def takes(self, camera: str) -> bool:
        """Whether the camera of this name in the file is wanted."""
        return not self.cameras or camera in self.cameras


@dataclass(frozen=True)
class Skip:
    """An episode, or a part of a file, that is left out."""

    which: str
    why: str


class Notes:
    """What a reader says beside its episodes: what it assumed, from where it took it, what it left out. A line for a user each."""

    def __init__(self) -> None:
        self.total = 0  #: episodes of the path that is read, for the progress
        self._said: Counter[str] = Counter()

    def say(self, text: str) -> None:
        """Note something once, however many episodes it holds for."""
        self._said[text] += 1

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._said)


Reader = Callable[[Path, ImportOptions, Notes], Iterator[Episode | Skip]]


def attempt(which: str, read: Callable[[], Episode]) -> Episode | Skip:
    """The episode, or why a file of another's making does not give it."""
    try:
        return read()
    except KeyError as error:
        return Skip(which, f"it has no {error}")
    except (StoreError, RuntimeError, TypeError, ValueError, OSError, OverflowError, pa.ArrowException) as error:
        return Skip(which, str(error).partition("\n")[0])


def import_episodes(
    read: Reader, paths: str | Path | Iterable[str | Path], store: ReplayStore | str | Path, options: ImportOptions | None = None,
    progress: Progress | None = None, accept: Callable[[Episode], None] | None = None,
) -> ImportSummary:  # fmt: skip
    """Commit every episode of the paths, one at a time; importing again finds them known.

    ``store`` may be the root of one, which is made when the first episode is accepted: without any, nothing is left behind.
    ``accept`` sees the first episode before it is committed, as it will be stored, and may raise to have nothing imported.
    BadFile, and nothing committed, where the first episode does not fit the store, a path does not exist or the only path is not of
    the format. A later episode that does not fit is left out and named, as is one of several paths that cannot be read.
    """
    options = options or ImportOptions()
    chosen = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    for path in chosen:
        if not path.exists():
            raise BadFile(f"{path} does not exist")
    notes, driver = Notes(), _Driver(store, options, accept)
    for path in chosen:
        for number, found in enumerate(_found(read, path, options, notes, len(chosen) == 1)):
            driver.take(found, path)
            if progress:
                progress(number + 1, max(number + 1, notes.total))
    return driver.summary(notes)


def _found(read: Reader, path: Path, options: ImportOptions, notes: Notes, alone: bool) -> Iterator[Episode | Skip]:
    """What the reader finds; a path that is not of its format is left out unless it is the only one."""
    try:
        yield from read(path, options, notes)
    except StoreError as error:
        if alone:
            raise BadFile(str(error)) from error
        yield Skip(str(path), str(error))


class _Driver:
    """Brings episodes into one shape, holds them against the store's, and commits them."""

    def __init__(self, store: ReplayStore | str | Path, options: ImportOptions, accept: Callable[[Episode], None] | None) -> None:
        self.root, self.options, self.accept = store, options, accept
        self._store: ReplayStore | None = None
        self.layout = _stored(self.store) if isinstance(store, ReplayStore) or is_store(store) else None  # else of the first episode
        self.in_store = self.layout is not None
        self.episodes = self.known = self.unlike = self.evicted = 0
        self.skipped: list[tuple[str, str]] = []
        self.rates = set[str]()  # that files say, and --control-freq does not
        self.tasks: Counter[str] = Counter()
        self.instructions: Counter[str] = Counter()

    @property
    def store(self) -> ReplayStore:
        """The store, made if there is none."""
        if self._store is None:
            self._store = self.root if isinstance(self.root, ReplayStore) else ReplayStore(self.root)
            self._store.update()
        return self._store

    def take(self, found: Episode | Skip, path: Path) -> None:
        """Commit an episode, or note why it is left out.

        BadFile where the first one does not fit, StoreError where the store cannot be written.
        """
        if isinstance(found, Skip):
            self.skipped.append((found.which, found.why))
            return
        which = f"episode {found.key.seed} of {path.name}"
        try:
            episode = self._shaped(found)
            layout = _Layout.of(episode)
        except (_Flawed, StoreError) as error:
            if isinstance(error, StoreError) and not self.episodes:  # what was asked for does not go with these files
                raise BadFile(str(error)) from error
            self.skipped.append((which, str(error)))
            return
        why = layout.flaw() or (self.layout.misfit(layout, "the store's" if self.in_store else "those before it") if self.layout else "")
        if why and not self.episodes:
            raise BadFile(f"{which} cannot be taken, and nothing was imported: {why}")
        if why:
            self.skipped.append((which, why))
            return
        if self.accept and not self.episodes:
            self.accept(episode)
        episode = self._after_evictions(episode)
        if not self.store.commit(episode):
            self.known += 1
            self.unlike += self._is_unlike(episode)
        self.episodes += 1
        self.layout = (self.layout or layout).completed(layout)
        self.tasks[episode.key.task] += 1
        self.instructions.update(episode.instructions)

    def summary(self, notes: Notes) -> ImportSummary:
        embodiment = self.layout.embodiment if self.layout else None
        sizes = self.layout.sizes if self.layout else {}
        if silent := sum(count for text, count in self.instructions.items() if not text.strip()):
            notes.say(f"episodes without text: {silent}; --instruction gives them one")
        if self.rates:
            notes.say(f"--control-freq {self.options.control_freq:g} is for files that do not say their rate; these say "
                      f"{', '.join(sorted(self.rates))} control steps per second, which counts")
        if self.unlike:
            notes.say(f"episodes that were there before with other texts or frames, and stay as they were: {self.unlike}; `replay evict` "
                      "them, then import again")
        if self.evicted:
            notes.say(f"episodes that had been evicted, and came in anew under another name: {self.evicted}")
        return ImportSummary(self.episodes, self.known, dict(self.tasks), dict(self.instructions), sizes, embodiment, notes.texts,
                             tuple(self.skipped))

    def _after_evictions(self, episode: Episode) -> Episode:
        """The episode under a name that is not that of an evicted one, which a store would not take back."""
        key = episode.key
        while self.store.evicted(key.name) is not None:
            key = replace(key, attempt=key.attempt + 1)
        self.evicted += key != episode.key and key.name not in self.store
        return replace(episode, key=key)

    def _is_unlike(self, episode: Episode) -> bool:
        """Whether the store has another content under the episode's name."""
        try:
            view = self.store.view(episode.key.name)
            shown = [view.frame(camera, 0) for camera in view.cameras]
        except (FileNotFoundError, StoreError):
            return False
        same = [image is not None and image.tobytes() == new for image, new in zip(shown, episode.frames.get(0, []), strict=False)]
        return view.spoken != spoken(episode.info, episode.instruction) or view.cameras != episode.cameras or not all(same)

    def _shaped(self, episode: Episode) -> Episode:
        """The episode with the cameras that were asked for, under their names, in order, in size."""
        options, names = self.options, list(episode.cameras)
        for option, wanted in (("--cameras", options.cameras), ("--rename-camera", options.rename_camera)):
            unknown = [name for name in wanted if name not in names]
            if unknown:
                raise StoreError(f"{option} names {', '.join(unknown)}, and the cameras of the file are {', '.join(names)}")
        renamed = {options.rename_camera.get(name, name): index for index, name in enumerate(names) if options.takes(name)}
        if len(renamed) < sum(map(options.takes, names)):
            raise StoreError(f"--rename-camera gives two of the cameras {', '.join(names)} one name")
        stored = self.layout.embodiment.cameras if self.layout else ()
        order = stored if set(stored) == set(renamed) else tuple(sorted(renamed, key=third_person))
        info = dict(episode.info)
        if options.control_freq and info.setdefault("control_freq", options.control_freq) != options.control_freq:
            self.rates.add(f"{info['control_freq']:g}")
        frames = {step: [images[renamed[name]] for name in order] for step, images in episode.frames.items()}
        if options.resize:
            frames = {step: [_resized(image, options.resize) for image in images] for step, images in frames.items()}
        return replace(episode, cameras=order, frames=frames, info=info)


class _Flawed(Exception):
    """An episode that no store should have."""


@dataclass(frozen=True)
class _Layout:
    """What all episodes of a store have in common."""

    embodiment: Embodiment
    sizes: dict[str, tuple[int, int]]  # camera -> (height, width) of its frames

    @classmethod
    def of(cls, episode: Episode) -> _Layout:
        """_Flawed for numbers that are not finite, frames that are none, or of several sizes of one camera."""
        for name in ("actions", "labels", "proprio", "rewards"):
            bad = np.argwhere(~np.isfinite(getattr(episode, name)))
            if len(bad):
                raise _Flawed(f"{name} has a number that is not finite at step {bad[0][0]}")
        sizes: dict[str, tuple[int, int]] = {}
        for step, images in episode.frames.items():
            for camera, image in zip(episode.cameras, images, strict=True):
                try:
                    size = simplejpeg.decode_jpeg_header(image)[:2]
                except ValueError as error:
                    raise _Flawed(f"the frame of {camera} at step {step} is no JPEG image") from error
                if size[0] * size[1] > MOST_PIXELS:
                    raise _Flawed(f"the frame of {camera} at step {step} is of {_pixels(size)} pixels, at most {MOST_PIXELS} are read")
                if size != sizes.setdefault(camera, size):
                    raise _Flawed(f"frames of {camera} change in size, at step {step} from {_pixels(sizes[camera])} to {_pixels(size)}: "
                                  "give --resize N to make all of them N x N")
        return cls(episode.embodiment, sizes)

    def flaw(self) -> str:
        """Why no store can take such episodes; "" if one can."""
        if not self.sizes:
            return "it has no pictures, and a policy sees nothing but pictures"
        if len(set(self.sizes.values())) > 1:
            return (f"its cameras differ in size ({', '.join(f'{name} {_pixels(size)}' for name, size in self.sizes.items())}), and "
                    "training needs all alike: give --resize N to make all of them N x N, or --cameras with those to take")
        return ""

    def misfit(self, other: _Layout, whose: str) -> str:
        """Why an episode of ``other`` layout does not fit here; "" if it does."""
        mine, theirs = self.embodiment, other.embodiment
        if set(mine.cameras) != set(theirs.cameras):
            return (f"its cameras are {', '.join(theirs.cameras)}, and {whose} {', '.join(mine.cameras)}: give --rename-camera OLD=NEW for "
                    "each that is the same, --cameras with those to take, or another store")
        for what, here, there in mine.misfit(theirs):
            return f"it has {there} {what}, and {whose} {here}: one store is of one robot, give another store"
        size, its = next(iter(self.sizes.values())), next(iter(other.sizes.values()))
        if size != its:
            advice = f"give --resize {size[0]}, or another store" if size[0] == size[1] else "give another store"
            return f"its frames are {_pixels(its)}, and {whose} {_pixels(size)}: {advice}"
        return ""

    def completed(self, other: _Layout) -> _Layout:
        """This layout, with the rate and the render quality of ``other`` where its own are not known."""
        mine, theirs = self.embodiment, other.embodiment
        rate, quality = mine.control_freq or theirs.control_freq, mine.quality or theirs.quality
        return _Layout(replace(mine, control_freq=rate, quality=quality), self.sizes)


def _stored(store: ReplayStore) -> _Layout | None:
    """The layout of the newest episode of a store that has frames; None of an empty store."""
    for row in reversed(np.flatnonzero(store.index.alive).tolist()):
        try:
            view = store.view(store.index.names[row])
            if steps := view.summary.frame_steps[:1].tolist():
                shapes = {camera: decode_jpeg(view.stored_frame(camera, steps[0])).shape for camera in view.cameras}
                return _Layout(view.embodiment, {camera: (shape[0], shape[1]) for camera, shape in shapes.items()})
        except (FileNotFoundError, DamagedEpisode, NewerSchema):
            continue  # whoever draws from it finds out
    return None


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _resized(jpeg: bytes, side: int) -> bytes:
    """The picture as one of ``side`` x ``side`` pixels; as it is where it has them already."""
    if simplejpeg.decode_jpeg_header(jpeg)[:2] == (side, side):
        return jpeg
    picture = decode_jpeg(jpeg)
    shrinks = min(picture.shape[:2]) >= side
    return encode_jpeg(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC))
