"""The episodes as LeRobot v3 videos: the writer and two readers."""

import json
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from cosmos_ray.replay import Episode
from cosmos_ray.replay.exchange.video import open_video
from jobs.bench.replay_episodes import CAMERAS, FPS, Batch, Vectors, Window, decode

#: The encoder options LeRobot sets: a key frame every second frame, constant quality 30, and the default codec's preset. One worker thread
#: for AV1: with many, on a busy machine, the container once refused a packet.
VIDEO = {"libsvtav1": {"g": "2", "crf": "30", "preset": "12", "svtav1-params": "lp=1"}, "h264": {"g": "2", "crf": "30"}}


def write_lerobot(folder: Path, episodes: list[Episode], size: int, codec: str, progress=lambda text: None) -> None:
    """The layout of a LeRobot v3 dataset: all episodes in one mp4 per camera and one Parquet file."""
    first = np.cumsum([0, *(e.length + 1 for e in episodes)])
    for camera, name in enumerate(CAMERAS):
        path = folder / "videos" / f"observation.images.{name}" / "chunk-000" / "file-000.mp4"
        path.parent.mkdir(parents=True)
        output, stream = open_video(path, codec, FPS, (size, size), VIDEO[codec])
        with output:
            for number, episode in enumerate(episodes):
                progress(f"{codec}, camera {camera + 1}/{len(CAMERAS)}, episode {number + 1}/{len(episodes)}")
                for t in range(episode.length + 1):
                    image = decode(np.frombuffer(episode.frames[t][camera], np.uint8))
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            output.mux(stream.encode())
    rows = {"action": [], "observation.state": [], "frame_index": [], "episode_index": []}
    for number, episode in enumerate(episodes):
        rows["action"].extend([*episode.actions, episode.actions[-1]])
        rows["observation.state"].extend(episode.proprio)
        rows["frame_index"].extend(range(episode.length + 1))
        rows["episode_index"].extend([number] * (episode.length + 1))
    rows["timestamp"] = np.array(rows["frame_index"], np.float32) / FPS
    meta = {"episode_index": np.arange(len(episodes)), "length": np.diff(first)}
    for name in CAMERAS:
        meta[f"videos/observation.images.{name}/from_timestamp"] = first[:-1] / FPS
    for part, table in (("data", rows), ("meta/episodes", meta)):
        (folder / part / "chunk-000").mkdir(parents=True)
        pq.write_table(pa.table({name: pa.array(list(values)) for name, values in table.items()}),
                       folder / part / "chunk-000" / "file-000.parquet")
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0", "fps": FPS, "total_episodes": len(episodes)}))


class LeRobot:
    """Frames of the mp4 files by PyAV: the container and its decoder stay open, a read seeks to the key frame and decodes on.

    LeRobot's own reader does the same through torchcodec; it pins an older PyTorch than this project and needs FFmpeg's shared
    libraries, so it is not what is timed. One decoding thread, like the others.
    """

    batched = False

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        self._vectors, self._reformat = vectors, VideoReformatter().reformat
        self._paths = [str(folder / "videos" / f"observation.images.{name}" / "chunk-000" / "file-000.mp4") for name in CAMERAS]
        self._open = [self._opened(camera) for camera in range(len(CAMERAS))]
        meta = pq.read_table(folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
        self._first = [meta[f"videos/observation.images.{name}/from_timestamp"].to_numpy() for name in CAMERAS]

    def read(self, windows: list[Window]) -> Batch:
        batch, futures = self._vectors.batch(windows)
        for row, ((number, t), future) in enumerate(zip(windows, futures, strict=True)):
            for camera in range(len(CAMERAS)):
                batch["images"][row, camera] = self._frame(camera, number, t)
                batch["future_images"][row, camera] = self._frame(camera, number, future)
        return batch

    def _opened(self, camera: int):
        container = av.open(self._paths[camera])
        container.streams.video[0].codec_context.thread_count = 1
        return container

    def _time(self, camera: int, number: int, step: int, stream) -> int:
        return round((self._first[camera][number] + step / FPS) / stream.time_base)

    def _frame(self, camera: int, number: int, step: int) -> np.ndarray:
        container = self._open[camera]
        stream = container.streams.video[0]
        wanted = self._time(camera, number, step, stream)
        container.seek(wanted, stream=stream)
        for frame in container.decode(stream):
            if frame.pts >= wanted:
                return self._reformat(frame, format="rgb24").to_ndarray()
        raise ValueError(f"no frame at step {step} of episode {number}")

    def close(self) -> None:
        for container in self._open:
            container.close()


class LeRobotPyAV(LeRobot):
    """What LeRobot does where torchcodec is not installed (its ``pyav`` backend): for each sample and camera it opens the file,
    seeks to the key frame before the first of the wanted frames and converts every frame up to the last one."""

    def read(self, windows: list[Window]) -> Batch:
        batch, futures = self._vectors.batch(windows)
        for row, ((number, t), future) in enumerate(zip(windows, futures, strict=True)):
            for camera in range(len(CAMERAS)):
                batch["images"][row, camera], batch["future_images"][row, camera] = self._ends(camera, number, t, future)
        return batch

    def _ends(self, camera: int, number: int, step: int, future: int) -> tuple[np.ndarray, np.ndarray]:
        with self._opened(camera) as container:
            stream = container.streams.video[0]
            first, last = (self._time(camera, number, t, stream) for t in (step, future))
            container.seek(first, stream=stream)
            frames = {}
            for frame in container.decode(stream):
                frames[frame.pts] = self._reformat(frame, format="rgb24").to_ndarray()
                if frame.pts >= last:
                    return frames[first], frames[last]
        raise ValueError(f"no frame at step {future} of episode {number}")
