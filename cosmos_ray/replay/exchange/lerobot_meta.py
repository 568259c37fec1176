"""What the files under ``meta`` of a LeRobot dataset say, of formats v2.0, v2.1 and v3.0.

==================  ==================================================  ==================================================
``meta/``           v3.0                                                v2.0, v2.1
==================  ==================================================  ==================================================
``info.json``       version, rate, features                             the same
episodes            ``episodes/**/*.parquet``, with video times         ``episodes.jsonl``; a video per episode
tasks               ``tasks.parquet``, the text as the frame's index    ``tasks.jsonl``
==================  ==================================================  ==================================================
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.env_args import environment_beside
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes

PICTURES = "observation.images."
VERSIONS = ("v3.0", "v2.1", "v2.0")
_NEEDED = ("observation.state", "action")
_POINTER = b"version https://git-lfs"
_NO_PICTURE = re.compile(r"(?:^|[._/])(?:depth|mask|masks|seg|segmentation)(?:[._/\d]|$)")


class Dataset:
    """A dataset's description. StoreError if the folder is none."""

    def __init__(self, folder: Path, options: ImportOptions, notes: Notes) -> None:
        self.name, self.options, self.notes = folder.resolve().name, options, notes
        self.folder = folder = _dataset_in(folder)
        try:
            info = json.loads((folder / "meta" / "info.json").read_bytes())
            self.version, self.fps = str(info["codebase_version"]), float(info["fps"])
            self.robot, self.environment = str(info.get("robot_type") or ""), environment_beside(folder / "meta")
            self.features = {str(name): _checked(name, dict(feature)) for name, feature in dict(info["features"]).items()}
            if self.version not in VERSIONS:
                raise StoreError(f"it is of version {self.version}, and {', '.join(VERSIONS)} are read: convert it with LeRobot")
            if not 0 < self.fps < float("inf"):
                raise StoreError(f"fps is {self.fps}")
            self.tasks = self._texts("tasks", "task")
            self.subtasks = self._texts("subtasks", "subtask")
            self.episodes = {int(row["episode_index"]): row for row in self._episode_rows()}
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, pa.ArrowException, StoreError) as error:
            reason = str(error).partition("\n")[0]
            what = "it has no " if isinstance(error, KeyError) else ""
            raise StoreError(f"{folder} is not a LeRobot dataset that can be read: {what}{reason}") from error
        self._check_keys()
        self.cameras = self._cameras()

    @property
    def is_v3(self) -> bool:
        return self.version == "v3.0"

    def key(self, name: str) -> str:
        """What the files call ``name``."""
        return self.options.keys.get(name, name)

    def columns(self, name: str) -> list[str]:
        """The features that make up ``name``: several where a key names them with commas."""
        return self.key(name).split(",")

    def has(self, name: str) -> bool:
        return all(column in self.features for column in self.columns(name))

    # ---------------------------------------------------------------- inside

    def _check_keys(self) -> None:
        """StoreError where a feature is missing that an episode needs, or that a key names."""
        missing = [name for name in _NEEDED if not self.has(name)]
        texts = {"task", "task_index", "subtask"}
        odd = [name for name in self.options.keys if name not in missing and not self.has(name) and name not in texts]
        if missing or odd:
            there = ", ".join(f"{name} {_shape(feature)}" for name, feature in self.features.items() if name not in _BOOKKEEPING)
            advice = " ".join(f"{name}=NAME" for name in missing + odd)
            absent = ", ".join(self.key(name) for name in missing + odd)
            raise StoreError(f"{self.folder} has no feature {absent}; it has {there}: say which with --key {advice}")
        for name in self.features:
            if "/" in name or name.startswith(".") or "\0" in name:
                raise StoreError(f"{self.folder}: feature {name!r} is no plain name")

    def _cameras(self) -> dict[str, str]:
        """Camera -> feature of its pictures. Depth, masks and what is not of three colours is left out, unless it is asked for."""
        given = {old: new for new, old in self.options.keys.items() if new.startswith(PICTURES)}
        found, left = {}, []
        for name, feature in self.features.items():
            camera = _camera(given.get(name, name))
            if feature.get("dtype") not in ("image", "video") and name not in given:
                continue
            if self.options.takes(camera) and (self.options.cameras or name in given or not (why := _no_picture(name, feature))):
                found[camera] = name
            elif not self.options.cameras:
                left.append(f"{name} ({why})")
        if left:
            self.notes.say(f"left out {', '.join(left)}: --cameras takes what it names")
        unknown = [camera for camera in self.options.cameras if camera not in found]
        if unknown:
            known = [_camera(name) for name, feature in self.features.items() if feature.get("dtype") in ("image", "video")]
            raise StoreError(f"--cameras names {', '.join(unknown)}, and the cameras of {self.folder} are {', '.join(known)}")
        return found

    def _texts(self, what: str, column: str) -> dict[int, str]:
        """Number -> text of the tasks or subtasks; empty where there are none."""
        table, lines = (self.folder / "meta" / f"{what}.{ending}" for ending in ("parquet", "jsonl"))
        if table.is_file():
            rows = read_table(table)
            texts = [name for name in rows.column_names if pa.types.is_string(kind := rows.schema.field(name).type)
                     or pa.types.is_large_string(kind)]  # fmt: skip
            if not texts:
                raise StoreError(f"{table} has no column of text")
            chosen = column if column in texts else texts[0]
            number = f"{column}_index"
            numbers = rows[number].to_pylist() if number in rows.column_names else list(range(rows.num_rows))
            if numbers != list(range(len(numbers))):
                self.notes.say(f"meta/{what}.parquet has its rows out of order: {number} counts, while LeRobot takes them by position")
            return dict(zip(map(int, numbers), map(str, rows[chosen].to_pylist()), strict=True))
        if lines.is_file():
            return {int(row[f"{column}_index"]): str(row[column]) for row in _json_lines(lines)}
        return {}

    def _episode_rows(self) -> Iterable[dict[str, Any]]:
        meta = self.folder / "meta"
        tables = sorted((meta / "episodes").rglob("*.parquet"))
        if self.is_v3:
            if not tables:
                raise StoreError("it has no table below meta/episodes")
            return [row for table in tables for row in _without_statistics(table)]
        return _json_lines(meta / "episodes.jsonl")


_BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def _checked(name: str, feature: dict[str, Any]) -> dict[str, Any]:
    """The feature, of which what is read later is of the right kinds. TypeError."""
    for entry, kinds in {"shape": list, "info": dict, "video_info": dict}.items():
        if not isinstance(feature.get(entry) or kinds(), kinds):
            raise TypeError(f"{entry} of feature {name} is {str(feature[entry])[:40]!r}")
    return feature


def _no_picture(name: str, feature: dict[str, Any]) -> str:
    """Why a feature shows no colours; "" if it does."""
    described: dict[str, Any] = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    flags = [key for key, value in described.items() if value is True and re.search(r"depth|mask|segmentation", key)]
    if flags:
        return f"marked as {flags[0]}"
    if _NO_PICTURE.search(name):
        return "named like depth or a mask"
    names = feature.get("names")
    shape, names = list(feature.get("shape") or ()), list(names) if isinstance(names, list | dict) else []
    channels = next((size for size, label in zip(shape, names, strict=False) if str(label).startswith("channel")), None)
    return "" if channels in (3, None) else f"of {channels} channels"


def _camera(feature: str) -> str:
    """What a camera is called here: the end of its feature's name."""
    return feature.removeprefix(PICTURES).removeprefix("observation.")


def _dataset_in(folder: Path) -> Path:
    """The folder itself, or the only snapshot in a folder of the Hugging Face cache. StoreError if neither is a dataset."""
    if (folder / "meta" / "info.json").is_file():
        return folder
    snapshots = [found.parent.parent for found in folder.glob("snapshots/*/meta/info.json")]
    if len(snapshots) == 1:
        return snapshots[0]
    near = {str(found.parent.parent) for pattern in ("*/meta/info.json", "../meta/info.json") for found in folder.glob(pattern)}
    others = f"; there is one in {', '.join(sorted(near | set(map(str, snapshots)))[:5])}" if near or snapshots else ""
    raise StoreError(f"{folder} is not a LeRobot dataset: it has no meta/info.json{others}")


def read_table(path: Path, **options: Any) -> pa.Table:
    """A Parquet file. StoreError, or what pyarrow raises."""
    with open(path, "rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise StoreError(f"{path} is only a pointer to the file: run `git lfs pull` in the dataset's folder")
    return pq.read_table(path, **options)


def _shape(feature: dict[str, Any]) -> str:
    return "x".join(str(size) for size in feature.get("shape") or ()) or str(feature.get("dtype"))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _without_statistics(table: Path) -> list[dict[str, Any]]:
    rows = read_table(table)
    return rows.select([name for name in rows.column_names if not name.startswith("stats/")]).to_pylist()
