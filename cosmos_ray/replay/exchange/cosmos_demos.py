"""Demonstrations as the public cosmos-policy trainer reads them: ``<suite>/<instruction>_demo.hdf5`` with ``data/demo_0``, ...

Not the layout of its rollouts (``cosmos_hdf5``). The trainer takes the instruction from the file's name (underscores are spaces, a
word with SCENE in it starts anew), the suite from the folder's, and every demonstration for a success. Episodes with RoboCasa's two
views go out as its RoboCasa files: three cameras, each demonstration with its own instruction in ``task_description``, a file per task.

==================================  ================================================================================
``obs/agentview_rgb_jpeg``          JPEG bytes per step, those stored; RoboCasa: ``robot0_agentview_{left,right}_rgb_jpeg``
``obs/eye_in_hand_rgb_jpeg``        likewise; RoboCasa: ``robot0_eye_in_hand_rgb_jpeg``
``robot_states``                    (T, p) float32 proprioception
``actions``, ``states``             (T, d) float32, (T, S) float64
``rewards``, ``dones``              (T,) uint8, 1 at the end
==================================  ================================================================================

There are ``T`` observations for ``T`` actions: the state after the last action is not part of the format. ``actions`` are the labels:
this layout is for imitation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import h5py
import numpy as np

from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.cosmos_hdf5 import ROBOCASA
from cosmos_ray.replay.exchange.env_args import said_environment
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, whole_episodes
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

_JPEG = h5py.vlen_dtype(np.dtype(np.uint8))
_LONGEST_NAME = 255  # bytes, of a file
_ROBOCASA = tuple(ROBOCASA.values())


def export_demonstrations(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, suite: str = "libero_goal",
    render: Render | None = None, progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write the successful episodes into ``<target>/<suite>``, one file per instruction, stored JPEGs taken over as they are.

    Skipped and named are failures, episodes whose instruction a file name cannot say, those without a camera of either kind or with more
    cameras than the layout has, and those whose frames are not all stored, unless ``render`` makes them. StoreError if ``target`` exists,
    ``suite`` is no plain name or nothing can be written.
    """
    if not re.fullmatch(r"\w[\w.-]*", suite):
        raise StoreError(f"suite {suite!r} must be a plain name: it becomes a folder")
    skipped: list[tuple[str, str]] = []
    written: dict[str, int] = {}  # file -> demonstrations in it
    with new_folder(target) as folder:
        (folder / suite).mkdir()
        for view, frames in whole_episodes(store, summaries, skipped, render, progress):
            try:
                file, cameras = _file_name(view), _cameras(view)
            except StoreError as error:
                skipped.append((view.summary.name, str(error)))
                continue
            with h5py.File(folder / suite / file, "a") as out:
                data = out.require_group("data")
                if environment := said_environment(view.header["info"]):
                    data.attrs["env_args"] = json.dumps(environment)
                demo = data.create_group(f"demo_{written.get(file, 0)}")
                _write(demo, view, frames[:-1], cameras)
            written[file] = written.get(file, 0) + 1
        if not written:
            raise nothing_to_write(skipped)
    return Exchanged(sum(written.values()), tuple(skipped))


def _file_name(view: EpisodeView) -> str:
    words = view.instruction
    if not view.summary.success:
        raise StoreError("it did not succeed, and the trainer takes every demonstration for a success")
    if len(view.instructions) > 1:
        raise StoreError(f"it has {len(view.instructions)} instructions, and a file of this format one")
    if set(view.cameras) == set(_ROBOCASA):
        return re.sub(r"\W+", "_", view.summary.task)[:80] + ".hdf5"
    name = words.replace(" ", "_") + "_demo.hdf5"
    if not words.strip() or "_" in words or "SCENE" in words or re.search(r"[/\0]", words) or len(name.encode()) > _LONGEST_NAME:
        raise StoreError(f"the trainer takes the instruction from the file's name, which cannot say {words[:80]!r}")
    return name


def _cameras(view: EpisodeView) -> dict[str, int]:
    """Dataset -> index of its camera. StoreError unless there is one of either kind, or RoboCasa's three."""
    if set(view.cameras) == set(_ROBOCASA):
        return {f"{camera}_rgb_jpeg": view.cameras.index(camera) for camera in _ROBOCASA}
    index_of = {third_person(camera): index for index, camera in enumerate(view.cameras)}
    if len(index_of) != 2 or len(view.cameras) != 2:
        raise StoreError(f"cameras {', '.join(view.cameras)}: the format needs a third-person and a wrist camera, or RoboCasa's three")
    return {"agentview_rgb_jpeg": index_of[True], "eye_in_hand_rgb_jpeg": index_of[False]}


def _write(demo: h5py.Group, view: EpisodeView, frames: list[list[bytes]], cameras: dict[str, int]) -> None:
    observed = demo.create_group("obs")
    for name, index in cameras.items():
        column = observed.create_dataset(name, (len(frames),), dtype=_JPEG)
        for step, images in enumerate(frames):
            column[step] = np.frombuffer(images[index], np.uint8)
    end = (np.arange(view.length) == view.length - 1).astype(np.uint8)
    for name, values in {
        "actions": view.column("label"), "robot_states": view.column("proprio")[:-1], "states": view.column("state")[:-1],
        "rewards": end, "dones": end,
    }.items():  # fmt: skip
        demo.create_dataset(name, data=values)
    demo.attrs["num_samples"], demo.attrs["task_description"] = view.length, view.instruction
