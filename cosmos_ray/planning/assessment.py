"""Errors of a policy's world model and value function on recorded episodes outside the training data. No simulator, no Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.evidence import auc
from cosmos_ray.model import sampling
from cosmos_ray.model.images import prepare
from cosmos_ray.model.injection import probability
from cosmos_ray.model.latents import action_frame, current_latents, read_future_images, read_future_proprio
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.spec import PolicySpec
from cosmos_ray.planning.scoring import value_samples
from cosmos_ray.replay.format.codec import decode_jpeg
from cosmos_ray.replay.format.view import EpisodeView

MOVED = 10  #: grey levels of 255, in any colour, from which a pixel counts as moved
#: Value estimates of a chunk -> the sample type that trains each.
ESTIMATES = {"V(real s')": SampleType.VALUE_FUTURE, "V(imagined s')": SampleType.VALUE_FUTURE, "Q(s,a)": SampleType.VALUE_ACTION}
ROWS = 64  #: windows of one forward pass


@dataclass
class Chains:
    """M chains of H consecutive chunks, with the states before, between and after the chunks."""

    images: np.ndarray  #: (M, H + 1, cameras, h, w, 3) uint8
    proprio: np.ndarray  #: (M, H + 1, p) float32
    actions: np.ndarray  #: (M, H, K, d) float32, as executed, physical units
    success: np.ndarray  #: (M,) bool, of the whole episode
    instructions: list[str]  #: M

    def __len__(self) -> int:
        return len(self.success)


def recorded_chains(views: Sequence[EpisodeView], cameras: Sequence[str], chunk: int, horizon: int, most: int, seed: int) -> Chains | None:
    """Up to ``most`` chains of ``horizon`` chunks, drawn from the episodes without replacement; None when every episode is too short.

    A chain needs stored frames of all its states.
    """
    starts = []
    for number, view in enumerate(views):
        steps = set(view.summary.frame_steps.tolist())
        ends = range(0, (horizon + 1) * chunk, chunk)
        starts += [(number, t) for t in sorted(steps) if all(t + end in steps for end in ends)]
    if not starts:
        return None
    chosen = np.random.default_rng(seed).permutation(len(starts))[:most]
    images, proprio, actions = [], [], []
    for number, t in (starts[i] for i in chosen):
        view, states = views[number], [t + chunk * i for i in range(horizon + 1)]
        images.append([[decode_jpeg(view.frame(camera, step)) for camera in cameras] for step in states])
        proprio.append(view.column("proprio")[states])
        actions.append(view.column("action")[t : t + horizon * chunk].reshape(horizon, chunk, -1))
    of = [(views[number], t) for number, t in (starts[i] for i in chosen)]
    return Chains(np.array(images), np.array(proprio), np.array(actions), np.array([view.summary.success for view, _ in of]),
                  [view.instruction_at(t) for view, t in of])


def assess(policy: CosmosPolicy, chains: Chains, planner: PlannerConfig, sample_types: Sequence[SampleType]) -> dict[str, Any]:
    """``{"windows", "successes", "values": {estimate: AUC}, "world_model": [{"horizon", frame: {...}}]}``.

    The AUC says how well an estimate predicts the success of the episode. The estimates are V of the real s', V of the imagined s', and
    Q(s, a), as far as ``sample_types`` says that they were trained.

    The error of a frame is the mean absolute error over the pixels that really moved; ``copied`` is the error of the chain's first frame in
    its place, and ``moving`` is the share of moved pixels. Errors of proprioception are in units of the normalised range, over all numbers.
    From the second chunk on, the world model sees its own images.
    """
    horizon = chains.actions.shape[1]
    asked = [(name, sample_type) for name, sample_type in ESTIMATES.items() if sample_type in sample_types]
    values: dict[str, list[np.ndarray]] = {name: [] for name, _ in asked}
    sums = [{name: np.zeros(4) for name in ("proprioception", *policy.spec.cameras)} for _ in range(horizon)]
    for first in range(0, len(chains), ROWS):
        rows = slice(first, first + ROWS)
        images, proprio = _resized(chains.images[rows], policy.spec), chains.proprio[rows]
        text, seeds = policy.embed(chains.instructions[rows]), torch.arange(first, first + len(images))
        seen, felt = images[:, 0], proprio[:, 0]
        for step in range(horizon):
            known = current_latents(policy, seen, felt)
            known[:, :, policy.layout.action] = action_frame(policy, chains.actions[rows][:, step])
            imagined = sampling.imagine(policy, known, text, seeds, planner.future_steps)
            seen = read_future_images(policy, imagined, seen).cpu().numpy()
            felt = read_future_proprio(policy, imagined).cpu().numpy()
            _add_errors(sums[step], policy, seen, images[:, step + 1], images[:, 0], (felt, proprio[:, step + 1], proprio[:, 0]))
            if step == 0:
                real = known.clone()
                after = current_latents(policy, images[:, 1], proprio[:, 1])
                real[:, :, list(policy.layout.future)] = after[:, :, list(policy.layout.current)]
                latents = {"V(real s')": real, "V(imagined s')": imagined, "Q(s,a)": known}
                for name, sample_type in asked:
                    samples = value_samples(policy, latents[name], text, seeds, planner, sample_type)
                    values[name].append(probability(samples).mean(1).cpu().numpy())
    return {"windows": len(chains), "successes": int(chains.success.sum()),
            "values": {name: auc(np.concatenate(found), chains.success) for name, found in values.items()},
            "world_model": [{"horizon": step + 1, **{name: _ratio(sums[step][name]) for name in sums[step]}} for step in range(horizon)]}


def _resized(images: np.ndarray, spec: PolicySpec) -> np.ndarray:
    """(M, states, cameras, h, w, 3) uint8 in the size of the frames that the network imagines."""
    frames = prepare(images.reshape(-1, *images.shape[2:]), spec.image_size, jpeg=False, centre_crop=False,
                     resize=spec.resize)
    return frames.reshape(*images.shape[:3], *frames.shape[2:])


def _add_errors(sums: dict[str, np.ndarray], policy: CosmosPolicy, imagined: np.ndarray, real: np.ndarray, before: np.ndarray,
                vectors: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Add (sum of errors, sum of copying errors, counted numbers, all numbers) of one batch to the sums of every frame.

    Images are (rows, cameras, h, w, 3) uint8; ``vectors`` are imagined, real and first proprioception, (rows, p) each.
    """
    for camera, name in enumerate(policy.spec.cameras):
        guess, truth, start = (x[:, camera].astype(np.float32) for x in (imagined, real, before))
        copied = np.abs(truth - start)
        moved = copied.max(-1) > MOVED
        sums[name] += (np.abs(truth - guess).mean(-1)[moved].sum(), copied.mean(-1)[moved].sum(), moved.sum(), moved.size)
    guess, truth, start = (policy.proprio_scale.normalize(torch.as_tensor(v).to(policy.device)).cpu().numpy() for v in vectors)
    sums["proprioception"] += (np.abs(truth - guess).sum(), np.abs(truth - start).sum(), truth.size, truth.size)


def _ratio(sums: np.ndarray) -> dict[str, float | None]:
    error, copied, count, total = sums.tolist()
    return {"error": error / count if count else None, "copied": copied / count if count else None,
            "change": error / copied - 1 if copied else None, "moving": count / total}
