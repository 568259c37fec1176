"""Episodes as a LeRobot dataset of format v3.0, which LeRobot itself, Ray Data and the training codes built on them read.

A row is (observation ``t``, action ``t``) for ``t`` in ``0..T - 1``; the format has no place for the last state. Beside LeRobot's own
columns there are ``next.reward``, ``next.done``, ``next.success``, ``return`` (of the whole episode), ``value`` (target in [-1, 1] at
``t``), ``label`` (what a policy should imitate) and ``policy_version``. The key, score and source of each episode are columns of the
episodes' table.

Pictures are H.264 or AV1 videos, as LeRobot keeps them, or, without loss and decoding faster, the stored JPEGs inside of the tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.env_args import BESIDE, said_environment
from cosmos_ray.replay.exchange.exchanged import Exchanged, Progress, new_folder, nothing_to_write, whole_episodes
from cosmos_ray.replay.exchange.video import open_video
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.episode import EpisodeSummary
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.sampling.returns import value_targets
from cosmos_ray.replay.sampling.sampler import Render
from cosmos_ray.replay.store import ReplayStore

CODECS = {"h264": ("libx264", {"crf": "23", "g": "2", "bf": "0"}), "av1": ("libsvtav1", {"crf": "30", "g": "2"})}
FRAMES = (*CODECS, "image")
ROWS_PER_FILE = 20_000
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
CHUNK = 1000  # files per folder

_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


def export_lerobot(
    store: ReplayStore, summaries: Iterable[EpisodeSummary], target: str | Path, *, frames: str = "h264", fps: float = 0,
    gamma: float = 0.99, render: Render | None = None, progress: Progress | None = None,
) -> Exchanged:  # fmt: skip
    """Write the episodes as the new folder ``target``.

    ``frames`` is ``h264``, ``av1`` or ``image``; ``fps`` are control steps per second, 0 takes the episodes' own, or 20 where they
    do not say; ``gamma`` discounts ``value`` per step. Episodes whose frames are not all stored are skipped and named,
    unless ``render`` makes them; so are those that differ from the first in cameras, sizes or rate. StoreError if ``target``
    exists or nothing can be written.
    """
    if frames not in FRAMES:
        raise StoreError(f"frames = {frames!r} is not one of {', '.join(FRAMES)}")
    skipped: list[tuple[str, str]] = []
    with new_folder(target) as folder:
        writer = _Writer(folder, frames, fps, gamma)
        try:
            for view, jpegs in whole_episodes(store, summaries, skipped, render, progress):
                try:
                    writer.add(view, jpegs[:-1])
                except StoreError as error:
                    skipped.append((view.summary.name, str(error)))
            if not writer.episodes:
                raise nothing_to_write(skipped)
            writer.finish()
        finally:
            writer.close()
    return Exchanged(len(writer.episodes), tuple(skipped))


class _Layout(NamedTuple):
    """What all episodes of a dataset have in common."""

    pixels: dict[str, tuple[int, ...]]  # feature -> (height, width, channels)
    state: int  # numbers
    action: int  # numbers
    fps: float  # control steps per second


class _Writer:
    """The files of a dataset while it grows."""

    def __init__(self, folder: Path, frames: str, fps: float, gamma: float) -> None:
        self.folder, self.frames, self.fps, self.gamma = folder, frames, fps, gamma
        self.episodes: list[dict[str, Any]] = []
        self.tasks: dict[str, int] = {}
        self.rows = 0  # in all files
        self.robot = ""  # of the first episode
        self.environment: dict[str, Any] | None = None  # that recorded it
        self._file_rows = 0
        self._file = 0
        self._first: _Layout | None = None
        self._table: pq.ParquetWriter | None = None
        self._videos: dict[str, tuple[Any, Any]] = {}  # feature -> open container and stream

    def add(self, view: EpisodeView, jpegs: list[list[bytes]]) -> None:
        """Append an episode; StoreError, and nothing appended, if it does not fit the others."""
        images = {f"observation.images.{camera}": [step[i] for step in jpegs] for i, camera in enumerate(view.cameras)}
        pictures = {key: [decode_jpeg(jpeg) for jpeg in column] for key, column in images.items()}
        pixels = {key: column[0].shape for key, column in pictures.items()}
        if any(picture.shape != pixels[key] for key, column in pictures.items() for picture in column):
            raise StoreError("its pictures are of several sizes")
        layout = _Layout(pixels, view.column("proprio").shape[1], view.column("action").shape[1], self._rate(view))
        self._first, self.robot = self._first or layout, self.robot or _robot(view)
        self.environment = self.environment or said_environment(view.header["info"])
        if layout != self._first:
            raise StoreError(f"its pictures, sizes and rate {tuple(layout)} differ from the first episode's {tuple(self._first)}")
        if self.frames != "image" and any(size % 2 for shape in pixels.values() for size in shape[:2]):
            raise StoreError(f"videos need pictures of even height and width, not {list(pixels.values())}: export with frames 'image'")
        if self._file_rows and self._file_rows + view.length > ROWS_PER_FILE:
            self.close()
            self._file, self._file_rows = self._file + 1, 0
        columns = self._columns(view)
        decoded = {key: np.stack(column) for key, column in pictures.items()}
        stats = {name: _statistics(values) for name, values in columns.items()}
        stats.update({key: _picture_statistics(frames) for key, frames in decoded.items()})
        self._write_table(columns, images)
        if self.frames != "image":
            for key, frames in decoded.items():
                self._write_video(key, frames)
        self._note(view, list(images), stats)

    @property
    def _layout(self) -> _Layout:
        if self._first is None:
            raise StoreError("a dataset without episodes has no layout")
        return self._first

    def _rate(self, view: EpisodeView) -> float:
        rate = self.fps or view.embodiment.control_freq or 20.0
        return int(rate) if rate == int(rate) else rate  # LeRobot's own is whole

    def _columns(self, view: EpisodeView) -> dict[str, np.ndarray]:
        """Every column but the pictures."""
        steps, summary = view.length, view.summary
        at = np.arange(steps)
        tasks = [self.tasks.setdefault(view.instruction_at(step), len(self.tasks)) for step in range(steps)]
        last = at == steps - 1
        return {
            "observation.state": view.column("proprio")[:-1], "action": view.column("action"), "label": view.column("label"),
            "next.reward": view.column("reward"), "next.done": last, "next.success": last & summary.success,
            "return": np.full(steps, summary.episode_return, np.float32),
            "value": value_targets(steps, summary.score, self.gamma, view.last_seen)[:-1],
            "policy_version": view.column("policy_version"), "timestamp": (at / self._layout.fps).astype(np.float32),
            "frame_index": at.astype(np.int64), "episode_index": np.full(steps, len(self.episodes), np.int64),
            "index": (self.rows + at).astype(np.int64), "task_index": np.array(tasks, np.int64),
        }  # fmt: skip

    def _write_table(self, columns: dict[str, np.ndarray], images: dict[str, list[bytes]]) -> None:
        arrays = {name: _arrow(values) for name, values in columns.items()}
        if self.frames == "image":
            for key, jpegs in images.items():
                arrays[key] = pa.array([{"bytes": jpeg, "path": None} for jpeg in jpegs], _PICTURE)
        table = pa.table(arrays)
        if self._table is None:
            self._table = pq.ParquetWriter(self._path(_DATA), table.schema)
        self._table.write_table(table, row_group_size=1024)

    def _write_video(self, key: str, frames: np.ndarray) -> None:
        if key not in self._videos:
            codec, options = CODECS[self.frames]
            size = frames.shape[1], frames.shape[2]
            rate = Fraction(self._layout.fps).limit_denominator(1001)
            self._videos[key] = open_video(self._path(_VIDEO, video_key=key), codec, rate, size, options)
        container, stream = self._videos[key]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))

    def _note(self, view: EpisodeView, images: list[str], stats: dict[str, dict[str, Any]]) -> None:
        """The episode's row of the episodes' table."""
        chunk, file = divmod(self._file, CHUNK)
        summary, steps = view.summary, view.length
        row: dict[str, Any] = {
            "episode_index": len(self.episodes), "tasks": list(view.instructions), "length": steps, "data/chunk_index": chunk,
            "data/file_index": file, "dataset_from_index": self.rows, "dataset_to_index": self.rows + steps,
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0, "success": summary.success, "score": summary.score,
            "source": summary.source, "name": summary.name, "run": summary.key.run,
            "seed": summary.key.seed, "attempt": summary.key.attempt,
        }  # fmt: skip
        if self.frames != "image":
            for key in images:
                row |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file,
                        f"videos/{key}/from_timestamp": self._file_rows / self._layout.fps,
                        f"videos/{key}/to_timestamp": (self._file_rows + steps) / self._layout.fps}  # fmt: skip
        row |= {f"stats/{name}/{what}": value for name, values in stats.items() for what, value in values.items()}
        self.episodes.append(row)
        self.rows += steps
        self._file_rows += steps

    def close(self) -> None:
        """Complete the files that are open."""
        if self._table is not None:
            self._table.close()
        for container, stream in self._videos.values():
            container.mux(stream.encode())
            container.close()
        self._table, self._videos = None, {}

    def finish(self) -> None:
        """Close, and write what describes the dataset."""
        self.close()
        pixels, state, action, fps = self._layout
        dtype = "image" if self.frames == "image" else "video"
        names = ["height", "width", "channels"]
        features: dict[str, dict] = {key: {"dtype": dtype, "shape": list(shape), "names": names} for key, shape in pixels.items()}
        if dtype == "video":
            for key, shape in pixels.items():
                features[key]["info"] = {
                    "video.height": shape[0], "video.width": shape[1], "video.codec": self.frames, "video.pix_fmt": "yuv420p",
                    "video.is_depth_map": False, "video.fps": fps, "video.channels": 3, "has_audio": False,
                }  # fmt: skip
        features |= {"observation.state": _vector(state), "action": _vector(action), "label": _vector(action)}
        features |= {name: {"dtype": scalar, "shape": [1], "names": None} for name, scalar in _SCALARS.items()}
        info = {
            "codebase_version": "v3.0", "robot_type": self.robot, "total_episodes": len(self.episodes), "total_frames": self.rows,
            "total_tasks": len(self.tasks), "chunks_size": CHUNK, "data_files_size_in_mb": 100, "video_files_size_in_mb": 500, "fps": fps,
            "splits": {"train": f"0:{len(self.episodes)}"}, "data_path": _DATA, "video_path": _VIDEO if dtype == "video" else None,
            "features": features,
        }  # fmt: skip
        meta = self.folder / "meta"
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        (meta / "info.json").write_text(json.dumps(info, indent=4))
        if self.environment:
            (meta / BESIDE).write_text(json.dumps(self.environment))
        (meta / "stats.json").write_text(json.dumps(_all_statistics(self.episodes), indent=4))
        pq.write_table(_tasks(self.tasks), meta / "tasks.parquet")
        pq.write_table(pa.Table.from_pylist(self.episodes), meta / "episodes" / "chunk-000" / "file-000.parquet")

    def _path(self, pattern: str, **names: str) -> Path:
        chunk, file = divmod(self._file, CHUNK)
        path = self.folder / pattern.format(chunk_index=chunk, file_index=file, **names)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # what the datasets library decodes
_SCALARS = {
    "next.reward": "float32", "next.done": "bool", "next.success": "bool", "return": "float32", "value": "float32",
    "policy_version": "int64", "timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
    "task_index": "int64",
}  # fmt: skip


def _robot(view: EpisodeView) -> str:
    """The kind of robot, as an import or the simulator says."""
    info = view.header["info"]
    fingerprint = info.get("fingerprint")
    simulated = fingerprint.get("robots") if isinstance(fingerprint, dict) else None
    return str(info.get("robot") or simulated or "unknown")


def _vector(size: int) -> dict[str, Any]:
    return {"dtype": "float32", "shape": [size], "names": [f"x{i}" for i in range(size)]}


def _arrow(values: np.ndarray) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _statistics(values: np.ndarray) -> dict[str, list]:
    """Of the columns of ``(n,)`` or ``(n, d)`` values."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    out = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0), "count": np.array([len(rows)])}
    out |= dict(zip(QUANTILES, np.quantile(rows, list(QUANTILES.values()), axis=0), strict=True))
    return {name: value.tolist() for name, value in out.items()}


def _picture_statistics(frames: np.ndarray) -> dict[str, list]:
    """Per channel of values in [0, 1], shape (3, 1, 1), over at most 50 frames and every fourth pixel."""
    some = frames[:: max(1, len(frames) // 50), ::4, ::4].reshape(-1, 3) / 255.0
    channels = _statistics(some)
    count = channels.pop("count")
    return {**{name: np.reshape(value, (3, 1, 1)).tolist() for name, value in channels.items()}, "count": count}


def _all_statistics(episodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the whole dataset from those of its episodes; quantiles as the mean of theirs, as LeRobot has them."""
    names = sorted({key.split("/")[1] for key in episodes[0] if key.startswith("stats/")})
    out = {}
    for name in names:
        column = {what: np.array([e[f"stats/{name}/{what}"] for e in episodes])
                  for what in ("min", "max", "mean", "std", "count", *QUANTILES)}
        shape = (-1, *[1] * (column["mean"].ndim - 1))
        weight = (column["count"] / column["count"].sum()).reshape(shape)
        mean = (column["mean"] * weight).sum(0)
        spread = (weight * (column["std"] ** 2 + (column["mean"] - mean) ** 2)).sum(0)
        all_of = {"min": column["min"].min(0), "max": column["max"].max(0), "mean": mean, "std": np.sqrt(spread)}
        all_of |= {"count": column["count"].sum(0)}
        all_of |= {what: (column[what] * weight).sum(0) for what in QUANTILES}
        out[name] = {what: value.tolist() for what, value in all_of.items()}
    return out


def _tasks(tasks: dict[str, int]) -> pa.Table:
    """Task texts as the index of a pandas frame: what LeRobot looks tasks up in."""
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": pa.array(list(tasks), pa.string())})
    column = {"numpy_type": "int64", "pandas_type": "int64", "metadata": None}
    text = {"numpy_type": "object", "pandas_type": "unicode", "metadata": None}
    described = {
        "index_columns": ["task"], "column_indexes": [], "pandas_version": "2.0.0",
        "columns": [{"name": "task_index", "field_name": "task_index", **column}, {"name": "task", "field_name": "task", **text}],
    }  # fmt: skip
    return table.replace_schema_metadata({b"pandas": json.dumps(described).encode()})
