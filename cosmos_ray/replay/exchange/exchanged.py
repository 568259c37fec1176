"""The result of an import or an export, and what exports share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files.durable import TEMPORARY, explained, sync_directory
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

Progress = Callable[[int, int], None]
_NAMED = 5  # of many that were left out for one reason
_SHOWN = 200  # characters of an instruction


@dataclass(frozen=True)
class Exchanged:
    """The result of an export: ``episodes`` were written; ``skipped`` are (which, why)."""

    episodes: int
    skipped: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ImportSummary:
    """The result of an import."""

    episodes: int  #: that the store has now
    known: int  #: of these, there before
    tasks: dict[str, int]  #: name -> episodes
    instructions: dict[str, int]  #: text -> episodes that have it
    sizes: dict[str, tuple[int, int]]  #: camera, as stored -> (height, width) of its frames
    embodiment: Embodiment | None  #: of the episodes; None where there are none
    notes: tuple[str, ...]  #: what was assumed, and on what ground; what of the files was left out
    skipped: tuple[tuple[str, str], ...]  #: episodes and files that were left out: (which, why)

    def text(self, where: object) -> str:
        """The lines for a user, of an import into the store ``where``."""
        lines = [f"{self.episodes} episodes imported into {where}, {self.known} of them were there before"]
        if self.embodiment and self.episodes:
            robot = self.embodiment
            rate = f"{robot.control_freq:g} control steps per second" if robot.control_freq else "control steps per second not known"
            lines.append("  tasks: " + ", ".join(f"{name} ({count})" for name, count in sorted(self.tasks.items())))
            lines += [f"  instruction of {count}: {_short(text)!r}" for text, count in sorted(self.instructions.items())]
            lines.append("  cameras, height x width: " + ", ".join(f"{name} {h}x{w}" for name, (h, w) in self.sizes.items()))
            lines.append(f"  {robot.action_dim} numbers per action, {robot.proprio_dim} of proprioception, {rate}")
        lines += [f"  note: {note}" for note in self.notes]
        by_reason: dict[str, list[str]] = {}
        for which, why in self.skipped:
            by_reason.setdefault(why, []).append(which)
        for why, left in by_reason.items():
            more = f" and {len(left) - _NAMED} more" if len(left) > _NAMED else ""
            lines.append(f"  left out {', '.join(left[:_NAMED])}{more}: {why}")
        return "\n".join(lines)


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... ({len(text)} characters)"


def nothing_to_write(skipped: list[tuple[str, str]]) -> StoreError:
    """The error of an export that has no episode."""
    return StoreError(f"none of the {len(skipped)} episodes can be written" + (f": {skipped[0][1]}" if skipped else ""))


def whole_episodes(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], skipped: list[tuple[str, str]], render: Render | None,
    progress: Progress | None,
) -> Iterator[tuple[EpisodeView, list[list[bytes]]]]:  # fmt: skip
    """Each episode with the JPEGs ``[step][camera]`` of all its ``T + 1`` states, made by ``render`` where they are not stored.

    An episode of which frames are missing is added to ``skipped``.
    """
    todo = list(summaries)
    for number, summary in enumerate(todo):
        try:
            view = store.view(summary.name)
            yield view, _all_frames(view, render)
        except (StoreError, FileNotFoundError) as error:
            skipped.append((summary.name, str(error)))
        if progress:
            progress(number + 1, len(todo))


def _all_frames(view: EpisodeView, render: Render | None) -> list[list[bytes]]:
    stored = set(view.summary.frame_steps.tolist())
    missing = [step for step in range(view.length + 1) if step not in stored]
    if missing and render is None:
        raise StoreError(f"frames are stored at {len(stored)} of {view.length + 1} steps, the format needs all: render them")
    made = render(view, missing) if missing and render is not None else {}
    return [made[t] if t in made else [view.stored_frame(camera, t).tobytes() for camera in view.cameras] for t in range(view.length + 1)]


@contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """A folder to fill that gets the name ``target`` once it is complete. StoreError if that is taken or cannot be written."""
    target = Path(target)
    if os.path.lexists(target):
        raise StoreError(f"{target} exists: give another path, or move it away")
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    with explained("write", target):
        beside.mkdir(parents=True)
        try:
            yield beside
            for folder, _, files in os.walk(beside):
                for name in files:
                    with open(os.path.join(folder, name), "rb") as file:
                        os.fsync(file.fileno())
                sync_directory(Path(folder))
            os.rename(beside, target)
            sync_directory(target.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
