"""Episodes that are a function of their number, so that whoever reads one back can tell whether it is what was committed."""

from __future__ import annotations

import functools
import zlib

import numpy as np
import pyarrow as pa

from cosmos_ray.errors import StoreError
from cosmos_ray.replay import Episode, EpisodeKey, ReplayStore, WindowBatch, WindowSampler
from cosmos_ray.replay.format.codec import decode_jpeg, encode_jpeg
from cosmos_ray.replay.format.episode import TRAINED

CAMERAS = ("wrist", "front")
TASKS = ("Lift", "Stack")
CHUNK = 4

pa.array(np.zeros(1))  # imports what Arrow imports on first use, pandas among it, here and not in every process

_IMAGES = np.random.default_rng(0).integers(0, 256, (61, 24, 24, 3), dtype=np.uint8)
_JPEGS = [encode_jpeg(image) for image in _IMAGES]  # made once: a writer's time is to go into its commits
_DECODED = [decode_jpeg(data) for data in _JPEGS]


def key_of(number: int) -> EpisodeKey:
    """The key of episode ``number``: the number is its seed."""
    return EpisodeKey("chaos", TASKS[number % 2], "demo" if number % 3 == 0 else "rollout", number)


def number_of(name: str) -> int:
    """The number in an episode name."""
    return int(name.rsplit("-", 3)[1])


def make_episode(number: int) -> Episode:
    """Episode ``number``: 3 to 60 steps, frames at every step of a demonstration and at the chunk ends of a rollout."""
    rng = np.random.default_rng(number)
    length = 60 if number % 5 == 0 else int(rng.integers(3, 15))
    demo = number % 3 == 0
    success = demo or number % 3 == 1
    steps = range(length + 1) if demo else sorted({*range(0, length + 1, CHUNK), length})
    actions = rng.uniform(-1, 1, (length, 4)).astype(np.float32)
    return Episode(
        key=key_of(number),
        instruction=f"do task {number}",
        cameras=CAMERAS,
        success=success,
        episode_return=float(success),
        timed_out=not success,
        invalid="",
        policy_version=-1 if demo else number % 7,
        actions=actions,
        labels=actions + np.float32(0.5),
        rewards=np.arange(length, dtype=np.float32),
        proprio=rng.normal(size=(length + 1, 9)).astype(np.float32),
        states=rng.normal(size=(length + 1, 21)),
        step_versions=np.full(length, number % 7),
        predicted_values=np.where(np.arange(length) % 3, np.nan, 0.25),
        frames={step: [_JPEGS[_image(number, step, camera)] for camera in range(len(CAMERAS))] for step in steps},
        info={"number": number, "crc": zlib.crc32(actions)},
    )


@functools.lru_cache(256)
def _expected(number: int) -> Episode:
    """Episode ``number``, to compare with and not to change."""
    return make_episode(number)


def _image(number: int, step: int, camera: int) -> int:
    return (31 * number + 7 * step + 3 * camera) % len(_JPEGS)


def difference(episode: Episode, number: int) -> str:
    """The first field in which ``episode`` is not episode ``number`` bit for bit, or ""."""
    for name, value in vars(_expected(number)).items():
        other = getattr(episode, name)
        if isinstance(value, np.ndarray):
            same = value.dtype == other.dtype and value.shape == other.shape and value.tobytes() == other.tobytes()
        elif name == "frames":
            same = {t: [bytes(i) for i in images] for t, images in other.items()} == value
        else:
            same = type(value) is type(other) and value == other
        if not same:
            return name
    return ""


def batch_difference(batch: WindowBatch) -> str:
    """The first row and field of a drawn batch that is not what its episode holds there, or ""."""
    made = {name: _expected(number_of(name)) for name in set(batch.episodes)}
    for row, (name, offset) in enumerate(zip(batch.episodes, batch.offsets.tolist(), strict=True)):
        number, episode = number_of(name), made[name]
        future = min(offset + CHUNK, episode.length)
        steps = np.minimum(np.arange(offset, offset + CHUNK), episode.length - 1)
        expected = {"proprio": episode.proprio[offset], "future_proprio": episode.proprio[future],
                    "actions": episode.actions[steps], "labels": episode.labels[steps]}
        for field, step in (("images", offset), ("future_images", future)):
            expected[field] = np.stack([_DECODED[_image(number, step, camera)] for camera in range(len(CAMERAS))])
        for field, value in expected.items():
            if not np.array_equal(np.asarray(getattr(batch, field)[row]), value):
                return f"{field} of {name} at step {offset}"
    return ""


def open_sampler(store: ReplayStore, seed: int) -> WindowSampler:
    """A sampler of this store's windows; refreshes the store."""
    return WindowSampler(store, chunk=CHUNK, gamma=0.99, seed=seed)


def draw_and_check(sampler: WindowSampler, rows: int) -> str:
    """Draw ``rows`` windows of every class that has some; the first wrong one, or "". StoreError as the sampler raises it."""
    for name in TRAINED:
        if sampler.counts()[name].windows:
            try:
                batch = sampler.draw(rows, name)
            except StoreError:
                if not sampler.counts()[name].windows:
                    continue  # its last episode turned out to be gone
                raise
            wrong = batch_difference(batch)
            if wrong:
                return wrong
    return ""
