"""What only a GPU can show; skipped where there is none."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, ModelConfig, PlannerConfig
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.messages import ActingPolicy, ActRequest
from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.learner.engine import free_port, rendezvous
from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.speed.accelerate import accelerate
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.weights import pack
from tests.test_learner import fill, source
from tests.test_model import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> CosmosPolicy:
    made = build(make_spec(ModelConfig(width=128, heads=2, layers=2), ("wrist", "agent"), 4, 9), seed=seed)
    made.tokenizer.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
    with torch.no_grad():
        made.net.final_layer.linear.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    return made.place("cuda", dtype)


def request(rows: int, planner: PlannerConfig | None = None) -> ActRequest:
    rng = np.random.default_rng(1)
    return ActRequest(rng.integers(0, 256, (rows, 2, 64, 64, 3), dtype=np.uint8), rng.uniform(-1, 1, (rows, 9)).astype(np.float32),
                      ("lift the cube",) * rows, np.arange(rows), steps=3, acting=ActingPolicy(planner=planner))


@pytest.mark.parametrize("planner", [None, PlannerConfig(candidates=3)], ids=["act", "plan"])
def test_graphs_act_as_the_eager_sampler_also_after_new_weights(planner):
    eager, graphed = InferenceCore(policy(), 1), policy()
    accelerate(graphed, "graphs")
    graphed = InferenceCore(graphed, 1)
    for version in (2, 3):
        for rows in (1, 3, 4, 3):
            a, b = (core.answer([request(rows, planner)])[0].candidates for core in (eager, graphed))
            np.testing.assert_allclose(a, b, atol=1e-4)
        weights = pack(policy(seed=version).net.named_parameters(), version)
        assert eager.set_weights(weights) == graphed.set_weights(weights) == version


@pytest.mark.parametrize("how", ["none", "graphs"])
def test_a_deadline_chooses_as_best_of_n_where_there_is_time_and_keeps_it_where_there_is_little(how):
    made = policy()
    accelerate(made, how)
    core = InferenceCore(made, 1)
    unhurried, hurried = (PlannerConfig(candidates=6, deadline_ms=ms) for ms in (1e5, 200.0))
    core.prepare(hurried)
    plain, timed = (core.answer([request(2, planner)])[0] for planner in (PlannerConfig(candidates=6), unhurried))
    assert timed.autopilot["candidates"] == 6 and timed.chosen.tolist() == plain.chosen.tolist()
    np.testing.assert_allclose(timed.candidates, plain.candidates, atol=1e-4)
    told = [core.answer([request(2, hurried)])[0].autopilot for _ in range(30)]
    assert told[-1]["candidates"] > 1 and any(choice["in_time"] for choice in told[-10:])


def test_bf16_on_the_gpu_acts_like_fp32_on_the_cpu():
    here = policy()
    there = build(here.spec, seed=0)
    there.load_state_dict(here.state_dict())
    a = InferenceCore(there, 1).answer([request(2)])[0].actions
    b = InferenceCore(policy(dtype=torch.bfloat16), 1).answer([request(2)])[0].actions
    np.testing.assert_allclose(a, b, atol=0.1)


def learn(root: Path, accelerate: str, loader_threads: int, zero_stage: int) -> tuple[list[float], list[tuple]]:
    """Losses of a learner with advantages and imagined futures, resumed half-way, and the shapes it captured."""
    os.environ.update(rendezvous(0, 1, "127.0.0.1", free_port()))
    config = LearnerConfig(batch_size=8, warmup=2, advantage_temperature=0.1, accelerate=accelerate, loader_threads=loader_threads,
                           zero_stage=zero_stage)
    mixture = Mixture(0.5, 0.2, 0.3, (SampleType.VALUE_FUTURE,), 0.5, False, self_imitation=0.8, weighted=True)

    def core() -> LearnerCore:
        planning = tiny(top_share=0.7).place("cuda", torch.float32).eval()
        torch.nn.init.normal_(planning.net.final_layer.linear.weight, 0, 0.05, generator=torch.Generator("cuda").manual_seed(0))
        return LearnerCore(config, tiny(world_weight=1.0, top_share=0.7, imagined_share=0.5), source(ReplayStore(root / "replay"), mixture),
                           peak_lr=2e-3, total_steps=40, seed=3, device="cuda", planning_network=planning)

    first = core()
    losses = [first.step()["loss"] for _ in range(6)]
    first.weights(1)
    first.save(root / accelerate)
    second = core()
    assert second.load(root / accelerate)
    losses += [second.step()["loss"] for _ in range(6)]
    shapes = [key for net in (second.policy.net, second.planning_network.net) for key in getattr(net.forward, "graphs", ())]
    return losses, shapes


@pytest.mark.parametrize("loader_threads, zero_stage", [(0, 1), (2, 1), (1, 0)])
def test_a_learner_in_graphs_learns_what_the_eager_one_does_also_after_a_resume(tmp_path, loader_threads, zero_stage):
    fill(tmp_path / "replay")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as rank:
        (eager, none), (graphs, shapes) = (rank.apply(learn, (tmp_path, how, loader_threads, zero_stage)) for how in ("none", "graphs"))
    np.testing.assert_allclose(graphs, eager, rtol=1e-3)
    assert not none and {with_gradients for with_gradients, *_ in shapes} == {True, False}
