"""LeRobot itself, run by the interpreter that has it: ``read FOLDER OUT.npz`` gives all rows of a dataset, ``write FOLDER KIND`` makes one.

Nothing here imports cosmos_ray.
"""

import sys
from importlib import import_module

import numpy as np

LeRobotDataset = import_module("lerobot.datasets.lerobot_dataset").LeRobotDataset  # no requirement of this package
STEPS = (9, 7)


def read(folder, out):
    dataset = LeRobotDataset("a/b", root=folder, video_backend="pyav")
    rows = [dataset[i] for i in range(len(dataset))]
    arrays = {"fps": np.array(dataset.fps), "task": np.array([row["task"] for row in rows])}
    for name, value in rows[0].items():
        if not isinstance(value, str):
            column = np.stack([np.asarray(row[name]) for row in rows])
            if name in dataset.meta.camera_keys:
                column = (column * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
            arrays[name] = column
    np.savez(out, **arrays)


def picture(episode, t, camera):
    """(48, 64, 3) uint8, smooth, and another one at every step."""
    y, x = np.mgrid[0:48, 0:64]
    waves = [np.sin(0.11 * x + 0.5 * t + camera), np.cos(0.13 * y + 0.3 * t + episode), np.sin(0.05 * (x + y) + 0.4 * t)]
    return (np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def write(folder, kind):
    names = ["height", "width", "channels"]
    features = {f"observation.images.{name}": {"dtype": kind, "shape": (48, 64, 3), "names": names} for name in ("front", "wrist")}
    features |= {name: {"dtype": "float32", "shape": (size,), "names": None} for name, size in (("observation.state", 6), ("action", 7))}
    dataset = LeRobotDataset.create("a/b", 15, features, root=folder, use_videos=kind == "video", video_backend="pyav")
    for episode, steps in enumerate(STEPS):
        rng = np.random.default_rng(episode)
        for t in range(steps):
            frame = {"observation.state": rng.normal(size=6).astype(np.float32), "action": rng.normal(size=7).astype(np.float32)}
            frame |= {f"observation.images.{name}": picture(episode, t, camera) for camera, name in enumerate(("front", "wrist"))}
            dataset.add_frame({**frame, "task": "open the box" if t < 4 else f"take cube {episode}"})
        dataset.save_episode()
    dataset.finalize()


if __name__ == "__main__":
    {"read": read, "write": write}[sys.argv[1]](*sys.argv[2:])
