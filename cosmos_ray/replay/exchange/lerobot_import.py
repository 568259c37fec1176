"""LeRobot datasets of format v3.0 into a store, written by this package or by any other.

A row is (observation ``t``, action ``t``) for ``t`` in ``0..T - 1``; what the last action led to is not part of the format. So an episode
here has the first ``T - 1`` actions between the ``T`` observations, and nothing is invented: ``states`` (the simulator's) are one column of
nan, rewards are zero where the dataset has none, and the reward of the left-out action counts as the last one's.

Pictures inside of the tables are taken over byte for byte where they are JPEGs. Videos are decoded and stored as JPEGs, which costs
a second lossy step on top of the video's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange.importing import ImportOptions, Notes, Skip, attempt
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import SOURCES, Episode, EpisodeKey

MOST_PIXELS = 1 << 24  # of one picture
PICTURES = "observation.images."


def read_lerobot(folder: Path, options: ImportOptions, notes: Notes) -> Iterator[Episode | Skip]:
    """Every episode of the dataset, one at a time.

    Source is that of the options, else what the dataset's episodes say, else ``demo``. Success is the last
    ``next.success``, else the episode's ``success``, else taken for granted, as in a dataset of demonstrations. StoreError for a folder
    that is no LeRobot v3.0 dataset.
    """
    dataset = _Dataset(folder)
    notes.total = len(dataset.episodes)
    for row in dataset.episodes:
        yield attempt(f"episode {row.get('episode_index')}", partial(dataset.read, row, options.source))


class _Dataset:
    """What the files under ``meta`` say, and the episodes on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            info = json.loads((folder / "meta" / "info.json").read_bytes())
            version, self.fps, features = info["codebase_version"], float(info["fps"]), dict(info["features"])
            self.cameras = {name.removeprefix(PICTURES): name for name, f in features.items() if f["dtype"] in ("image", "video")}
            self.videos = {name for name, feature in features.items() if feature["dtype"] == "video"}
            tables = sorted((folder / "meta" / "episodes").rglob("*.parquet"))
            if version != "v3.0" or not tables or not self.fps > 0:
                raise StoreError(f"{folder} is a LeRobot dataset of version {version!r} with {len(tables)} episode tables: v3.0 is read")
            self.episodes = [row for table in tables for row in _without_statistics(table)]
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
            raise StoreError(f"{folder} is not a LeRobot v3.0 dataset: {type(error).__name__} {reason}") from error
        optional = ("label", "next.reward", "next.success", "policy_version")
        self.columns = ["observation.state", "action", *(name for name in optional if name in features)]

    def read(self, row: dict[str, Any], source: str) -> Episode:
        """The episode of one row of the episodes' table. StoreError, or what the libraries raise."""
        length = int(row["length"])
        table = self._rows(row, length)
        state, action = (_matrix(table, name, length) for name in ("observation.state", "action"))
        steps = length - 1
        if steps < 1:
            raise StoreError(f"it has {length} rows, at least two are needed")
        frames = {camera: self._pictures(row, table, name, length) for camera, name in self.cameras.items()}
        success = self._success(row, table)
        rewards = np.zeros(length, np.float32)
        if "next.reward" in self.columns:
            rewards = _matrix(table, "next.reward", length)[:, 0]
        rewards, last = rewards[:steps].copy(), rewards[steps]
        rewards[-1] += last
        said = row.get("source")
        source = source or (said if said in SOURCES else None) or "demo"
        versions = np.full(steps, -1 if source == "demo" else 0)
        if "policy_version" in self.columns:
            versions = _matrix(table, "policy_version", length, np.int64)[:steps, 0]
        text = " ".join(map(str, row["tasks"]))
        begin = hashlib.sha256(state.tobytes() + action.tobytes()).hexdigest()[:16]
        return Episode(
            key=EpisodeKey(f"import:{self.folder.name}", text, source, int(row["episode_index"]), initial_state=begin),
            instruction=text, cameras=tuple(frames), success=success, episode_return=float(rewards.sum()), timed_out=not success,
            invalid="", policy_version=int(versions[0]), actions=action[:steps],
            labels=_matrix(table, "label", length)[:steps] if "label" in self.columns else action[:steps], rewards=rewards,
            proprio=state, states=np.full((length, 1), np.nan), step_versions=versions, predicted_values=np.full(steps, np.nan),
            frames={t: [images[t] for images in frames.values()] for t in range(length)} if frames else {},
            info={"imported": self.folder.name, "control_freq": self.fps}, score=row.get("score"),
        )  # fmt: skip

    def _rows(self, row: dict[str, Any], length: int) -> pa.Table:
        index = int(row["episode_index"])
        path = _numbered(self.folder / "data", row, "data", "parquet")
        names = [*self.columns, "frame_index", *(name for name in self.cameras.values() if name not in self.videos)]
        table = pq.read_table(path, columns=names, filters=[("episode_index", "=", index)])
        if table.num_rows != length or table["frame_index"].to_pylist() != list(range(length)):
            raise StoreError(f"{path} has {table.num_rows} rows of episode {index} instead of frames 0 to {length - 1}")
        return table

    def _success(self, row: dict[str, Any], table: pa.Table) -> bool:
        if "next.success" in self.columns:
            return bool(np.ravel(table["next.success"][-1].as_py())[0])
        return bool(row.get("success", True))

    def _pictures(self, row: dict[str, Any], table: pa.Table, name: str, length: int) -> list[bytes]:
        if name not in self.videos:
            return [_as_jpeg(value["bytes"], name) for value in table[name].to_pylist()]
        path = _numbered(self.folder / "videos" / _plain(name), row, f"videos/{name}", "mp4")
        try:
            return [encode_jpeg(picture) for picture in _decoded(path, float(row[f"videos/{name}/from_timestamp"]), self.fps, length)]
        except av.error.FFmpegError as error:
            raise StoreError(f"{path} cannot be decoded: {error}") from error


def _decoded(path: Path, begin: float, fps: float, length: int) -> list[np.ndarray]:
    """``length`` pictures from ``begin`` seconds on. StoreError unless the video has one at each of these times."""
    pictures: list[np.ndarray] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if not 0 < stream.width * stream.height <= MOST_PIXELS:
            raise StoreError(f"{path} has pictures of {stream.width}x{stream.height} pixels, at most {MOST_PIXELS} are read")
        tick = stream.time_base
        if not tick:
            raise StoreError(f"{path} does not say when its pictures are shown")
        container.seek(max(0, int(begin / tick)), stream=stream, backward=True)
        for frame in container.decode(stream):
            at = round((float((frame.pts or 0) * tick) - begin) * fps)
            if at == len(pictures):
                pictures.append(frame.to_ndarray(format="rgb24"))
            elif at > len(pictures):
                break
            if len(pictures) == length:
                return pictures
    raise StoreError(f"{path} has {len(pictures)} of {length} pictures from {begin:.3f} s on")


def _as_jpeg(data: bytes | None, name: str) -> bytes:
    """The bytes themselves if they are a JPEG, else (LeRobot writes PNG) the picture as one."""
    if not data:
        raise StoreError(f"{name} has a row without bytes: pictures in files beside the tables are not read")
    if data[:2] == b"\xff\xd8":
        decode_jpeg(data)
        return data
    import cv2

    picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if _png_pixels(data) <= MOST_PIXELS else None
    if picture is None:
        raise StoreError(f"{name} has a row that is neither JPEG nor PNG of up to {MOST_PIXELS} pixels")
    return encode_jpeg(picture[:, :, ::-1])


def _png_pixels(data: bytes) -> int:
    """Width times height as the header says, before anything is unpacked; too many for what is no PNG."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return MOST_PIXELS + 1
    return int.from_bytes(data[16:20], "big") * int.from_bytes(data[20:24], "big")


def _matrix(table: pa.Table, name: str, length: int, dtype: Any = np.float32) -> np.ndarray:
    """(length, d) values of a column. StoreError if rows differ in length or hold what is not finite."""
    values = np.array(table[name].to_pylist(), dtype=dtype).reshape(length, -1)
    if not np.isfinite(values).all():
        raise StoreError(f"{name} has values that are not finite")
    return values


def _numbered(below: Path, row: dict[str, Any], what: str, ending: str) -> Path:
    """Where format v3.0 puts a file. The patterns of info.json are not used: they could name any file."""
    path = below / f"chunk-{int(row[f'{what}/chunk_index']):03d}" / f"file-{int(row[f'{what}/file_index']):03d}.{ending}"
    if not path.is_file():
        raise StoreError(f"{path} is missing")
    return path


def _plain(name: str) -> str:
    if "/" in name or name.startswith("."):
        raise StoreError(f"feature {name!r} is no plain name")
    return name


def _without_statistics(table: Path) -> list[dict[str, Any]]:
    names = [name for name in pq.read_schema(table).names if not name.startswith("stats/")]
    return pq.read_table(table, columns=names).to_pylist()
