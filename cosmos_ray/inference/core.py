"""Answering requests for action chunks, without Ray: group, batch, decide, stamp with the policy version."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from cosmos_ray.config import InferenceConfig
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.inference.messages import ActReply, ActRequest, WrongVersion
from cosmos_ray.model.checkpoint import load_policy
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.speed.accelerate import accelerate
from cosmos_ray.planning.best_of_n import act_directly, plan
from cosmos_ray.weights import Weights, unpack


class InferenceCore:
    """One policy and its version, and the network that judges its candidates if that is another one. ``answer`` and ``set_weights``
    must not run at the same time."""

    def __init__(self, policy: CosmosPolicy, version: int, judge: CosmosPolicy | None = None, judge_name: str = ""):
        self.policy, self.version, self.judge, self.judge_name = policy.eval(), version, judge and judge.eval(), judge_name
        policy.serve()
        if judge is not None:
            judge.serve()

    def set_weights(self, weights: Weights) -> int:
        """Adopt newer weights (older ones are ignored, so late messages do no harm); returns the version now held."""
        if weights.version > self.version:
            unpack(weights, self.policy.net)
            self.policy.serve()
            self.version = weights.version
        return self.version

    def answer(self, requests: list[ActRequest]) -> list[ActReply | CosmosRayError]:
        """Answer many requests in as few forward passes as their settings allow; a bad request fails alone."""
        replies: list[ActReply | CosmosRayError | None] = [None] * len(requests)
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            if request.version is not None and request.version != self.version:
                replies[i] = WrongVersion(f"policy version {request.version} was asked for, this actor holds {self.version}")
            elif request.version is not None and request.judge != self.judge_name:
                replies[i] = WrongVersion(f"{request.judge or 'the policy itself'} was asked to judge, this actor holds "
                                          f"{self.judge_name or 'no other network'}")
            else:
                key = (request.steps, request.planner, request.decode_futures, request.images.shape[1:], request.proprio.shape[1:])
                groups[key].append(i)
        for members in groups.values():
            try:
                answers = self._answer_alike([requests[i] for i in members])
            except CosmosRayError as error:
                answers = [error] * len(members)
            for i, answer in zip(members, answers, strict=True):
                replies[i] = answer
        return replies

    def _answer_alike(self, requests: list[ActRequest]) -> list[ActReply]:
        first = requests[0]
        images = np.concatenate([r.images for r in requests])
        known = self.policy.current_latents(images, np.concatenate([r.proprio for r in requests]))
        instructions = [i for r in requests for i in r.instructions]
        text = self.policy.embed(instructions)
        seeds = torch.from_numpy(np.concatenate([r.seeds for r in requests]).astype(np.int64))
        if first.planner is None:
            decision = act_directly(self.policy, known, text, seeds, first.steps)
        else:
            judge = (self.judge, self.judge.embed(instructions)) if self.judge is not None else None
            decision = plan(self.policy, known, text, seeds, first.steps, first.planner, judge)
        futures = self.policy.read_future_images(decision.latents, images) if first.decode_futures else None
        replies, start = [], 0
        for request in requests:
            rows = slice(start, start := start + len(request.seeds))
            cut = lambda tensor, rows=rows: tensor[rows].cpu().numpy()  # noqa: E731
            replies.append(ActReply(cut(decision.actions), cut(decision.values), cut(decision.scores), cut(decision.chosen),
                                    self.version, cut(decision.candidates), None if futures is None else cut(futures)))
        return replies


def load_core(checkpoint: str | Path, config: InferenceConfig, device: str, judge: str | Path = "") -> InferenceCore:
    """The policy of a checkpoint, ready to answer on ``device`` ("cpu" or "cuda") as ``config`` wants; ``judge`` is the checkpoint of
    the network that judges candidates, if it is another one."""
    policy, version = _load(checkpoint, config, device)
    return InferenceCore(policy, version, _load(judge, config, device)[0] if judge else None, str(judge))


def _load(checkpoint: str | Path, config: InferenceConfig, device: str) -> tuple[CosmosPolicy, int]:
    half = config.precision == "bf16" or (config.precision == "auto" and device == "cuda")
    dtype = torch.bfloat16 if half else torch.float32
    policy, version = load_policy(checkpoint, dtype)
    policy.reference_steps = config.reference_steps
    accelerate(policy.place(device, dtype), config.accelerate)
    return policy, version
