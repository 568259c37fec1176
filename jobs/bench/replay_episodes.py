"""The synthetic episodes of the replay benchmarks, and what the readers of every format share."""


import cv2
import numpy as np

from cosmos_ray.replay import Episode, EpisodeKey, value_targets
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
