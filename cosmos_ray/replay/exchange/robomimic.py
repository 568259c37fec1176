"""Demonstrations of LIBERO and robomimic: one HDF5 file per task with groups ``data/demo_0``, ``data/demo_1``, ...

These files hold ``T`` observations and ``T`` actions: what the last action led to is not recorded. So an episode here has the
first ``T - 1`` actions between the ``T`` recorded states, and nothing is invented.

========================  =============================================================================================
pictures                  ``obs/<name>_rgb`` (LIBERO), ``obs/<name>_image`` (robomimic), or the same with ``_jpeg``, whose bytes
                          are kept as they are. Files that say ``macros_image_convention = opengl`` (LIBERO as released) are
                          upside down and are turned.
proprioception            ``robot_states``, or gripper, position and quaternion of the hand; LIBERO's axis-angle is converted
simulator state           ``states``
success                   the last ``dones`` or a positive last ``rewards``; a file without either is of successes
========================  =============================================================================================
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.episode import Episode, EpisodeKey
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, third_person
from cosmos_ray.replay.store import ReplayStore

_HAND = (("robot0_gripper_qpos", "gripper_states"), ("robot0_eef_pos", "ee_pos"))
_RENAMED = {"eye_in_hand": "robot0_eye_in_hand"}


def import_demonstrations(
    path: str | Path, store: ReplayStore, *, task: str = "", instruction: str = "", flip: bool | None = None,
    progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Commit every demonstration of the file, one at a time; importing again finds them known.

    ``task`` and ``instruction`` default to what the file or its name says, ``flip`` (turn the pictures upside down) to what
    its image convention asks for. A demonstration that cannot be read is skipped and named. StoreError for another kind of file.
    """
    path = Path(path)
    done = known = 0
    skipped: list[tuple[str, str]] = []
    with hdf5.opened(path) as file:
        data = hdf5.group(file, "data")
        task, instruction = _described(path, data, task, instruction)
        turn = hdf5.attribute(data, "macros_image_convention") == "opengl" if flip is None else flip
        names = sorted((name for name in data if re.fullmatch(r"demo_\d+", name)), key=lambda name: int(name[5:]))
        if not names:
            raise StoreError(f"{path} has no demonstration data/demo_0: it is not of LIBERO or robomimic")
        for number, name in enumerate(names):
            try:
                key = EpisodeKey(f"import:{path.stem}", task, "demo", int(name[5:]))
                episode = _episode(hdf5.group(data, name), key, instruction, turn)
            except (StoreError, KeyError, RuntimeError, ValueError, OSError) as error:
                skipped.append((name, str(error).partition("\n")[0]))
            else:
                known += not store.commit(episode)
                done += 1
            if progress:
                progress(number + 1, len(names))
    return Exchanged(done, known, tuple(skipped))


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
    frames = _frames(observed, flip)
    cameras = tuple(frames)
    proprio = _proprio(demo, observed)
    states = hdf5.array(demo, "states", np.float64, 2) if "states" in demo else np.full((steps + 1, 1), np.nan)
    lengths = {"proprio": len(proprio), "states": len(states), **{camera: len(images) for camera, images in frames.items()}}
    wrong = {name: length for name, length in lengths.items() if length != steps + 1}
    if wrong:
        raise StoreError(f"{demo.name} has {steps + 1} actions and {wrong} of others")
    rewards = hdf5.array(demo, "rewards", np.float32, 1)[:steps] if "rewards" in demo else np.zeros(steps, np.float32)
    success = _succeeded(demo)
    rewards[-1] = max(rewards[-1], float(success))  # the last recorded reward belongs to the action that is left out
    return Episode(
        key=key, instruction=instruction, cameras=cameras, success=success, episode_return=float(rewards.sum()), timed_out=not success,
        invalid="", policy_version=-1, actions=actions[:steps], labels=actions[:steps], rewards=rewards,
        proprio=proprio, states=states, step_versions=np.full(steps, -1), predicted_values=np.full(steps, np.nan),
        frames={t: [frames[camera][t] for camera in cameras] for t in range(steps + 1)}, info={"imported": Path(demo.file.filename).name},
    )  # fmt: skip


def _frames(observed: h5py.Group, flip: bool) -> dict[str, list[bytes]]:
    """JPEGs by camera, those of the hand first. StoreError if there are none."""
    names = {name.removesuffix("_jpeg") for name in observed if re.search(r"_(rgb|image)(_jpeg)?$", name)}
    cameras = {_RENAMED.get(short := re.sub(r"_(rgb|image)$", "", name), short): name for name in sorted(names)}
    ordered = sorted(cameras, key=lambda camera: (third_person(camera), camera))
    if not ordered:
        raise StoreError(f"{observed.name} has no pictures (datasets named ..._rgb or ..._image)")
    return {camera: hdf5.images(observed, cameras[camera], flip) for camera in ordered}


def _proprio(demo: h5py.Group, observed: h5py.Group) -> np.ndarray:
    """(T, 9) float32: gripper joints, hand position in metres, hand quaternion (x, y, z, w)."""
    if "robot_states" in demo:
        return hdf5.array(demo, "robot_states", np.float32, 2)
    parts = [hdf5.array(observed, next((n for n in names if n in observed), names[0]), np.float32, 2) for names in _HAND]
    if "robot0_eef_quat" in observed:
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
    ends = [float(hdf5.array(demo, name, np.float64, 1)[-1]) > 0 for name in ("dones", "rewards") if name in demo]
    return any(ends) if ends else True
