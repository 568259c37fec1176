"""Rollouts as the public cosmos-policy code writes and reads them: one HDF5 file per episode.

``{primary,secondary,wrist}_images_jpeg`` (JPEG bytes per step) or the same without ``_jpeg`` (pixels), ``proprio`` (T, 9), ``actions``
(T, 7), attributes ``success`` and ``task_description``. There are ``T`` observations and ``T`` actions; the state after the last action is
not part of the format. So an export leaves out the last state, and an import repeats the last observation in its place, marked
(``LAST_STATE_REPEATED``): then every window is that of the public loader.

Cameras get the names of demonstrations: LIBERO's, or, where there is a secondary view, RoboCasa's. A file of ours names them itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, whole_episodes
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.exchange.robomimic import REPEATED_NOTE, ROBOCASA_ACTIONS, ROBOCASA_NOTE
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED, Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

#: The format's name of a view, and the camera it is of. Wrist first, as in a latent sequence.
LIBERO = {"wrist": "robot0_eye_in_hand", "primary": "agentview"}
ROBOCASA = {"wrist": "robot0_eye_in_hand", "primary": "robot0_agentview_left", "secondary": "robot0_agentview_right"}
THIRD_PERSON = ("primary", "secondary")


def read_rollouts(path: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """The episode of a file, or of each file of a folder. StoreError if there is no file at all."""
    files = hdf5.files_of(path)
    notes.total += len(files)
    for file in files:
        yield attempt(str(file), partial(_read, file, options, notes))


def export_rollouts(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, suite: str = "", render: Render | None = None,
    progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write each episode as a file of the new folder ``target``, stored JPEGs taken over as they are.

    ``suite`` goes into the file names, by default the task; the trainer's option to take successes as demonstrations wants one of
    ``libero_spatial``, ``libero_object``, ``libero_goal``, ``libero_10``. Episodes whose frames are not all stored are skipped and
    named, unless ``render`` makes them; so are those without a camera of either kind, which the trainer cannot read, and with more than
    it knows. StoreError if ``target`` exists.
    """
    skipped: list[tuple[str, str]] = []
    count = 0
    with new_folder(target) as folder:
        for view, frames in whole_episodes(store, summaries, skipped, render, progress):
            s = view.summary
            wrists = sum(not third_person(camera) for camera in view.cameras)
            if wrists != 1 or not 1 <= len(view.cameras) - wrists <= len(THIRD_PERSON):
                skipped.append((s.name, f"cameras {', '.join(view.cameras)}: the format needs a third-person and a wrist camera, and has "
                                "room for one more third-person one; two wrist cameras go out as --format aloha"))
                continue
            if len(view.instructions) > 1:
                skipped.append((s.name, f"it has {len(view.instructions)} instructions, and a file of this format one"))
                continue
            of = re.sub(r"[^A-Za-z0-9_]", "_", suite or s.task)[:80]
            name = f"episode_data--suite={of}--ep={s.key.seed}--success={s.success}--{s.name}.hdf5"
            _write(folder / name, view, frames[:-1])
            count += 1
        if not count:
            raise nothing_to_write(skipped)
    return Exchanged(count, tuple(skipped))


def _read(file: Path, options: ImportOptions, notes: Notes) -> Episode:
    with hdf5.opened(file) as source:
        hdf5.check_format(source, "cosmos")
        actions = hdf5.array(source, "actions", np.float32, 2)
        steps = len(actions)
        if not steps:
            raise StoreError(f"{file} has no action")
        proprio = hdf5.array(source, "proprio", np.float32, 2)
        if len(proprio) != steps:
            raise StoreError(f"{file} has {steps} actions and {len(proprio)} rows of proprio")
        found = _pictures(source, bool(options.flip), steps)
        if not found:
            raise StoreError(f"{file} has no pictures (primary_images, wrist_images, with or without _jpeg)")
        success = _success(file, hdf5.attribute(source, "success"))
        score = _score(file, success, hdf5.attribute(source, "success_score"))
        instruction = options.instruction or str(hdf5.attribute(source, "task_description", ""))
        known = {"actions", "proprio"} | {f"{view}_images{ending}" for view in ROBOCASA for ending in ("", "_jpeg")}
        if unread := sorted(set(source) - known):
            notes.say(f"not read: {', '.join(unread)}")
    if not instruction.strip():
        raise StoreError(f"{file} does not say what the robot was asked to do (attribute task_description): give --instruction TEXT")
    if actions.shape[1] == ROBOCASA_ACTIONS[0] and ROBOCASA["secondary"] in found:
        actions = np.ascontiguousarray(actions[:, : ROBOCASA_ACTIONS[1]])
        notes.say(ROBOCASA_NOTE)
    notes.say(f"pictures are {'turned upside down: --flip yes' if options.flip else 'taken as upright: cosmos-policy writes them so'}")
    notes.say(REPEATED_NOTE)
    said = dict(re.findall(r"--(suite|task|ep)=([^-]+)", f"--{file.stem}"))
    task = options.task or "_".join(said[name] for name in ("suite", "task") if name in said) or re.sub(r"\W+", "_", instruction)
    key = EpisodeKey(f"import:{file.stem}", task, options.source or "rollout", int(said["ep"]) if said.get("ep", "").isdecimal() else 0,
                     initial_state=hashlib.sha256(proprio.tobytes() + actions.tobytes()).hexdigest()[:16])
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = float(success)
    frames = {t: [images[min(t, steps - 1)] for images in found.values()] for t in range(steps + 1)}
    return Episode(
        key=key, instruction=instruction, cameras=tuple(found), success=success, episode_return=float(success), timed_out=not success,
        invalid="", policy_version=options.policy_version, actions=actions, labels=actions, rewards=rewards,
        proprio=np.vstack([proprio, proprio[-1:]]), states=np.full((steps + 1, 1), np.nan),
        step_versions=np.full(steps, options.policy_version), predicted_values=np.full(steps, np.nan), frames=frames,
        info={"imported": file.name, LAST_STATE_REPEATED: True}, score=score,
    )  # fmt: skip


def _pictures(source: h5py.File, flip: bool, steps: int) -> dict[str, list[bytes]]:
    """Camera -> the JPEGs of its view."""
    views = ROBOCASA if any(hdf5.has(source, f"secondary_images{ending}") for ending in ("", "_jpeg")) else LIBERO
    found: dict[str, list[bytes]] = {}
    for view, camera in views.items():
        jpegs = hdf5.images(source, f"{view}_images", flip, steps)
        if jpegs is not None:
            named = hdf5.dataset_attribute(source, f"{view}_images_jpeg", "camera")
            found[named if isinstance(named, str) and re.fullmatch(r"[\w.-]{1,80}", named) and named not in found else camera] = jpegs
    return found


def _score(file: Path, success: bool, said: object) -> float | None:
    """How far the episode got; None where that says no more than its success. StoreError unless it is within [0, 1]."""
    if said is None:
        return None
    if not isinstance(said, int | float) or not 0.0 <= said <= 1.0:
        raise StoreError(f"{file} has attribute success_score = {said!r}, which is not within 0 and 1")
    return None if said == float(success) else float(said)


def _success(file: Path, said: object) -> bool:
    """By the attribute and the file's name, of which old files have only one. StoreError if they differ or neither says it."""
    named = re.search(r"--success=(True|False)(?=--|$)", file.stem)
    claims = {named[1] == "True"} if named else set()
    if said is not None:
        if not isinstance(said, int) or said not in (0, 1):
            raise StoreError(f"{file} has attribute success = {said!r}, which is neither true nor false")
        claims.add(bool(said))
    if len(claims) != 1:
        raise StoreError(f"{file} " + ("says otherwise in its name than inside" if claims else "does not say") + " whether it succeeded")
    return claims.pop()


def _write(file: Path, view: EpisodeView, frames: list[list[bytes]]) -> None:
    views = iter(THIRD_PERSON)
    names = {camera: next(views) if third_person(camera) else "wrist" for camera in view.cameras}
    with h5py.File(file, "w") as target:
        for index, camera in enumerate(view.cameras):
            column = target.create_dataset(f"{names[camera]}_images_jpeg", (len(frames),), dtype=h5py.vlen_dtype(np.dtype(np.uint8)))
            column.attrs["camera"] = camera
            for t, images in enumerate(frames):
                column[t] = np.frombuffer(images[index], np.uint8)
        target.create_dataset("proprio", data=view.column("proprio")[:-1])
        target.create_dataset("actions", data=view.column("action"))
        target.attrs["success"] = view.summary.success
        target.attrs["success_score"] = view.summary.score
        target.attrs["task_description"] = view.instruction
