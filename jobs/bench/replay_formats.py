"""The same episodes in the formats that ``bench_replay.py`` compares: their synthetic frames, the writers, the readers.

A reader takes windows ``(episode, t)`` and returns the arrays of ``Batch``. So that what is compared is storage and decoding,
every reader but the first keeps actions, proprioception and values in memory, and none pays for choosing its windows.
"""

import importlib.util
import io
import json
import os
from pathlib import Path

import av
import cv2
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.reformatter import VideoReformatter

from cosmos_ray.replay import Episode, EpisodeKey, value_targets
from cosmos_ray.replay.exchange.video import open_video
from cosmos_ray.replay.format.codec import encode_jpeg

CAMERAS = ("agentview", "robot0_eye_in_hand")
CHUNK, GAMMA, FPS = 16, 0.998, 20
RGB = getattr(cv2, "IMREAD_COLOR_RGB", None)  # OpenCV 4.11 and later decode to RGB themselves

Window = tuple[int, int]  #: number of the episode, step t
Batch = dict[str, np.ndarray]  #: images and future_images (B, C, H, W, 3) uint8; actions, proprio, future_proprio, value


# ---------------------------------------------------------------- the episodes


def jpeg_size(size: int) -> int:
    """Bytes of a JPEG of a rendered scene at quality 95, 4:4:4: 36 kB at 224 pixels, 3.6 kB at 64."""
    return round(size * size * (0.72 if size >= 128 else 0.88))


def scene(rng: np.random.Generator, size: int, grain: float) -> np.ndarray:
    """A background larger than the frame, (S, S, 3) uint8: texture at every scale, the finest with amplitude ``grain``."""
    side = size + 48
    image = np.full((side, side, 3), 128, np.float32)
    for cells, amplitude in ((2, 45), (5, 25), (12, 12), (30, 6), (side // 3, grain), (side, grain)):
        luma = rng.normal(0, amplitude, (cells, cells, 1)) + rng.normal(0, amplitude / 5, (cells, cells, 3))
        image += cv2.resize(luma.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    return np.clip(image, 0, 255).astype(np.uint8)


def render(background: np.ndarray, size: int, t: int, phase: float, moving: bool) -> np.ndarray:
    """Frame ``t``: the background, which a wrist camera pans over, and two things that move. No noise of its own: a renderer has none."""
    x, y = (int(24 + 22 * f(t / 40 + phase)) for f in (np.sin, np.cos)) if moving else (24, 24)
    frame = background[y : y + size, x : x + size].copy()
    for number, colour in enumerate(((190, 60, 50), (60, 110, 180))):
        angle = t / 30 + phase + 2 * number
        where = (int(size * (0.5 + 0.3 * np.sin(angle))), int(size * (0.5 + 0.25 * np.cos(1.3 * angle))))
        cv2.circle(frame, where, size // (9 + 3 * number), colour, -1, cv2.LINE_AA)
        cv2.circle(frame, (where[0] - size // 40, where[1] - size // 40), size // 25, (230, 220, 215), -1, cv2.LINE_AA)
    return frame


def find_grain(size: int) -> float:
    """Amplitude of the finest texture at which a JPEG has about :func:`jpeg_size` bytes."""
    low, high = 0.0, 60.0
    for _ in range(9):
        grain = (low + high) / 2
        sizes = [len(encode_jpeg(render(scene(np.random.default_rng(seed), size, grain), size, 0, 0.0, False))) for seed in (0, 1)]
        low, high = (grain, high) if np.mean(sizes) < jpeg_size(size) else (low, grain)
    return grain


def make_episode(seed: int, size: int, length: int, grain: float) -> Episode:
    """A successful demonstration of ``length`` actions with frames at every step of two cameras."""
    rng = np.random.default_rng(seed)
    backgrounds = [scene(rng, size, grain) for _ in CAMERAS]
    frames = {t: [encode_jpeg(render(image, size, t, seed, bool(n))) for n, image in enumerate(backgrounds)] for t in range(length + 1)}
    actions = rng.uniform(-1, 1, (length, 7))
    return Episode(
        key=EpisodeKey("bench", "Lift", "demo", seed), instruction="lift the cube", cameras=CAMERAS, success=True,
        episode_return=1.0, timed_out=False, invalid="", policy_version=-1, actions=actions, labels=actions,
        rewards=np.zeros(length), proprio=rng.normal(size=(length + 1, 9)), states=rng.normal(size=(length + 1, 71)),
        step_versions=np.full(length, -1), predicted_values=np.full(length, np.nan), frames=frames,
    )  # fmt: skip


# ---------------------------------------------------------------- what the readers share


def decode(jpeg: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB by the cheapest call of OpenCV."""
    if RGB is not None:
        return cv2.imdecode(jpeg, RGB)
    return cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


class Vectors:
    """Everything of the windows but the frames, from memory."""

    def __init__(self, episodes: list[Episode], size: int) -> None:
        self.size = size
        self.lengths = [episode.length for episode in episodes]
        self._proprio = [episode.proprio for episode in episodes]
        self.values = [value_targets(episode.length, 1.0, GAMMA) for episode in episodes]
        last = [np.repeat(episode.actions[-1:], CHUNK, 0) for episode in episodes]
        self._actions = [np.concatenate([episode.actions, end]) for episode, end in zip(episodes, last, strict=True)]

    def batch(self, windows: list[Window]) -> tuple[Batch, list[int]]:
        """The batch with its frames still empty, and the future step of every window."""
        future = [min(t + CHUNK, self.lengths[e]) for e, t in windows]
        shape = (len(windows), len(CAMERAS), self.size, self.size, 3)
        return {
            "images": np.empty(shape, np.uint8),
            "future_images": np.empty(shape, np.uint8),
            "proprio": np.stack([self._proprio[e][t] for e, t in windows]),
            "future_proprio": np.stack([self._proprio[e][f] for (e, _), f in zip(windows, future, strict=True)]),
            "actions": np.stack([self._actions[e][t : t + CHUNK] for e, t in windows]),
            "value": np.array([self.values[e][f] for (e, _), f in zip(windows, future, strict=True)], np.float32),
        }, future


# ---------------------------------------------------------------- HDF5

_HDF5_CAMERAS = ("primary_images_jpeg", "wrist_images_jpeg")


def write_hdf5(folder: Path, episodes: list[Episode]) -> None:
    """One file per episode as the public cosmos-policy evaluation writes its rollouts: variable-length uint8, one JPEG per step."""
    folder.mkdir()
    for number, episode in enumerate(episodes):
        with h5py.File(folder / f"{number}.hdf5", "w") as file:
            for camera, name in enumerate(_HDF5_CAMERAS):
                jpegs = [np.frombuffer(episode.frames[t][camera], np.uint8) for t in range(episode.length + 1)]
                file.create_dataset(name, data=jpegs, dtype=h5py.vlen_dtype(np.dtype("uint8")))
            file.create_dataset("actions", data=episode.actions)
            file.create_dataset("proprio", data=episode.proprio)
            file.attrs["success"], file.attrs["task_description"] = True, episode.instruction


class EpisodeHDF5:
    """The public cosmos-policy loader's way with rollouts (``libero_dataset.py``): for every sample it opens the episode's file,
    reads all JPEGs of both cameras and all actions and proprioception, and decodes the four frames it needs with Pillow.

    Only that is imitated, not the augmentation and the copies of blank images that follow. Returns are computed when it starts,
    as there. (Its demonstrations it decodes whole into memory when it starts, which a replay store cannot; its RoboCasa and
    ALOHA loaders can read single frames, opening the file for each sample all the same.)
    """

    batched = False

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        from PIL import Image

        self._image, self._folder, self._vectors = Image, folder, vectors

    def read(self, windows: list[Window]) -> Batch:
        samples = [self._sample(*window) for window in windows]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, number: int, t: int) -> Batch:
        with h5py.File(self._folder / f"{number}.hdf5", "r") as file:
            jpegs = [file[name][:] for name in _HDF5_CAMERAS]
            actions, proprio = file["actions"][:].astype(np.float32), file["proprio"][:].astype(np.float32)
        future = min(t + CHUNK, self._vectors.lengths[number])
        steps = np.minimum(np.arange(t, t + CHUNK), len(actions) - 1)
        return {
            "images": np.stack([self._decode(camera[t]) for camera in jpegs]),
            "future_images": np.stack([self._decode(camera[future]) for camera in jpegs]),
            "proprio": proprio[t],
            "future_proprio": proprio[future],
            "actions": actions[steps],
            "value": self._vectors.values[number][future],
        }

    def _decode(self, jpeg: np.ndarray) -> np.ndarray:
        return np.array(self._image.open(io.BytesIO(jpeg.tobytes())))

    def close(self) -> None:
        """Nothing stays open."""


class FrameHDF5:
    """The same files by a reader that takes pains: they stay open, only the four JPEGs are read, OpenCV decodes them."""

    batched = False

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        self._vectors = vectors
        self._files = [h5py.File(folder / f"{number}.hdf5", "r") for number in range(len(vectors.lengths))]
        self._cameras = [[file[name] for name in _HDF5_CAMERAS] for file in self._files]

    def read(self, windows: list[Window]) -> Batch:
        batch, futures = self._vectors.batch(windows)
        for row, ((number, t), future) in enumerate(zip(windows, futures, strict=True)):
            for camera, dataset in enumerate(self._cameras[number]):
                batch["images"][row, camera] = decode(dataset[t])
                batch["future_images"][row, camera] = decode(dataset[future])
        return batch

    def close(self) -> None:
        for file in self._files:
            file.close()


# ---------------------------------------------------------------- Lance


def write_lance(folder: Path, episodes: list[Episode]) -> None:
    """One row per state, the JPEGs as binary columns."""
    import lance

    images = {name: pa.array([e.frames[t][camera] for e in episodes for t in range(e.length + 1)], pa.large_binary())
              for camera, name in enumerate(CAMERAS)}
    index = {"episode": pa.array(np.repeat(np.arange(len(episodes)), [e.length + 1 for e in episodes])),
             "step": pa.array(np.concatenate([np.arange(e.length + 1) for e in episodes]))}
    lance.write_dataset(pa.table(index | images), str(folder))


class Lance:
    """One ``take`` per batch of the rows it needs, in order and each once, as Lance likes it; OpenCV decodes."""

    batched = True  #: reads many windows at once for less than one by one

    def __init__(self, folder: Path, vectors: Vectors) -> None:
        import lance

        self._dataset, self._vectors = lance.dataset(str(folder)), vectors
        self._first = np.cumsum([0, *(length + 1 for length in vectors.lengths)])

    def read(self, windows: list[Window]) -> Batch:
        batch, futures = self._vectors.batch(windows)
        first = self._first[[number for number, _ in windows]]
        rows, where = np.unique(np.concatenate([first + [t for _, t in windows], first + futures]), return_inverse=True)
        table = self._dataset.take(rows, columns=list(CAMERAS)).combine_chunks()
        for camera, name in enumerate(CAMERAS):
            _, offsets, data = table.column(name).chunk(0).buffers()
            offsets, data = np.frombuffer(offsets, np.int64), np.frombuffer(data, np.uint8)
            for i, row in enumerate(where):
                out = batch["images" if i < len(windows) else "future_images"]
                out[i % len(windows), camera] = decode(data[offsets[row] : offsets[row + 1]])
        return batch

    def close(self) -> None:
        """Nothing to close by hand."""


# ---------------------------------------------------------------- LeRobot v3

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


# ---------------------------------------------------------------- all of them

#: Reader, folder and needed module by the key of the ratio.
COMPETITORS = {
    "vs_hdf5_episode_jpeg": (EpisodeHDF5, "hdf5", "PIL"),
    "vs_h5py_frame_jpeg": (FrameHDF5, "hdf5", "h5py"),
    "vs_lance": (Lance, "lance", "lance"),
    "vs_lerobot_v3": (LeRobot, "libsvtav1", "av"),
    "vs_lerobot_v3_h264": (LeRobot, "h264", "av"),
    "vs_lerobot_v3_pyav": (LeRobotPyAV, "libsvtav1", "av"),
}


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def write_all(folder: Path, episodes: list[Episode], size: int, progress=lambda text: None) -> None:
    """The episodes in every format whose module is installed."""
    progress("writing HDF5")
    write_hdf5(folder / "hdf5", episodes)
    if installed("lance"):
        progress("writing Lance")
        write_lance(folder / "lance", episodes)
    for codec in VIDEO:
        write_lerobot(folder / codec, episodes, size, codec, progress)


# ---------------------------------------------------------------- plain files


def write_fsync(data: bytes, path: Path) -> None:
    """A new file, synced; its name is not."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_durable(data: bytes, path: Path) -> None:
    """The same under a temporary name, renamed, and the directory synced: what is needed for it to be there after a crash."""
    temporary = path.with_suffix(".tmp")
    write_fsync(data, temporary)
    os.rename(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
