"""Memory that runs out: real allocations that no machine can give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ray.cloudpickle import dumps

from cosmos_ray.config import InferenceConfig
from cosmos_ray.errors import OutOfMemory
from cosmos_ray.inference.actor import InferenceActor
from cosmos_ray.inference.core import InferenceCore, load_core
from cosmos_ray.learner.actor import LearnerActor
from cosmos_ray.memory import enough_memory
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.rollout.actor import DemonstratorActor, RolloutActor
from tests.test_inference import policy, request  # noqa: F401 - a fixture
from tests.test_learner import core_on, fill


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50), lambda: bytearray(1 << 50)],
                         ids=["torch", "numpy", "python"])
def test_memory_that_nobody_has_is_one_line_with_the_advice(allocate):
    with pytest.raises(OutOfMemory, match=r"^out of memory \(.*\): lower this$") as caught, enough_memory("lower this"):
        allocate()
    assert "\n" not in str(caught.value)


def test_another_error_stays_what_it_was():
    with pytest.raises(RuntimeError, match="size of tensor") as caught, enough_memory("lower this"):
        torch.ones(2) + torch.ones(3)
    assert not isinstance(caught.value, OutOfMemory)


def test_a_learner_that_runs_out_names_its_settings(alone, tmp_path):
    def run(root):
        core = core_on(root)
        core.encoder.encode = lambda *_: torch.empty(1 << 50)
        try:
            core.train(1)
        except OutOfMemory as error:
            return str(error)

    assert "lower learner.batch_size, or raise learner.accumulate" in alone(run, fill(tmp_path / "replay").root)


def test_an_inference_actor_that_runs_out_answers_with_its_settings(policy, monkeypatch):  # noqa: F811
    monkeypatch.setattr("cosmos_ray.inference.core.act_directly", lambda *_: torch.empty(1 << 50))
    (answer,) = InferenceCore(policy, 1).answer([request()])
    assert isinstance(answer, OutOfMemory) and "lower inference.max_batch, planner.candidates" in str(answer)


def test_an_inference_actor_that_runs_out_while_it_starts_names_its_settings(policy, tmp_path, monkeypatch):  # noqa: F811
    save_policy(policy, tmp_path / "policy", 1, {})
    monkeypatch.setattr("cosmos_ray.inference.core.accelerate", lambda *_: torch.empty(1 << 50))
    with pytest.raises(OutOfMemory, match="raise inference.gpus"):
        load_core(tmp_path / "policy", InferenceConfig(), "cpu")


@pytest.mark.parametrize("actor", [InferenceActor, LearnerActor, RolloutActor, DemonstratorActor])
def test_ray_can_send_the_class_of_every_actor(actor):
    """A method whose decorator holds an iterator, as those of contextlib do, stops every command that starts the actor."""
    assert dumps(actor.__ray_metadata__.modified_class)
