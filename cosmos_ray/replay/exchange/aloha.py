"""Episodes of ALOHA as the public cosmos-policy code prepares, records and reads them: one HDF5 file per episode.

``action`` (T, 14) and ``observations/qpos`` (T, 14), and pictures in one of three places:

================================================  =======================================================================
``observations/video_paths/cam_high``, ...        names of mp4 files beside the file (prepared demonstrations, rollouts)
``observations/images/cam_high``, ...             (T, H, W, 3) pixels
``{primary,wrist_left,wrist_right}_images_jpeg``  JPEG bytes per step (rollouts)
================================================  =======================================================================

A file with the attribute ``success`` is a rollout; ``success_score`` is its partial credit. Others are demonstrations. There are ``T``
observations and ``T`` actions, so the last observation stands for the state after the last action (``LAST_STATE_REPEATED``): then every
window is that of the public loader. Its loader takes the instruction of a demonstration from the name of the folder two above the file,
of six tasks that it knows.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import h5py
import numpy as np

from cosmos_ray.embodiment import third_person
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, whole_episodes
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.exchange.robomimic import REPEATED_NOTE
from cosmos_ray.replay.format.codec import MOST_PIXELS, decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED, Episode, EpisodeKey, EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

#: Camera -> its view in rollouts with JPEGs, in latent order.
VIEWS = {"cam_left_wrist": "wrist_left", "cam_right_wrist": "wrist_right", "cam_high": "primary"}
#: Part of a folder's name -> instruction, as in the public loader.
INSTRUCTIONS = {
    "fold_shirt": "fold shirt", "candies_in_bowl": "put candies in bowl", "candy_in_bag": "put candy in bag",
    "flatten_shirt": "flatten shirt", "brown_chicken_wing_on_plate": "put brown chicken wing on plate",
    "purple_eggplant_on_plate": "put purple eggplant on plate",
}  # fmt: skip
_KNOWN = {"action", "observations", "relative_action", "args_json", *(f"{view}_images_jpeg" for view in VIEWS.values())}


def read_aloha(path: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """The episode of a file, or of each file of a folder; of a folder with ``train`` and ``val`` without the latter, as the public trainer
    reads it. StoreError for a folder without files."""
    files = hdf5.files_of(path)
    kept = {file for file in files if "val" not in file.relative_to(path).parts} if path.is_dir() else set(files)
    if kept and len(kept) < len(files):
        notes.say(f"{len(files) - len(kept)} episodes of val/ are left out, as the public trainer leaves them: name that folder for them")
        files = sorted(kept)
    notes.total += len(files)
    for file in files:
        yield attempt(str(file), partial(_read, file, options, notes))


def export_aloha(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, render: Render | None = None,
    progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write demonstrations to ``<target>/demos/<instruction>/train`` with pixels, as the public trainer reads them, and rollouts to
    ``<target>/rollouts/<instruction>`` with their JPEGs.

    Skipped and named are episodes without two wrist cameras and a third-person one, failed demonstrations, and those whose frames are not
    all stored, unless ``render`` makes them. StoreError if ``target`` exists or nothing can be written.
    """
    skipped: list[tuple[str, str]] = []
    written: dict[Path, int] = {}
    with new_folder(target) as folder:
        for view, frames in whole_episodes(store, summaries, skipped, render, progress):
            s, demo = view.summary, view.summary.source == "demo"
            cameras = _three(view.cameras)
            if not cameras or (demo and not s.success):
                skipped.append((s.name, "a demonstration that failed: the trainer takes each for a success" if cameras else
                                f"cameras {', '.join(view.cameras)}: the format needs two wrist cameras and a third-person one"))
                continue
            if len(view.instructions) > 1:
                skipped.append((s.name, f"it has {len(view.instructions)} instructions, and a file of this format one"))
                continue
            name = re.sub(r"\W+", "_", view.instruction)[:80] or "task"
            place = folder / "demos" / name / "train" if demo else folder / "rollouts" / name
            place.mkdir(parents=True, exist_ok=True)
            number = written.get(place, 0)
            _write(place / f"episode_{number}.hdf5", view, frames[:-1], cameras, pixels=demo)
            written[place] = number + 1
        if not written:
            raise nothing_to_write(skipped)
    return Exchanged(sum(written.values()), tuple(skipped))


def _read(file: Path, options: ImportOptions, notes: Notes) -> Episode:
    with hdf5.opened(file) as source:
        hdf5.check_format(source, "aloha")
        action = hdf5.array(source, "action", np.float32, 2)
        observed = hdf5.group(source, "observations")
        qpos = hdf5.array(observed, "qpos", np.float32, 2)
        steps = len(action)
        if not steps or len(qpos) != steps:
            raise StoreError(f"{file} has {steps} actions and {len(qpos)} rows of observations/qpos")
        columns, rate = _pictures(file, source, observed, options, steps, notes)
        said = hdf5.attribute(source, "success")
        source_name = options.source or ("demo" if said is None else "rollout")
        if said is not None and (not isinstance(said, int) or said not in (0, 1)):
            raise StoreError(f"{file} has attribute success = {said!r}, which is neither true nor false")
        success, score = bool(1 if said is None else said), hdf5.attribute(source, "success_score")
        if score is not None and not (isinstance(score, int | float) and 0.0 <= score <= 1.0):
            raise StoreError(f"{file} has attribute success_score = {score!r}, which is not within 0 and 1")
        instruction = _instruction(file, source, options, notes)
        if unread := sorted(set(source) - _KNOWN):
            notes.say(f"not read: {', '.join(unread)}")
        rate = float(hdf5.attribute(source, "control_freq", rate) or 0.0)
    notes.say(REPEATED_NOTE)
    version = -1 if source_name == "demo" else options.policy_version
    rewards = np.zeros(steps, np.float32)
    rewards[-1] = float(success)
    number = re.search(r"\d+", file.stem)
    info: dict[str, Any] = {"imported": file.name, LAST_STATE_REPEATED: True, **({"control_freq": rate} if rate else {})}
    return Episode(
        key=EpisodeKey(f"import:{file.stem}", options.task or re.sub(r"\W+", "_", instruction), source_name,
                       int(number[0]) if number else 0, initial_state=hashlib.sha256(qpos.tobytes() + action.tobytes()).hexdigest()[:16]),
        instruction=instruction, cameras=tuple(columns), success=success, episode_return=float(success), timed_out=not success, invalid="",
        policy_version=version, actions=action, labels=action, rewards=rewards, proprio=np.vstack([qpos, qpos[-1:]]),
        states=np.full((steps + 1, 1), np.nan), step_versions=np.full(steps, version), predicted_values=np.full(steps, np.nan),
        frames={t: [column[min(t, steps - 1)] for column in columns.values()] for t in range(steps + 1)}, info=info,
        score=None if score is None or score == float(success) else float(score),
    )  # fmt: skip


def _instruction(file: Path, source: h5py.File, options: ImportOptions, notes: Notes) -> str:
    said = options.instruction or str(hdf5.attribute(source, "task_description", "")).strip()
    folder = file.resolve().parent.parent.name
    known = next((text for part, text in INSTRUCTIONS.items() if part in folder), "")
    if not said and not known:
        raise StoreError(f"{file} has no task_description, and its folder {folder!r} is none of the tasks that the public loader knows: "
                         "give --instruction TEXT")
    if not said:
        notes.say(f"instruction taken from the folder's name {folder}, as the public loader takes it")
    return said or known


def _pictures(
    file: Path, source: h5py.File, observed: h5py.Group, options: ImportOptions, steps: int, notes: Notes
) -> tuple[dict[str, list[bytes]], float]:
    """Camera -> one JPEG per step, and the rate of the videos (0 where there are none)."""
    flip = bool(options.flip)
    found = {camera: hdf5.images(source, f"{view}_images", flip, steps) for camera, view in VIEWS.items()}
    jpegs = {camera: column for camera, column in found.items() if column is not None}
    if jpegs:
        return jpegs, 0.0
    for name in ("images", "video_paths"):
        if not hdf5.has(observed, name):
            continue
        place = hdf5.group(observed, name)
        if not len(place):
            break
        cameras = tuple(VIEWS) if all(camera in place for camera in VIEWS) else tuple(sorted(place, key=third_person))
        if others := sorted(set(place) - set(cameras)):
            notes.say(f"left out {', '.join(others)}: the policy sees {', '.join(cameras)}")
        if name == "images":
            return {camera: hdf5.images(place, camera, flip, steps) or [] for camera in cameras}, 0.0
        videos = {camera: _video(file.parent, hdf5.text(place, camera), steps, flip) for camera in cameras}
        return {camera: column for camera, (column, _) in videos.items()}, max(rate for _, rate in videos.values())
    raise StoreError(f"{file} has no pictures: none of observations/images, observations/video_paths and primary_images_jpeg")


def _video(folder: Path, name: str, steps: int, flip: bool) -> tuple[list[bytes], float]:
    """The pictures of a video beside the file as JPEGs, and its rate. StoreError unless there are ``steps``."""
    if Path(name).name != name or not name:
        raise StoreError(f"video {name!r} is not beside the file: not followed")
    path = folder / name
    if not path.is_file():
        raise StoreError(f"{path} is missing: the video belongs beside its HDF5 file")
    jpegs: list[bytes] = []
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if not 0 < stream.width * stream.height <= MOST_PIXELS:
                raise StoreError(f"{path} has pictures of {stream.width}x{stream.height} pixels, at most {MOST_PIXELS} are read")
            for frame in container.decode(stream):
                if len(jpegs) > steps:
                    break
                picture = frame.to_ndarray(format="rgb24")
                jpegs.append(encode_jpeg(picture[::-1] if flip else picture))
            rate = float(stream.average_rate or 0.0)
    except (av.error.FFmpegError, IndexError) as error:
        raise StoreError(f"{path} is no video that can be read: {error}") from error
    if len(jpegs) != steps:
        count = f"more than {steps}" if len(jpegs) > steps else len(jpegs)
        raise StoreError(f"{path} has {count} pictures, there are {steps} actions")
    return jpegs, rate


def _three(cameras: tuple[str, ...]) -> dict[str, int]:
    """The format's cameras -> index of ours: by name, else the first two of the wrists and the first third-person one. {} if too few."""
    if set(VIEWS) <= set(cameras):
        return {name: cameras.index(name) for name in VIEWS}
    wrists = [index for index, camera in enumerate(cameras) if not third_person(camera)]
    others = [index for index, camera in enumerate(cameras) if third_person(camera)]
    return dict(zip(VIEWS, [*wrists[:2], others[0]], strict=True)) if len(wrists) > 1 and others else {}


def _write(file: Path, view: EpisodeView, frames: list[list[bytes]], cameras: dict[str, int], pixels: bool) -> None:
    action, qpos = view.column("label") if pixels else view.column("action"), view.column("proprio")[:-1]
    with h5py.File(file, "w") as target:
        observed = target.create_group("observations")
        observed["qpos"], observed["qvel"], observed["effort"] = qpos, np.zeros_like(qpos), np.zeros_like(qpos)
        target["action"] = action
        change = np.diff(action, axis=0)
        target["relative_action"] = np.vstack([change, change[-1:]]) if len(change) else np.zeros_like(action)
        for camera, index in cameras.items():
            if pixels:
                pictures = np.stack([decode_jpeg(images[index]) for images in frames])
                observed.create_dataset(f"images/{camera}", data=pictures, chunks=(1, *pictures.shape[1:]), compression="gzip",
                                        compression_opts=1)
                continue
            column = target.create_dataset(f"{VIEWS[camera]}_images_jpeg", (len(frames),), dtype=h5py.vlen_dtype(np.dtype(np.uint8)))
            for step, images in enumerate(frames):
                column[step] = np.frombuffer(images[index], np.uint8)
        target.attrs["sim"] = "fingerprint" in view.header["info"]
        target.attrs["task_description"] = view.instruction
        if rate := view.embodiment.control_freq:
            target.attrs["control_freq"] = rate
        if not pixels:
            target.attrs["success"], target.attrs["success_score"] = view.summary.success, view.summary.score
