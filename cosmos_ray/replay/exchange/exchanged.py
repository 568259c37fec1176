"""The result of an import or an export, and what exports share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.files.durable import TEMPORARY, explained, sync_directory
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exchanged:
    """``episodes`` went through, ``known`` of them were there before; ``skipped`` are (which, why)."""

    episodes: int
    known: int
    skipped: tuple[tuple[str, str], ...]


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


def third_person(camera: str) -> bool:
    """Whether a camera, by its name, looks at the robot instead of moving with its hand."""
    return "wrist" not in camera and "eye_in_hand" not in camera
