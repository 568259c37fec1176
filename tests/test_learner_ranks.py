"""Learner ranks: another number of them on resume, and variables of another launcher in their environment."""

from __future__ import annotations

import os

import numpy as np
import pytest
import ray

from cosmos_ray.errors import CheckpointError
from cosmos_ray.learner.actor import LearnerGroup
from cosmos_ray.learner.engine import free_port, rendezvous
from tests.test_learner import core_on, digests, fill, group_of, published


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("store") / "replay")


def state_of(group: LearnerGroup) -> dict[str, np.ndarray | float]:
    """The optimiser's weights and moments, whole, from the slices of all ranks."""

    def look(self):
        optimizer = self.core.engine.optimizer
        lean = optimizer._get_groups_without_padding(optimizer.single_partition_of_fp32_groups)
        states = [optimizer.optimizer.state[group["params"][0]] for group in optimizer.optimizer.param_groups]
        return [{"weights": part.detach().numpy(), "step": float(state["step"]),
                 **{name: state[name][: part.numel()].numpy() for name in ("exp_avg", "exp_avg_sq")}}
                for part, state in zip(lean, states, strict=True)]

    ranks = ray.get([rank.__ray_call__.remote(look) for rank in group.ranks])
    whole = {f"{name} {i}": np.concatenate([rank[i][name] for rank in ranks])
             for i in range(len(ranks[0])) for name in ("weights", "exp_avg", "exp_avg_sq")}
    return {**whole, "step": ranks[0][0]["step"]}


@pytest.mark.parametrize("stage, before, after, stage_after", [
    (1, 1, 2, 1), pytest.param(2, 2, 3, 1, marks=pytest.mark.slow), pytest.param(0, 2, 1, 0, marks=pytest.mark.slow)])
def test_training_goes_on_with_other_ranks_from_the_same_weights_and_moments(local_ray, store, tmp_path, stage, before, after, stage_after):
    first = group_of(store, tmp_path, stage, ema=0.9, world_size=before, batch_size=12)
    try:
        first.finish_training(first.begin_training(3))
        first.save()
        before_checksum, state = published(first, 7).checksum, state_of(first) if stage else {}
    finally:
        first.close()
    then = group_of(store, tmp_path, stage_after, resume=True, ema=0.9, world_size=after, batch_size=12)
    try:
        assert then.step == 3
        assert published(then, 7).checksum == before_checksum
        if stage:
            again = state_of(then)
            assert again.keys() == state.keys() and again["step"] == 3
            assert all(np.array_equal(again[name], state[name]) for name in state)
        metrics = then.finish_training(then.begin_training(2))
        assert then.step == 5 and np.isfinite(metrics["loss"]) and len(set(digests(then))) == 1
    finally:
        then.close()


@pytest.mark.slow
def test_zero_3_keeps_its_number_of_ranks_and_says_how_to_go_on(local_ray, store, tmp_path):
    first = group_of(store, tmp_path, 3, ema=0.0)
    try:
        first.finish_training(first.begin_training(1))
        first.save()
    finally:
        first.close()
    with pytest.raises(CheckpointError, match="learner.world_size 2, not 1: give --learner.world-size 2 to continue, or delete .*state"):
        group_of(store, tmp_path, 3, resume=True, ema=0.0, world_size=1)


STRAY = {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "PMI_RANK": "3", "PMI_SIZE": "8",
         "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "other", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3",
         "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "LOCAL_WORLD_SIZE": "8"}


def test_variables_of_mpi_torchrun_and_slurm_do_not_mislead_a_rank(local_ray, store):
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {**STRAY, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}})
    def train(root):
        os.environ.update(rendezvous(0, 1, "127.0.0.1", free_port()))
        return core_on(root).step()["loss"]

    assert np.isfinite(ray.get(train.remote(store.root), timeout=120))
