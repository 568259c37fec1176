"""Demonstrations of LIBERO and robomimic: one HDF5 file per task with groups ``data/demo_0``, ``data/demo_1``, ...

These files hold ``T`` observations and ``T`` actions, so an episode here has the ``T - 1`` actions between the ``T`` observations,
and nothing is invented. Which actions those are depends on the file:

* robomimic, and LIBERO regenerated for cosmos-policy: observation ``i`` was seen before action ``i``. The last action is left out,
  since what it led to is not recorded.
* LIBERO as released: its script recorded the observation after action ``i``, but the simulator state before it. The first action
  is left out, and states and observations are put together again; the simulator state of the last observation is not recorded and
  is nan. Which of the two a demonstration is, its joint angles say: they are in the observations and in the states.

========================  =============================================================================================
pictures                  ``obs/<name>_rgb`` (LIBERO), ``obs/<name>_image`` (robomimic), or the same with ``_jpeg``, whose bytes
                          are kept as they are. Files that say ``macros_image_convention = opengl`` (LIBERO as released) are
                          upside down and are turned.
proprioception            ``robot_states``, or gripper, position and quaternion of the hand; LIBERO's axis-angle is converted
simulator state           ``states``
success                   a last reward of 1, robosuite's for a solved task, sparse or shaped; without rewards the last ``dones``
                          (which robomimic also sets where an episode merely ends); a file without either is of successes
========================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.exchanged import third_person
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.format.episode import Episode, EpisodeKey

_HAND = (("robot0_gripper_qpos", "gripper_states"), ("robot0_eef_pos", "ee_pos"))
_JOINTS = ("joint_states", "robot0_joint_pos")
_RENAMED = {"eye_in_hand": "robot0_eye_in_hand"}


def read_demonstrations(path: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """Every demonstration of the file, one at a time.

    ``task`` and ``instruction`` of the options default to what the file or its name says, ``flip`` to what its image convention asks
    for. StoreError for another kind of file.
    """
    with hdf5.opened(path) as file:
        data = hdf5.group(file, "data")
        task, instruction = _described(path, data, options.task, options.instruction)
        turn = hdf5.attribute(data, "macros_image_convention") == "opengl" if options.flip is None else options.flip
        names = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
        if not names:
            raise StoreError(f"{path} has no demonstration data/demo_0: it is not of LIBERO or robomimic")
        notes.total = len(names)
        for name in names:
            yield attempt(name, partial(_demonstration, path, data, name, task, instruction, turn))


def _demonstration(path: Path, data: h5py.Group, name: str, task: str, instruction: str, turn: bool) -> Episode:
    demo = hdf5.group(data, name)
    key = EpisodeKey(f"import:{path.stem}", task, "demo", int(name[5:]), initial_state=_beginning(demo))
    return _episode(demo, key, instruction, turn)


def _described(path: Path, data: h5py.Group, task: str, instruction: str) -> tuple[str, str]:
    """Task and instruction: as asked for, else as the file says, else from its name."""
    info = {}
    for name in ("env_args", "problem_info"):
        try:
            info[name] = json.loads(hdf5.attribute(data, name, "{}"))
        except (TypeError, ValueError, RecursionError):
            info[name] = {}
    stem = path.stem.removesuffix("_demo")
    words = re.sub(r"^.*SCENE\d+_", "", stem).replace("_", " ")
    said = info["problem_info"].get("language_instruction") if isinstance(info["problem_info"], dict) else None
    if isinstance(said, list):
        said = "".join(map(str, said))
    robosuite = info["env_args"].get("env_name") if isinstance(info["env_args"], dict) else None
    libero = "bddl_file_name" in data.attrs or said
    return task or (stem if libero or not isinstance(robosuite, str) else robosuite), instruction or str(said or words).strip('"')


def _episode(demo: h5py.Group, key: EpisodeKey, instruction: str, flip: bool) -> Episode:
    actions = hdf5.array(demo, "actions", np.float32, 2)
    steps = len(actions) - 1
    if steps < 1:
        raise StoreError(f"{demo.name} has {len(actions)} actions, at least two are needed")
    observed = hdf5.group(demo, "obs")
    frames = _frames(observed, flip, steps + 1)
    cameras = tuple(frames)
    proprio = _proprio(demo, observed)
    states = hdf5.array(demo, "states", np.float64, 2) if hdf5.has(demo, "states") else np.full((steps + 1, 1), np.nan)
    rewards = hdf5.array(demo, "rewards", np.float32, 1) if hdf5.has(demo, "rewards") else np.zeros(steps + 1, np.float32)
    lengths = {"proprio": len(proprio), "states": len(states), "rewards": len(rewards)}
    wrong = {name: length for name, length in lengths.items() if length != steps + 1}
    if wrong:
        raise StoreError(f"{demo.name} has {steps + 1} actions and {wrong} of others")
    info: dict[str, Any] = {"imported": Path(demo.file.filename).name}
    if _seen_after(observed, states):
        actions, rewards = actions[1:], rewards[1:]
        states = np.vstack([states[1:], np.full_like(states[:1], np.nan)])
        info["unrecorded_states"] = [steps]
    success = _succeeded(demo)
    actions, rewards = actions[:steps], rewards[:steps].copy()
    rewards[-1] = max(rewards[-1], float(success))  # the last recorded reward may belong to the action that is left out
    return Episode(
        key=key, instruction=instruction, cameras=cameras, success=success, episode_return=float(rewards.sum()), timed_out=not success,
        invalid="", policy_version=-1, actions=actions, labels=actions, rewards=rewards,
        proprio=proprio, states=states, step_versions=np.full(steps, -1), predicted_values=np.full(steps, np.nan),
        frames={t: [frames[camera][t] for camera in cameras] for t in range(steps + 1)}, info=info,
    )  # fmt: skip


def _beginning(demo: h5py.Group) -> str:
    """What the demonstration began in, so that files of one name (robomimic calls all of them image.hdf5) do not share keys."""
    name = "states" if hdf5.has(demo, "states") else "actions"
    return hashlib.sha256(hdf5.array(demo, name, np.float64, 2)[:1].tobytes()).hexdigest()[:16]


def _seen_after(observed: h5py.Group, states: np.ndarray) -> bool:
    """Whether observation ``i`` shows what action ``i`` led to, by its joint angles: those of state ``i`` or of state ``i + 1``.

    A flattened state is time, then positions, those of the robot's joints first. The observation lags behind by a simulator step,
    so neither is met exactly. False where this cannot be told.
    """
    name = next((name for name in _JOINTS if hdf5.has(observed, name)), None)
    joints = hdf5.array(observed, name, np.float64, 2) if name else np.empty((0, 0))
    if joints.shape[0] != len(states) or states.shape[1] < 1 + joints.shape[1] or len(states) < 3:
        return False
    recorded = states[1:, 1 : 1 + joints.shape[1]]
    return bool(np.abs(joints[:-1] - recorded).mean() < 0.5 * np.abs(joints[1:] - recorded).mean())


def _frames(observed: h5py.Group, flip: bool, rows: int) -> dict[str, list[bytes]]:
    """JPEGs by camera, those of the hand first. StoreError if there are none."""
    names = {name.removesuffix("_jpeg") for name in observed if re.search(r"_(rgb|image)(_jpeg)?$", name)}
    cameras = {_RENAMED.get(short := re.sub(r"_(rgb|image)$", "", name), short): name for name in sorted(names)}
    ordered = sorted(cameras, key=lambda camera: (third_person(camera), camera))
    if not ordered:
        raise StoreError(f"{observed.name} has no pictures (datasets named ..._rgb or ..._image)")
    read = ((camera, hdf5.images(observed, cameras[camera], flip, rows)) for camera in ordered)
    return {camera: jpegs for camera, jpegs in read if jpegs is not None}


def _proprio(demo: h5py.Group, observed: h5py.Group) -> np.ndarray:
    """(T, 9) float32: gripper joints, hand position in metres, hand quaternion (x, y, z, w)."""
    if hdf5.has(demo, "robot_states"):
        return hdf5.array(demo, "robot_states", np.float32, 2)
    parts = [hdf5.array(observed, next((n for n in names if hdf5.has(observed, n)), names[0]), np.float32, 2) for names in _HAND]
    if hdf5.has(observed, "robot0_eef_quat"):
        return np.hstack([*parts, hdf5.array(observed, "robot0_eef_quat", np.float32, 2)])
    return np.hstack([*parts, quaternions(hdf5.array(observed, "ee_ori", np.float64, 2))])


def quaternions(rotations: np.ndarray) -> np.ndarray:
    """(n, 4) float32 quaternions (x, y, z, w) of (n, 3) axis-angle vectors in radians. StoreError for another shape."""
    if rotations.ndim != 2 or rotations.shape[1] != 3:
        raise StoreError(f"orientations of shape {rotations.shape} are no axis-angle vectors")
    angle = np.linalg.norm(rotations, axis=1, keepdims=True)
    axis = np.divide(rotations, angle, out=np.zeros_like(rotations), where=angle > 0)
    return np.hstack([axis * np.sin(angle / 2), np.cos(angle / 2)]).astype(np.float32)


def _succeeded(demo: h5py.Group) -> bool:
    for name in ("rewards", "dones"):
        if hdf5.has(demo, name):
            return bool(hdf5.array(demo, name, np.float64, 1)[-1] > 1 - 1e-6)
    return True
