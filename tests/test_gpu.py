"""What only a GPU can show; skipped where there is none."""

import numpy as np
import pytest
import torch

from cosmos_ray.config import ModelConfig, PlannerConfig
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.messages import ActRequest
from cosmos_ray.model.accelerate import accelerate
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.weights import pack

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def policy(seed: int = 0, dtype: torch.dtype = torch.float32) -> CosmosPolicy:
    made = build(make_spec(ModelConfig(width=128, heads=2, layers=2), ("wrist", "agent"), 64, 4, 9), seed=seed)
    made.tokenizer.fit(torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
    with torch.no_grad():
        made.net.final_layer.linear.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(seed))
    return made.place("cuda", dtype)


def request(rows: int, planner: PlannerConfig | None = None) -> ActRequest:
    rng = np.random.default_rng(1)
    return ActRequest(rng.integers(0, 256, (rows, 2, 64, 64, 3), dtype=np.uint8), rng.uniform(-1, 1, (rows, 9)).astype(np.float32),
                      ("lift the cube",) * rows, np.arange(rows), steps=3, planner=planner)


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


def test_bf16_on_the_gpu_acts_like_fp32_on_the_cpu():
    here = policy()
    there = build(here.spec, seed=0)
    there.load_state_dict(here.state_dict())
    a = InferenceCore(there, 1).answer([request(2)])[0].actions
    b = InferenceCore(policy(dtype=torch.bfloat16), 1).answer([request(2)])[0].actions
    np.testing.assert_allclose(a, b, atol=0.1)
