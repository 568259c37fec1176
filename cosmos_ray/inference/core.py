"""Answering requests for action chunks, without Ray: group, batch, decide, stamp with the policy version."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cosmos_ray import instants
from cosmos_ray.config import InferenceConfig, PlannerConfig
from cosmos_ray.config.acting import JUDGED
from cosmos_ray.errors import CosmosRayError
from cosmos_ray.inference.messages import ActingPolicy, ActReply, ActRequest, WrongVersion
from cosmos_ray.memory import enough_memory
from cosmos_ray.model.checkpoint import load_checkpoint
from cosmos_ray.model.latents import current_latents, read_future_images
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import Prompts
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.speed.accelerate import accelerate, take_over
from cosmos_ray.planning.autopilot import Autopilot
from cosmos_ray.planning.best_of_n import Decision, act_directly, best_of_n
from cosmos_ray.planning.costs import kept_costs
from cosmos_ray.planning.sizes import batches_of, sample_all
from cosmos_ray.weights import Weights, check, write

logger = logging.getLogger(__name__)


class InferenceCore:
    """One policy, its version and, if there is one, a separate planning network that scores its candidates.

    ``answer`` and ``set_weights`` must not run at the same time.

    Args:
        planning_network: None lets the policy score its own candidates.
        planning_checkpoint: where the planning network came from; requests name it.
        checkpoint: folder of the policy, beside which its speed is kept for deadlines; "" keeps the speed in this process.
    """

    def __init__(self, policy: CosmosPolicy, version: int, planning_network: CosmosPolicy | None = None, planning_checkpoint: str = "",
                 checkpoint: str = ""):
        self.policy, self.version = policy.eval(), version
        self.planning_network, self.planning_checkpoint = planning_network and planning_network.eval(), planning_checkpoint
        self._checkpoint = checkpoint
        self._pilot: Autopilot | None = None
        self._instructions: list[str] = []
        self._serve()

    def prepare(self, planner: PlannerConfig | None, observations: int = 0, steps: int = 1, instructions: Sequence[str] = ()) -> None:
        """Do now what the first requests would wait for: measure how fast the network is, where ``planner`` has a deadline, and where the
        network is compiled or captured, do that for every size of batch that ``planner`` makes of up to ``observations`` observations, and
        for the policy alone; chunks have ``steps`` evaluations. The number of prompts is a size too: ``instructions`` are those that will
        come, by default one that nobody knows yet."""
        self._instructions = list(instructions)
        if self.policy.accelerated is not None and observations:
            planned = [] if planner is None else list(batches_of(planner, steps))
            proposed = [*batches_of(None, steps), *(one for one in planned if one.kind == SampleType.POLICY)]
            logger.info("the network is prepared for batches of up to %d observations; kept code makes this a matter of seconds",
                        observations)
            sample_all(self.policy, proposed, observations, self._text(self.policy))
            judge = self.planning_network or self.policy
            sample_all(judge, [one for one in planned if one.kind != SampleType.POLICY], observations, self._text(judge))
        if planner is not None and planner.deadline_ms:
            self._autopilot(self._text(self.policy))
        if not instructions:
            self._serve()  # without the prompt that only stood in

    def _text(self, policy: CosmosPolicy) -> Prompts:
        """A row for each instruction that will come, or for one that ``policy`` knows."""
        return policy.embed(self._instructions or [next(iter(getattr(policy.text, "embeddings", {})), "lift the cube")])

    def _serve(self) -> None:
        """Keep nothing of before but the number of prompts."""
        for policy in filter(None, (self.policy, self.planning_network)):
            policy.serve()
            if self._instructions:
                self._text(policy)

    def take_over(self, before: InferenceCore) -> None:
        """Use what was compiled for the networks of ``before``, which answers no more, where these networks are of the same kind."""
        take_over(self.policy, before.policy)
        if self.planning_network is not None and before.planning_network is not None:
            take_over(self.planning_network, before.planning_network)

    def _autopilot(self, text: Prompts) -> Autopilot:
        if self._pilot is None:
            self._pilot = Autopilot(kept_costs(self.policy, text.take(torch.zeros(1, dtype=torch.int64)), self._checkpoint))
        return self._pilot

    def check_weights(self, weights: Weights, node: str = "") -> None:
        """CheckpointError for weights that are damaged or of another model; ``node`` as in :func:`check`. May run beside
        :meth:`answer`."""
        check(weights, self.policy.net, node)

    def set_weights(self, weights: Weights, checked: bool = False) -> int:
        """Adopt newer weights and return the version now held. Older weights are ignored, so a late message does no harm.

        ``checked`` says that :meth:`check_weights` has accepted them.
        """
        if weights.version > self.version:
            if not checked:
                self.check_weights(weights)
            instants.passes("push")
            write(weights, self.policy.net)
            self._serve()
            self.version = weights.version
        return self.version

    def answer(self, requests: list[ActRequest]) -> list[ActReply | CosmosRayError]:
        """Answer many requests in as few forward passes as their settings allow. A bad request fails alone."""
        instants.passes("answer")
        replies: list[ActReply | CosmosRayError | None] = [None] * len(requests)
        groups: defaultdict[tuple, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            if refusal := self._refusal(request.acting):
                replies[i] = refusal
            else:
                key = (request.steps, request.acting.planner, request.decode_futures, request.images.shape[1:], request.proprio.shape[1:])
                groups[key].append(i)
        for members in groups.values():
            for i, answer in zip(members, self._try_answer([requests[i] for i in members]), strict=True):
                replies[i] = answer
        return [reply for reply in replies if reply is not None]

    def _try_answer(self, requests: list[ActRequest]) -> Sequence[ActReply | CosmosRayError]:
        try:
            with enough_memory("lower inference.max_batch, planner.candidates or rollout.envs_per_worker"):
                return self._answer_alike(requests)
        except CosmosRayError as error:
            return [error] * len(requests)

    def _refusal(self, acting: ActingPolicy) -> WrongVersion | None:
        """Why this actor cannot answer for ``acting``; None if it can."""
        if acting.version is None:
            return None
        if acting.version != self.version:
            return WrongVersion(f"the request asks for policy version {acting.version}, this actor holds {self.version}")
        if acting.planning_checkpoint != self.planning_checkpoint:
            asked, held = (name or "(the policy itself)" for name in (acting.planning_checkpoint, self.planning_checkpoint))
            return WrongVersion(f"the request asks for the planning network {asked}, this actor holds {held}")
        return None

    def decide(self, images: np.ndarray | Sequence[np.ndarray], proprio: np.ndarray, instructions: list[str], seeds: torch.Tensor,
               steps: int, planner: PlannerConfig | None, decode_futures: bool,
               arrived: float | None = None) -> tuple[Decision, torch.Tensor | None]:
        """(decision, predicted frames (B, cameras, H, W, 3) uint8 if asked for) for B observations.

        Images and proprio as for :func:`current_latents`, seeds (B,) int64, one per decision. The planner's deadline counts from
        ``arrived``, a time of ``time.monotonic``, by default from now; predicted frames are decoded after it.
        """
        taken = time.monotonic()
        known, text, network = current_latents(self.policy, images, proprio), self.policy.embed(instructions), self.planning_network
        if planner is None:
            decision = act_directly(self.policy, known, text, seeds, steps)
        else:
            planning = (network, network.embed(instructions)) if network is not None and planner.rank_by in JUDGED else None
            if planner.deadline_ms:
                decision = self._autopilot(text).decide(self.policy, known, text, seeds, steps, planner,
                                                        taken if arrived is None else arrived, planning, taken)
            else:
                decision = best_of_n(self.policy, known, text, seeds, steps, planner, planning)
        return decision, read_future_images(self.policy, decision.latents, images) if decode_futures else None

    def _answer_alike(self, requests: list[ActRequest]) -> list[ActReply]:
        first = requests[0]
        decision, futures = self.decide(
            np.concatenate([r.images for r in requests]), np.concatenate([r.proprio for r in requests]),
            [i for r in requests for i in r.instructions], torch.from_numpy(np.concatenate([r.seeds for r in requests]).astype(np.int64)),
            first.steps, first.acting.planner, first.decode_futures,
            min((r.arrived for r in requests if r.arrived is not None), default=None))
        replies, start = [], 0
        for request in requests:
            end = start + len(request.seeds)
            actions, values, scores, chosen, candidates = (tensor[start:end].cpu().numpy() for tensor in (
                decision.actions, decision.values, decision.scores, decision.chosen, decision.candidates))
            replies.append(ActReply(actions, values, scores, chosen, self.version, candidates,
                                    None if futures is None else futures[start:end].cpu().numpy(), decision.autopilot))
            start = end
        return replies


def load_core(checkpoint: str | Path, config: InferenceConfig, device: str, planning_checkpoint: str | Path = "") -> InferenceCore:
    """The policy of ``checkpoint``, ready to answer on ``device`` ("cpu" or "cuda"). ``planning_checkpoint`` "" lets the policy score
    its own candidates. CheckpointError for a checkpoint that cannot be read."""
    policy, version = _load(checkpoint, config, device)
    planning_network = _load(planning_checkpoint, config, device)[0] if planning_checkpoint else None
    return InferenceCore(policy, version, planning_network, str(planning_checkpoint), str(checkpoint))


@enough_memory("raise inference.gpus, so that fewer actors share a GPU, or set inference.precision to bf16")
def _load(checkpoint: str | Path, config: InferenceConfig, device: str) -> tuple[CosmosPolicy, int]:
    policy, version = load_checkpoint(checkpoint, dtype=None)
    return ready(policy, config, device), version


def ready(policy: CosmosPolicy, config: InferenceConfig, device: str) -> CosmosPolicy:
    """``policy`` on ``device``, in the precision and with the sampler of ``config``."""
    half = config.precision == "bf16" or (config.precision == "auto" and device.startswith("cuda"))
    policy.reference_steps = config.reference_steps
    accelerate(policy.place(device, torch.bfloat16 if half else torch.float32), config.accelerate)
    return policy
