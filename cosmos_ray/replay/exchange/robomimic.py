"""Demonstrations of LIBERO, robomimic, RoboCasa and robosuite: HDF5 files with groups ``data/demo_0``, ``data/demo_1``, ...

These files hold ``T`` observations and ``T`` actions. What the last action led to is in few of them:

* robomimic, RoboCasa, and LIBERO regenerated for cosmos-policy: observation ``i`` was seen before action ``i``. The state after the last
  action is ``next_obs`` where the file has that, else row ``T`` repeats the last observation and is marked so (``LAST_STATE_REPEATED``):
  then every window is that of the public cosmos-policy loader.
* LIBERO as released: its script recorded the observation after action ``i``, but the simulator state before it. The first action is left
  out, since what it was chosen on is not recorded, and states and observations are put together again; the simulator state of the last
  observation is not recorded and is nan. Which of the two a demonstration is, its joint angles say: they are in the observations and in
  the states.

========================  =============================================================================================
pictures                  ``obs/<name>_rgb`` (LIBERO), ``obs/<name>_image`` (robomimic), or the same with ``_jpeg``, whose bytes
                          are kept as they are; where there are none, the states are rendered on request
proprioception            ``robot_states``, or gripper, position and quaternion of each hand
actions                   ``actions``; of RoboCasa's 12 numbers the first 7 (arm and gripper), as the public code does
simulator state           ``states``
success                   a last reward of 1, robosuite's for a solved task, sparse or shaped; without rewards the last ``dones``
                          (which robomimic also sets where an episode merely ends); a file without either is of successes
========================  =============================================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.env_args import rate_of, recorded_environment, robots_of
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.exchange.instruction import environment_of, instruction_of, table_of
from cosmos_ray.replay.exchange.observations import Observations
from cosmos_ray.replay.exchange.recorded_states import RecordedStates
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED, Episode, EpisodeKey

_NAME = re.compile(r"(?:demo|episode|ep|traj)_?(\d{1,18})")
_KNOWN = {"actions", "obs", "next_obs", "states", "rewards", "dones", "robot_states"}

ROBOCASA_ACTIONS = 12, 7  #: numbers per action in RoboCasa's files, and those of arm and gripper, which come first
ROBOCASA_NOTE = ("of 12 numbers per action the first 7, arm and gripper, are kept: the others move RoboCasa's base, which the policy does "
                 "not use")
REPEATED_NOTE = "the state after the last action is not recorded: the last observation stands for it, as in the public cosmos-policy loader"
_MOST_NAMED = 12


def read_demonstrations(path: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """Every demonstration of the file, or of each file of a folder, one at a time. StoreError for another kind of file."""
    files = hdf5.files_of(path)
    for file in files:
        try:
            yield from _File(file, options, notes).episodes(f"{file.relative_to(path)} " if path.is_dir() else "")
        except StoreError as error:
            if len(files) == 1:
                raise
            yield Skip(str(file), str(error))


class _Seen(NamedTuple):
    """What the states of an episode look like."""

    cameras: tuple[str, ...]
    frames: list[list[bytes]]  # [state][camera]
    proprio: np.ndarray  # (states, p) float32
    end: Literal["after", "recorded", "repeated"]  # seen after the actions; with the state after the last action; with its repetition


class _File:
    """One file while it is read."""

    def __init__(self, path: Path, options: ImportOptions, notes: Notes) -> None:
        self.path, self.options, self.notes = path, options, notes
        self.unread: set[str] = set()

    def episodes(self, prefix: str) -> Iterator[Episode | Skip]:
        """The demonstrations by their numbers; ``prefix`` goes before their names in messages."""
        with hdf5.opened(self.path) as file:
            hdf5.check_format(file, "robomimic")
            data = hdf5.group(file, "data")
            self.unread |= {name for name in file if name not in ("data", "mask")}
            self.unread |= {f"data/{name}" for name in data if not _NAME.fullmatch(name)}
            names = self._chosen(file, sorted((name for name in data if _NAME.fullmatch(name)), key=_number))
            if not names:
                raise StoreError(f"{self.path} has no demonstration data/demo_0: it is not of LIBERO, robomimic, RoboCasa or robosuite")
            self.notes.total += len(names)
            for name in names:
                yield attempt(f"{prefix}{name}", partial(self._episode, data, name))
        if self.unread:
            more = f" and {len(self.unread) - _MOST_NAMED} more" if len(self.unread) > _MOST_NAMED else ""
            self.notes.say(f"not read: {', '.join(sorted(self.unread)[:_MOST_NAMED])}{more}")

    def _chosen(self, file: h5py.File, names: list[str]) -> list[str]:
        """Of the demonstrations those of the filter that was asked for. StoreError if the file does not have it."""
        masks = sorted(hdf5.group(file, "mask")) if hdf5.is_group(file, "mask") else []
        if self.options.filter:
            if self.options.filter not in masks:
                raise StoreError(f"{self.path} has no filter {self.options.filter!r} (--filter): it has {', '.join(masks) or 'none'}")
            wanted = set(hdf5.names(hdf5.group(file, "mask"), self.options.filter))
            if not (chosen := [name for name in names if name in wanted]):
                raise StoreError(f"{self.path}: filter {self.options.filter!r} (--filter) names no demonstration that the file has")
            return chosen
        if masks:
            self.notes.say(f"all demonstrations are taken; --filter takes those of one of the file's filters: {', '.join(masks)}")
        return names

    def _episode(self, data: h5py.Group, name: str) -> Episode:
        demo = hdf5.group(data, name)
        actions = self._actions(demo)
        steps = len(actions)
        if not steps:
            raise StoreError(f"{demo.name} has no action")
        states = hdf5.array(demo, "states", np.float64, 2) if hdf5.has(demo, "states") else np.full((steps, 1), np.nan)
        rewards = hdf5.array(demo, "rewards", np.float32, 1) if hdf5.has(demo, "rewards") else np.zeros(steps, np.float32)
        _agree(demo, steps, states=states, rewards=rewards)
        instruction, where = self.options.instruction, "--instruction"
        if not instruction:
            instruction, where = instruction_of(self.path, data, demo)
        seen = self._seen(data, demo, states, steps)
        info: dict[str, Any] = {"imported": self.path.name, **rate_of(data), **recorded_environment(data)}
        unknown = np.full_like(states[:1], np.nan)
        if seen.end == "after":
            actions, rewards, states = actions[1:], rewards[1:], np.vstack([states[1:], unknown])
            info["unrecorded_states"] = [steps - 1]
        elif seen.end == "recorded":
            states = np.vstack([states, unknown])
            info["unrecorded_states"] = [steps]
        else:
            states = np.vstack([states, states[-1:]])
            info[LAST_STATE_REPEATED] = True
        steps, success, rewards = len(actions), _succeeded(demo), rewards.copy()
        rewards[-1] = max(rewards[-1], float(success))
        self.notes.say(f"instruction taken from {where}")
        if not success:
            self.notes.say("demonstrations that did not succeed, by their last reward or done, are stored and never trained on")
        task = self.options.task or _task(self.path, data, where, instruction)
        return Episode(
            key=EpisodeKey(f"import:{self.path.stem}", task, "demo", _number(name), initial_state=_beginning(demo)),
            instruction=instruction, cameras=seen.cameras, success=success, episode_return=float(rewards.sum()), timed_out=not success,
            invalid="", policy_version=-1, actions=actions, labels=actions, rewards=rewards, proprio=seen.proprio, states=states,
            step_versions=np.full(steps, -1), predicted_values=np.full(steps, np.nan), frames=dict(enumerate(seen.frames)), info=info,
        )  # fmt: skip

    def _actions(self, demo: h5py.Group) -> np.ndarray:
        """(T, d) float32; of RoboCasa without the numbers of its mobile base."""
        actions = hdf5.array(demo, "actions", np.float32, 2)
        self.unread |= {f"data/*/{name}" for name in demo if name not in _KNOWN}
        if actions.shape[1] == ROBOCASA_ACTIONS[0] and _of_robocasa(demo):
            self.notes.say(ROBOCASA_NOTE)
            return np.ascontiguousarray(actions[:, : ROBOCASA_ACTIONS[1]])
        return actions

    def _seen(self, data: h5py.Group, demo: h5py.Group, states: np.ndarray, steps: int) -> _Seen:
        observed = Observations(hdf5.group(demo, "obs")) if hdf5.has(demo, "obs") else None
        if observed is None or not observed.cameras:
            return self._repeated(*self._rendered(data, demo, states))
        flip = self._turned(data, observed)
        frames = observed.frames(flip, steps)
        own = hdf5.has(demo, "robot_states")
        proprio = hdf5.array(demo, "robot_states", np.float32, 2) if own else observed.proprio()
        _agree(demo, steps, proprio=proprio)
        after = _seen_after(observed.joints(), states)
        self.unread |= {f"obs/{name}" for name in observed.group if name not in observed.read and name not in observed.uncoloured}
        if observed.uncoloured:
            self.notes.say(f"left out {', '.join(observed.uncoloured)}: the policy sees colour pictures")
        if after:
            self.notes.say("observations were recorded after their actions (LIBERO as released): the first action is left out")
            return _Seen(observed.cameras, frames, proprio, "after")
        following = Observations(hdf5.group(demo, "next_obs")) if hdf5.has(demo, "next_obs") and not own else None
        if following is None or following.cameras != observed.cameras:
            return self._repeated(observed.cameras, frames, proprio)
        last = following.frames(flip, steps, [steps - 1])
        return _Seen(observed.cameras, frames + last, np.vstack([proprio, following.proprio()[-1:]]), "recorded")

    def _repeated(self, cameras: tuple[str, ...], frames: list[list[bytes]], proprio: np.ndarray) -> _Seen:
        self.notes.say(REPEATED_NOTE)
        return _Seen(cameras, [*frames, frames[-1]], np.vstack([proprio, proprio[-1:]]), "repeated")

    def _rendered(self, data: h5py.Group, demo: h5py.Group, states: np.ndarray) -> tuple[tuple[str, ...], list[list[bytes]], np.ndarray]:
        if not hdf5.has(demo, "states"):
            raise StoreError(f"{demo.name} has no pictures (datasets obs/..._rgb or obs/..._image) and no states to make them from")
        if self.options.render is None:
            raise StoreError(f"{demo.name} has simulator states and no pictures: --render makes them with the simulator of this package")
        recorded = RecordedStates(f"{self.path.name}:{demo.name}", environment_of(data), robots_of(data),
                                  str(hdf5.attribute(demo, "model_file", "")), states)
        made = self.options.render(recorded)
        self.notes.say("pictures and proprioception are rendered from the simulator states" + (f"; {made.note}" if made.note else ""))
        return made.cameras, made.frames, made.proprio

    def _turned(self, data: h5py.Group, observed: Observations) -> bool:
        """Whether the pictures must be turned upside down; says which it is and why."""
        convention = hdf5.attribute(data, "macros_image_convention")
        if self.options.flip is not None:
            flip, why = self.options.flip, f"--flip {'yes' if self.options.flip else 'no'}"
        elif convention in ("opengl", "opencv"):
            flip, why = convention == "opengl", f"the file's macros_image_convention is {convention}"
        else:
            libero = any(name.endswith("_rgb") for name in observed.datasets.values())
            whose = "files that cosmos-policy regenerated are (those of openvla are not: --flip yes)" if libero else (
                "robomimic and RoboCasa write them (raw pictures of robosuite are not: --flip yes)")  # fmt: skip
            flip, why = False, f"the file does not say, and {whose}"
        self.notes.say(f"pictures are {'turned upside down' if flip else 'taken as upright'}: {why}")
        return flip


def _agree(demo: h5py.Group, steps: int, **arrays: np.ndarray) -> None:
    """StoreError unless every array has a row per action."""
    wrong = {name: len(array) for name, array in arrays.items() if len(array) != steps}
    if wrong:
        raise StoreError(f"{demo.name} has {steps} actions and {wrong} of others")


def _number(name: str) -> int:
    return int(re.sub(r"\D", "", name))


def _task(path: Path, data: h5py.Group, where: str, instruction: str) -> str:
    """The name of the task: the environment's; LIBERO has one for all of its tasks, and a file per task; else that of the instruction."""
    environment = environment_of(data)
    libero = environment.startswith("Libero") or "bddl_file_name" in data.attrs or bool(table_of(data, "problem_info"))
    libero = libero or path.stem.endswith("_demo")
    if environment and not libero:
        return environment
    if libero or where == "--instruction":
        return path.stem.removesuffix("_demo")
    return re.sub(r"\W+", "_", instruction)


def _of_robocasa(demo: h5py.Group) -> bool:
    """By its cameras, or by what a demonstration says of itself, which only RoboCasa's do."""
    cameras = hdf5.group(demo, "obs") if hdf5.has(demo, "obs") else ()
    return "ep_meta" in demo.attrs or any(name.startswith("robot0_agentview_") for name in cameras)


def _beginning(demo: h5py.Group) -> str:
    """What the demonstration began in, so that files of one name (robomimic calls all of them image.hdf5) do not share keys."""
    name = "states" if hdf5.has(demo, "states") else "actions"
    return hashlib.sha256(hdf5.array(demo, name, np.float64, 2)[:1].tobytes()).hexdigest()[:16]


def _seen_after(joints: np.ndarray, states: np.ndarray) -> bool:
    """Whether observation ``i`` shows what action ``i`` led to, by its joint angles: those of state ``i`` or of state ``i + 1``.

    A flattened state is time, then positions, those of the robot's joints first. The observation lags behind by a simulator step,
    so neither is met exactly. False where this cannot be told.
    """
    if joints.shape[0] != len(states) or states.shape[1] < 1 + joints.shape[1] or len(states) < 3:
        return False
    recorded = states[1:, 1 : 1 + joints.shape[1]]
    return bool(np.abs(joints[:-1] - recorded).mean() < 0.5 * np.abs(joints[1:] - recorded).mean())


def _succeeded(demo: h5py.Group) -> bool:
    for name in ("rewards", "dones"):
        if hdf5.has(demo, name):
            return bool(hdf5.array(demo, name, np.float64, 1)[-1] > 1 - 1e-6)
    return True
