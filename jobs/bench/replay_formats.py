"""The same episodes in the formats that ``replay.py`` compares: the writers, the readers.

A reader takes windows ``(episode, t)`` and returns the arrays of ``Batch``. So that what is compared is storage and decoding,
every reader but the first keeps actions, proprioception and values in memory, and none pays for choosing its windows.
"""

import importlib.util
import io
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa

from cosmos_ray.replay import Episode
from jobs.bench.replay_episodes import CAMERAS, CHUNK, Batch, Vectors, Window, decode
from jobs.bench.replay_videos import VIDEO, LeRobot, LeRobotPyAV, write_lerobot

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
