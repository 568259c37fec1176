"""Demonstrations as LIBERO releases them: ``<suite>/<task's name>_demo.hdf5`` with ``data/demo_0``, ``data/demo_1``, ...

LIBERO's loader finds the files where its path ``datasets`` leads to the exported folder. Facts: ``scripts/create_dataset.py`` and
``libero/lifelong/datasets.py`` of github.com/Lifelong-Robot-Learning/LIBERO.

==========================================  ====================================================================================
``data`` attributes                         ``env_name``, ``problem_info``, ``env_args`` (JSON), ``bddl_file_name``, ``bddl_file_content``,
                                            ``macros_image_convention``, ``tag``, ``num_demos``, ``total`` (steps)
``demo_i`` attributes                       ``num_samples``, ``init_state`` (the first of ``states``), ``model_file`` (MJCF)
``obs/agentview_rgb``, ``eye_in_hand_rgb``  (T, H, W, 3) uint8, upside down, as OpenGL draws
``obs/joint_states``, ``gripper_states``    (T, 7), (T, 2) float64, radians and metres
``obs/ee_pos``, ``ee_ori``, ``ee_states``   (T, 3) metres, (T, 3) axis-angle in radians, (T, 6) both
``robot_states``                            (T, 9) float64: fingers, hand position, hand quaternion (x, y, z, w)
``states``, ``actions``                     (T, 1 + nq + nv) and (T, 7) float64; a state is time, positions, velocities
``rewards``, ``dones``                      (T,) uint8, 1 at the end
==========================================  ====================================================================================

Row ``i`` has the simulator state **before** action ``i`` and the observation **after** it, as LIBERO's own script records. So the picture
of an episode's beginning is not part of the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from cosmos_ray.config.libero import libero_folder, libero_names, libero_task
from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, whole_episodes
from cosmos_ray.replay.exchange.observations import rotation_vectors
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

JOINTS = 7  #: of the arm, first in a state's positions
TAG = "libero-v1"  #: version of the layout


class LiberoModel(NamedTuple):
    """What a file says of an episode's simulation."""

    environment: str  #: LIBERO's class, such as ``Libero_Tabletop_Manipulation``
    arguments: dict[str, Any]  #: of the class, as robosuite 1.4 takes them
    mjcf: str  #: the model with fixtures where they are in the episode
    width: int  #: 1 + nq + nv, numbers of MuJoCo's state


Describe = Callable[[EpisodeView], LiberoModel]
"""Says how an episode is simulated. StoreError in one line where it cannot."""


def export_libero(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, describe: Describe, *,
    actions: Literal["label", "executed"] = "label", render: Render | None = None, progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write the successful episodes of LIBERO's tasks into ``target``, a folder per suite and a file per task.

    ``actions`` are those to imitate, or those that were executed: a script that plays the file again needs the latter, which have the
    disturbance of ``collect`` in them. Skipped and named are failures, episodes of other tasks, those that are not seen by a third-person
    and a wrist camera, and those whose frames are not all stored, unless ``render`` makes them. StoreError if ``target`` exists or nothing
    can be written; ConfigError if LIBERO is not installed.
    """
    skipped: list[tuple[str, str]] = []
    written: dict[Path, int] = {}  # file -> demonstrations in it
    chosen = [summary for summary in summaries if _goes(summary, skipped)]
    with new_folder(target) as folder:
        for view, frames in whole_episodes(store, chosen, skipped, render, progress):
            try:
                cameras, model = _cameras(view), describe(view)
            except StoreError as error:
                skipped.append((view.summary.name, str(error)))
                continue
            suite, task = _place(view.summary.task)
            file = folder / suite / f"{task}_demo.hdf5"
            file.parent.mkdir(exist_ok=True)
            with h5py.File(file, "a") as out:
                data = out.require_group("data")
                if file not in written:
                    data.attrs.update(_said(view, suite, task, model, cameras, frames[0]))
                _write(data.create_group(f"demo_{written.get(file, 0)}"), view, frames[1:], cameras, model, actions)
                data.attrs["num_demos"] = written[file] = written.get(file, 0) + 1
                data.attrs["total"] = int(data.attrs.get("total", 0)) + view.length
        if not written:
            raise nothing_to_write(skipped)
    return Exchanged(sum(written.values()), tuple(skipped))


def _goes(summary: EpisodeSummary, skipped: list[tuple[str, str]]) -> bool:
    """Whether the format has a place for the episode, by what the catalogue knows."""
    try:
        why = "" if libero_task(summary.task) else f"{summary.task} is no task of LIBERO: other tasks go out as --format cosmos-demos"
    except ConfigError as error:
        why = str(error)
    if not why and not summary.success:
        why = "it did not succeed, and every demonstration of this format does"
    if why:
        skipped.append((summary.name, why))
    return not why


def _place(task: str) -> tuple[str, str]:
    """Suite and LIBERO's name of the task."""
    found = libero_task(task)
    assert found is not None
    return found[0], libero_names(found[0])[found[1]]


def _cameras(view: EpisodeView) -> dict[str, int]:
    """Dataset -> index of its camera. StoreError unless there is one of either kind."""
    index_of = {third_person(camera): index for index, camera in enumerate(view.cameras)}
    if len(index_of) != 2 or len(view.cameras) != 2:
        raise StoreError(f"cameras {', '.join(view.cameras)}: the format needs a third-person and a wrist camera")
    return {"agentview_rgb": index_of[True], "eye_in_hand_rgb": index_of[False]}


def _said(view: EpisodeView, suite: str, task: str, model: LiberoModel, cameras: dict[str, int], images: list[bytes]) -> dict[str, str]:
    """The attributes that all demonstrations of a file share; ``images`` are of one step."""
    problem = model.environment.lower()
    bddl = f"libero/libero/bddl_files/{suite}/{task}.bddl"
    height, width = decode_jpeg(images[cameras["agentview_rgb"]]).shape[:2]
    arguments = {
        **model.arguments, "bddl_file_name": bddl, "has_renderer": False, "has_offscreen_renderer": True, "ignore_done": True,
        "use_camera_obs": True, "camera_depths": False, "camera_names": ["robot0_eye_in_hand", "agentview"], "reward_shaping": True,
        "camera_heights": height, "camera_widths": width, "camera_segmentations": None,
    }  # fmt: skip
    said = {"type": 1, "env_name": model.environment, "problem_name": problem, "bddl_file": bddl, "env_kwargs": arguments}
    return {
        "env_name": model.environment, "env_args": json.dumps(said), "bddl_file_name": bddl, "tag": TAG,
        "macros_image_convention": "opengl",
        "problem_info": json.dumps({"problem_name": problem, "domain_name": "robosuite", "language_instruction": view.instruction}),
        "bddl_file_content": (libero_folder() / "bddl_files" / suite / f"{task}.bddl").read_text(encoding="utf-8"),
    }  # fmt: skip


def _write(
    demo: h5py.Group, view: EpisodeView, frames: list[list[bytes]], cameras: dict[str, int], model: LiberoModel,
    actions: Literal["label", "executed"],
) -> None:  # fmt: skip
    observed = demo.create_group("obs")
    for name, index in cameras.items():
        column: h5py.Dataset | None = None
        for step, images in enumerate(frames):
            picture = decode_jpeg(images[index])[::-1]
            if column is None:
                column = observed.create_dataset(name, (len(frames), *picture.shape), np.uint8)
            column[step] = picture
    states, robot = view.column("state")[:, : model.width], view.column("proprio")[1:].astype(np.float64)
    orientations = rotation_vectors(robot[:, 5:9])
    for name, values in {
        "joint_states": states[1:, 1 : 1 + JOINTS], "gripper_states": robot[:, :2], "ee_pos": robot[:, 2:5], "ee_ori": orientations,
        "ee_states": np.hstack([robot[:, 2:5], orientations]),
    }.items():  # fmt: skip
        observed.create_dataset(name, data=values)
    end = (np.arange(view.length) == view.length - 1).astype(np.uint8)
    for name, values in {
        "actions": view.column("label" if actions == "label" else "action").astype(np.float64), "states": states[:-1],
        "robot_states": robot, "rewards": end, "dones": end,
    }.items():  # fmt: skip
        demo.create_dataset(name, data=values)
    demo.attrs.update({"num_samples": view.length, "init_state": states[0], "model_file": model.mjcf})
