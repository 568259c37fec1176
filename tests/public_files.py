"""Files as the public cosmos-policy repository reads and writes them, of real shapes and few: weights, statistics, embeddings, episodes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py
import numpy as np
import torch

from cosmos_ray.config import ModelConfig
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.transformer import Transformer

WIDTH = {"model.width": "64", "model.heads": "2", "model.layers": "2", "model.image-size": "64"}  #: of the networks made here


def vae(folder: Path) -> Path:
    """A Wan 2.1 VAE of few channels, as diffusers keeps it."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).save_pretrained(folder)
    return folder


def weights(file: Path, seed: int = 1) -> Path:
    """A policy's ``.pt``: ``net.`` before every name, bfloat16, with the counters and states that training leaves in it."""
    spec = make_spec(ModelConfig(preset="cosmos-predict2-2b", width=64, heads=2, layers=2), ("a", "b"), 7, 9)
    net, generator = Transformer(spec.transformer), torch.Generator().manual_seed(seed)
    net.initialize(generator)
    state = {f"net.{k}": (v + 0.02 * torch.randn(v.shape, generator=generator)).bfloat16() for k, v in net.state_dict().items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"net.accum_iteration": torch.tensor(3), "net.pos_embedder.seq": torch.arange(8)}, file)
    return file


def statistics(file: Path, action_dim: int, proprio_dim: int) -> Path:
    """``dataset_statistics.json`` with everything that the public code writes into it."""
    record: dict[str, list[float]] = {}
    for group, size in (("actions", action_dim), ("proprio", proprio_dim)):
        record |= {f"{group}_min": [-1.5] * size, f"{group}_max": [1.5] * size, f"{group}_mean": [0.0] * size, f"{group}_std": [0.5] * size,
                   f"{group}_median": [0.0] * size}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))
    return file


def embeddings(file: Path, texts: Sequence[str]) -> Path:
    """``t5_embeddings.pkl``: {instruction: (1, 512, 1024) bfloat16, zero past the words}."""
    held = {}
    for number, text in enumerate(texts):
        words = len(text.split()) + 1
        held[text] = torch.zeros(1, 512, 1024, dtype=torch.bfloat16)
        held[text][0, :words] = torch.randn(words, 1024, generator=torch.Generator().manual_seed(number)).bfloat16()
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "wb") as stream:
        pickle.dump(held, stream)
    return file


def pictures(steps: int, size: int, seed: int) -> np.ndarray:
    """(steps, size, size, 3) uint8: a bright disc that moves over a shaded table."""
    y, x = np.mgrid[0:size, 0:size] / size
    rng = np.random.default_rng(seed)
    start, end, colour = rng.uniform(0.2, 0.8, 2), rng.uniform(0.2, 0.8, 2), rng.integers(60, 255, 3)
    out = np.empty((steps, size, size, 3), np.uint8)
    for i in range(steps):
        centre = start + (end - start) * i / max(1, steps - 1)
        table = np.stack([60 + 80 * x, 60 + 80 * y, np.full_like(x, 90)], -1)
        out[i] = np.where((np.hypot(x - centre[0], y - centre[1]) < 0.12)[..., None], colour, table)
    return out


def _jpegs(group: h5py.Group, name: str, frames: np.ndarray) -> None:
    kind = h5py.special_dtype(vlen=np.dtype("uint8"))
    held = group.create_dataset(name, (len(frames),), dtype=kind)
    for i, frame in enumerate(frames):
        held[i] = cv2.imencode(".jpg", frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].reshape(-1)


def demonstrations(file: Path, cameras: Sequence[str], texts: Sequence[str] | None, count: int = 2, steps: int = 24, size: int = 256,
                   actions: int = 7) -> Path:
    """LIBERO-Cosmos-Policy and RoboCasa-Cosmos-Policy, ``success_only``: ``data/demo_i`` with JPEGs, robot states and actions.

    RoboCasa keeps each demonstration's own instruction (``texts``); LIBERO has it in the file's name.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as root:
        for i in range(count):
            rng, demo = np.random.default_rng(i), root.create_group(f"data/demo_{i}")
            for number, camera in enumerate(cameras):
                _jpegs(demo.require_group("obs"), f"{camera}_jpeg", pictures(steps, size, 10 * i + number))
            demo["actions"] = rng.uniform(-1, 1, (steps, actions))
            demo["robot_states"] = rng.uniform(-1, 1, (steps, 9))
            if texts:
                demo.attrs["task_description"] = texts[i % len(texts)]
    return file


def rollouts(folder: Path, suite: str, cameras: Sequence[str], text: str, count: int = 2, steps: int = 20, size: int = 256) -> Path:
    """``all_episodes``, and what the evaluation scripts write with ``--data_collection True``: a file per episode."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng, success = np.random.default_rng(100 + i), i % 2 == 0
        name = f"episode_data--suite={suite}--2025_10_01-12_00_0{i}--task={i}--ep={i}--success={success}--x.hdf5"
        with h5py.File(folder / name, "w") as root:
            for number, camera in enumerate(cameras):
                _jpegs(root, f"{camera}_images_jpeg", pictures(steps, size, 50 + 10 * i + number))
            root["actions"], root["proprio"] = rng.uniform(-1, 1, (steps, 7)), rng.uniform(-1, 1, (steps, 9))
            root.attrs["success"], root.attrs["task_description"] = success, text
    return folder


def aloha(folder: Path, count: int = 2, steps: int = 60, size: int = 256) -> Path:
    """ALOHA-Cosmos-Policy, preprocessed: ``episode_i.hdf5`` and a video of each of the three cameras beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng, names = np.random.default_rng(i), ("cam_high", "cam_left_wrist", "cam_right_wrist")
        qpos = np.cumsum(rng.normal(0, 0.02, (steps, 14)), axis=0).astype(np.float32)
        with h5py.File(folder / f"episode_{i}.hdf5", "w") as root:
            root.attrs["sim"] = False
            for key, value in (("qpos", qpos), ("qvel", np.gradient(qpos, axis=0)), ("effort", np.zeros_like(qpos))):
                root[f"observations/{key}"] = value
            root["action"] = np.concatenate([qpos[1:], qpos[-1:]])
            root["relative_action"] = np.diff(qpos, axis=0, append=qpos[-1:])
            for number, name in enumerate(names):
                video = cv2.VideoWriter(str(folder / f"episode_{i}_{name}.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (size, size))
                for frame in pictures(steps, size, 10 * i + number):
                    video.write(frame[..., ::-1])
                video.release()
                root[f"observations/video_paths/{name}"] = f"episode_{i}_{name}.mp4".encode()
    return folder
