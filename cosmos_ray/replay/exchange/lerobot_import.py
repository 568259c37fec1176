"""LeRobot datasets into a store, written by this package or by any other, with the values that LeRobot itself gives.

The rows of the data files count, as they do for LeRobot: an episode is the rows that bear its number, wherever the episodes' table says
they are, and its text is that of each row's ``task_index``. A row is (observation ``t``, action ``t``); what the last action led to is not
part of the format, so an episode's last state repeats the last observation. ``states`` (the simulator's) are one column of nan, rewards are
zero where the dataset has none.

Pictures are taken over byte for byte where they are JPEGs. Videos and others are decoded and stored as JPEGs, for videos a second lossy
step on top of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.exchange.lerobot_meta import Dataset, read_table
from cosmos_ray.replay.exchange.lerobot_pictures import from_cell, from_video
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import LAST_STATE_REPEATED, SOURCES, Episode, EpisodeKey

_OPTIONAL = ("label", "next.reward", "next.success", "policy_version")


def read_lerobot(folder: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """Every episode of the dataset, one at a time.

    Source is that of the options, else what the dataset's episodes say, else ``demo``. Success is the last ``next.success``, else the
    episode's ``success``, else taken for granted, as in a dataset of demonstrations. StoreError for a folder that is no such dataset.
    """
    dataset = Dataset(folder, options, notes)
    files: dict[int, list[Path]] = {}
    for file in sorted((dataset.folder / "data").rglob("*.parquet")):
        try:
            numbers = {int(number) for number in read_table(file, columns=["episode_index"])["episode_index"].unique().to_pylist()}
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException, StoreError) as error:
            yield Skip(str(file), f"it cannot be read: {str(error).partition(chr(10))[0]}")
            continue
        for number in numbers:
            files.setdefault(number, []).append(file)
    notes.total = len(files.keys() | dataset.episodes.keys())
    for number in sorted(files.keys() | dataset.episodes.keys()):
        yield attempt(f"episode {number}", partial(_read, dataset, number, files.get(number, [])))


def _read(dataset: Dataset, number: int, files: list[Path]) -> Episode:
    """One episode. StoreError, or what the libraries raise."""
    options, row = dataset.options, dataset.episodes.get(number, {})
    table = _rows(dataset, number, files, row)
    length = table.num_rows
    state, action = (_matrix(dataset, table, name) for name in ("observation.state", "action"))
    frames = {camera: _pictures(dataset, row, table, camera) for camera in dataset.cameras}
    if options.flip:
        frames = {camera: [encode_jpeg(decode_jpeg(jpeg)[::-1]) for jpeg in jpegs] for camera, jpegs in frames.items()}
    dataset.notes.say("pictures are turned upside down, as --flip says" if options.flip else
                      "pictures are as they are in the dataset: the format does not say which way is up; --flip yes turns them")
    success = _success(dataset, row, table)
    rewards = _matrix(dataset, table, "next.reward")[:, 0] if dataset.has("next.reward") else np.zeros(length, np.float32)
    said = row.get("source")
    source = options.source or (said if said in SOURCES else None) or "demo"
    versions = np.full(length, -1 if source == "demo" else options.policy_version)
    if dataset.has("policy_version"):
        versions = _matrix(dataset, table, "policy_version", np.int64)[:, 0]
    texts = [(0, options.instruction)] if options.instruction else _texts(dataset, row, table)
    begin = hashlib.sha256(state.tobytes() + action.tobytes()).hexdigest()[:16]
    info: dict[str, Any] = {"imported": dataset.name, "control_freq": dataset.fps, LAST_STATE_REPEATED: True, **dataset.environment}
    if dataset.robot:
        info["robot"] = dataset.robot
    if len(texts) > 1:
        info["instructions"] = texts
    shown = {t: [images[t] for images in frames.values()] for t in range(length)} if frames else {}
    return Episode(
        key=EpisodeKey(f"import:{dataset.name}", options.task or texts[0][1], source, number, initial_state=begin),
        instruction=texts[0][1], cameras=tuple(frames), success=success, episode_return=float(rewards.sum()), timed_out=not success,
        invalid="", policy_version=int(versions[0]), actions=action,
        labels=_matrix(dataset, table, "label") if dataset.has("label") else action, rewards=rewards,
        proprio=np.vstack([state, state[-1:]]), states=np.full((length + 1, 1), np.nan), step_versions=versions,
        predicted_values=np.full(length, np.nan), frames={**shown, length: shown[length - 1]} if shown else {}, info=info,
        score=score if isinstance(score := row.get("score"), float) and 0.0 <= score <= 1.0 else None,
    )  # fmt: skip


def _rows(dataset: Dataset, number: int, files: list[Path], row: dict[str, Any]) -> pa.Table:
    """The episode's rows, of all features but those that nothing here reads, in the order of ``frame_index``."""
    wanted = {column for name in ("observation.state", "action", *_OPTIONAL) if dataset.has(name) for column in dataset.columns(name)}
    wanted |= {"frame_index", "timestamp", dataset.key("task_index"), dataset.key("task"), "subtask_index"}
    wanted |= {name for name in dataset.cameras.values() if dataset.features[name].get("dtype") != "video"}
    tables = [pq.read_table(file, columns=sorted(wanted & set(pq.read_schema(file).names)), filters=[("episode_index", "=", number)])
              for file in files]  # fmt: skip
    if not tables:
        raise StoreError("no file below data has rows of it")
    table = pa.concat_tables(tables, promote_options="default")
    said = int(row.get("length") or table.num_rows)
    steps = table["frame_index"].to_numpy()
    if not np.array_equal(np.sort(steps), np.arange(steps.min(), steps.min() + len(steps))):
        raise StoreError(f"it has {len(steps)} rows, of frames {steps.min()} to {steps.max()}, and not each of these once")
    if said != len(steps) or steps.min():
        dataset.notes.say(f"episode {number} has {len(steps)} rows in the data files from frame {steps.min()} on, which count; the table "
                          f"of episodes says {said}")
    return table.take(np.argsort(steps))


def _texts(dataset: Dataset, row: dict[str, Any], table: pa.Table) -> list[tuple[int, str]]:
    """(first step, text) of the instructions: of the column that a key names, else through ``task_index``, else of the episodes' table."""
    column = dataset.key("task")
    tasks, index = (dataset.subtasks, "subtask_index") if column == "subtask" else (dataset.tasks, dataset.key("task_index"))
    if column in table.column_names and column not in ("task", "subtask"):
        spoken = [str(text or "") for text in table[column].to_pylist()]
        dataset.notes.say(f"instructions are those of column {column}")
    elif index in table.column_names and tasks:
        numbers = [int(number) for number in table[index].to_pylist()]
        if unknown := sorted(set(numbers) - tasks.keys()):
            raise StoreError(f"its {index} {unknown[0]} is not in the dataset's table of {len(tasks)} texts")
        spoken = [tasks[number] for number in numbers]
        dataset.notes.say(f"instructions are those of {index} in the table meta/{'sub' if tasks is dataset.subtasks else ''}tasks")
    else:
        said = row.get("tasks")
        listed = [said] if isinstance(said, str) else list(said or ())
        if not listed:
            raise StoreError("no text: there is neither a task_index with a table of tasks nor tasks of the episode; give --instruction, "
                             "or --key task=COLUMN")
        dataset.notes.say("instructions are those of the table of episodes" + (", the first of several" if len(listed) > 1 else ""))
        return [(0, str(listed[0]))]
    return [(step, text) for step, text in enumerate(spoken) if not step or text != spoken[step - 1]]


def _success(dataset: Dataset, row: dict[str, Any], table: pa.Table) -> bool:
    if dataset.has("next.success"):
        return bool(np.ravel(table[dataset.key("next.success")][-1].as_py())[0])
    said = row.get("success")
    if not isinstance(said, bool | int | float):
        dataset.notes.say("the dataset does not say whether an episode succeeded: each is taken for a success")
        return True
    return bool(said)


def _pictures(dataset: Dataset, row: dict[str, Any], table: pa.Table, camera: str) -> list[bytes]:
    """One JPEG per row."""
    name = dataset.cameras[camera]
    if dataset.features[name].get("dtype") != "video":
        if name not in table.column_names:
            raise StoreError(f"the data files have no column {name}")
        return [from_cell(value, name, dataset.folder) for value in table[name].to_pylist()]
    steps = table["frame_index"].to_numpy()
    times = table["timestamp"].to_numpy().ravel().astype(np.float64) if "timestamp" in table.column_names else steps / dataset.fps
    apart = np.median(np.diff(times)) if len(times) > 1 else 1 / dataset.fps
    if abs(apart * dataset.fps - 1) > 0.1:
        dataset.notes.say(f"rows are {apart:.4f} s apart, while meta/info.json says {dataset.fps:g} a second, which counts")
    if not dataset.is_v3:
        return from_video(_episode_video(dataset.folder, name, row), times, dataset.fps)
    folder = dataset.folder / "videos" / name
    chunk, file = (int(row[f"videos/{name}/{what}_index"]) for what in ("chunk", "file"))
    # The patterns of info.json are not used: they could name any file.
    path = folder / f"chunk-{chunk:03d}" / f"file-{file:03d}.mp4"
    if not path.is_file():
        raise StoreError(f"{path} is missing")
    return from_video(path, float(row[f"videos/{name}/from_timestamp"]) + times, dataset.fps)


def _episode_video(folder: Path, name: str, row: dict[str, Any]) -> Path:
    """The video of one episode, as formats v2.0 and v2.1 have it."""
    number = int(row["episode_index"])
    found = sorted((folder / "videos").glob(f"chunk-*/{name}/episode_{number:06d}.mp4"))
    if not found:
        raise StoreError(f"{folder / 'videos'} has no chunk-*/{name}/episode_{number:06d}.mp4")
    return found[0]


def _matrix(dataset: Dataset, table: pa.Table, name: str, dtype: Any = np.float32) -> np.ndarray:
    """(length, d) values of a feature, of several side by side. StoreError if rows differ in length."""
    parts = []
    for column in dataset.columns(name):
        if column not in table.column_names:
            raise StoreError(f"the data files have no column {column}")
        values = table[column].to_pylist()
        try:
            parts.append(np.array(values, dtype=dtype).reshape(table.num_rows, -1))
        except (TypeError, ValueError) as error:
            raise StoreError(f"{column} has rows that are no numbers, or of several lengths") from error
    return np.hstack(parts)
