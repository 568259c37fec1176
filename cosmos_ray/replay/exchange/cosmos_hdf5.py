"""Rollouts as the public cosmos-policy code writes and reads them: one HDF5 file per episode.

``{primary,secondary,wrist}_images_jpeg`` (JPEG bytes per step) or the same without ``_jpeg`` (pixels), ``proprio`` (T, 9), ``actions``
(T, 7), attributes ``success`` and ``task_description``. There are ``T`` observations and ``T`` actions; the state after the last action is
not part of the format. So an export leaves out the last state, and an import the last action.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, third_person, whole_episodes
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.format.episode import Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

#: The format's name of a view, and the camera it is of here. Wrist first, as in a latent sequence.
VIEWS = {"wrist": "robot0_eye_in_hand", "primary": "agentview", "secondary": "secondary"}
THIRD_PERSON = ("primary", "secondary")


def read_rollouts(path: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """The episode of a file, or of each file of a folder. StoreError if there is no file at all."""
    files = sorted(path.rglob("*.hdf5")) if path.is_dir() else [path]
    if not files:
        raise StoreError(f"there is no .hdf5 file to import in {path}: give files, or a folder that has some")
    notes.total = len(files)
    for file in files:
        yield attempt(str(file), partial(_read, file, options.policy_version))


def export_rollouts(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, suite: str = "", render: Render | None = None,
    progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write each episode as a file of the new folder ``target``, stored JPEGs taken over as they are.

    ``suite`` goes into the file names, by default the task; the trainer's option to take successes as demonstrations wants one of
    ``libero_spatial``, ``libero_object``, ``libero_goal``, ``libero_10``. Episodes whose frames are not all stored are skipped and
    named, unless ``render`` makes them; so are those without a camera of either kind, which the trainer cannot read. StoreError if
    ``target`` exists.
    """
    skipped: list[tuple[str, str]] = []
    count = 0
    with new_folder(target) as folder:
        for view, frames in whole_episodes(store, summaries, skipped, render, progress):
            s = view.summary
            if len({third_person(camera) for camera in view.cameras}) != 2:
                skipped.append((s.name, f"cameras {', '.join(view.cameras)}: the format needs a third-person and a wrist camera"))
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


def _read(file: Path, policy_version: int) -> Episode:
    with hdf5.opened(file) as source:
        actions = hdf5.array(source, "actions", np.float32, 2)
        steps = len(actions) - 1
        if steps < 1:
            raise StoreError(f"{file} has {len(actions)} actions, at least two are needed")
        proprio = hdf5.array(source, "proprio", np.float32, 2)
        read = {camera: hdf5.images(source, f"{view}_images", False, steps + 1) for view, camera in VIEWS.items()}
        found = {camera: images for camera, images in read.items() if images is not None}
        if not found:
            raise StoreError(f"{file} has no pictures (primary_images, wrist_images, with or without _jpeg)")
        if len(proprio) != steps + 1:
            raise StoreError(f"{file} has {steps + 1} actions and {len(proprio)} rows of proprio")
        success = _success(file, hdf5.attribute(source, "success"))
        instruction = str(hdf5.attribute(source, "task_description", ""))
    said = dict(re.findall(r"--(suite|task|ep)=([^-]+)", f"--{file.stem}"))
    task = "_".join(said[name] for name in ("suite", "task") if name in said) or re.sub(r"\W+", "_", instruction) or "cosmos"
    key = EpisodeKey(f"import:{file.stem}", task, "rollout", int(said["ep"]) if said.get("ep", "").isdecimal() else 0,
                     initial_state=hashlib.sha256(proprio.tobytes() + actions.tobytes()).hexdigest()[:16])
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = float(success)
    return Episode(
        key=key, instruction=instruction, cameras=tuple(found), success=success, episode_return=float(success), timed_out=not success,
        invalid="", policy_version=policy_version, actions=actions[:steps], labels=actions[:steps],
        rewards=rewards, proprio=proprio, states=np.full((steps + 1, 1), np.nan), step_versions=np.full(steps, policy_version),
        predicted_values=np.full(steps, np.nan), frames={t: [images[t] for images in found.values()] for t in range(steps + 1)},
        info={"imported": file.name},
    )  # fmt: skip


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
    cameras = [c for c in view.cameras if not third_person(c)][:1], [c for c in view.cameras if third_person(c)][: len(THIRD_PERSON)]
    names = {**{c: "wrist" for c in cameras[0]}, **dict(zip(cameras[1], THIRD_PERSON, strict=False))}
    with h5py.File(file, "w") as target:
        for index, camera in enumerate(view.cameras):
            if camera in names:
                column = target.create_dataset(f"{names[camera]}_images_jpeg", (len(frames),), dtype=h5py.vlen_dtype(np.dtype(np.uint8)))
                for t, images in enumerate(frames):
                    column[t] = np.frombuffer(images[index], np.uint8)
        target.create_dataset("proprio", data=view.column("proprio")[:-1])
        target.create_dataset("actions", data=view.column("action"))
        target.attrs["success"] = view.summary.success
        target.attrs["success_score"] = view.summary.score
        target.attrs["task_description"] = view.instruction
