"""Learner ranks as Ray actors: that they agree, are started again when killed, and resume with other numbers of ranks and ZeRO stages."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from cosmos_ray import instants
from cosmos_ray.asks import learner_ask
from cosmos_ray.errors import StoreError
from cosmos_ray.learner.actor import LearnerTask, learner_group
from cosmos_ray.learner.engine import free_port, rendezvous
from cosmos_ray.learner.group import LearnerGroup, LearnerLost
from cosmos_ray.learner.slices import optimised
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.placement import Placement
from cosmos_ray.supervision import LEARNER_RESTARTS, Supervisor
from cosmos_ray.weights import pack
from tests.test_learner import CONFIG, REFINEMENT, core_on, fill
from tests.test_model import tiny

WAIT_S = 300.0  #: for what takes seconds on a machine that is not overloaded


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("store") / "replay")


def group_of(root, folder: Path, stage: int = 1, records: list | None = None, **changes) -> LearnerGroup:
    """A started group of two ranks, unless ``changes`` say otherwise; its supervisor's deaths go to ``records``."""
    if not (folder / "policy").exists():
        save_policy(tiny(world_weight=1.0), folder / "policy", 0)
    changes = {"world_size": 2, "zero_stage": stage, "ema": 0.0 if stage == 3 else 0.9, "threads": 1, **changes}
    config = dataclasses.replace(CONFIG, **changes)
    task = LearnerTask(str(folder / "policy"), str(root), str(folder / "state"), REFINEMENT, 8, 0.98, 2e-3, 1000, 0,
                       latents=str(folder / "latents"))
    supervisor = Supervisor(lambda kind, **values: records.append(values) if records is not None and kind == "death" else None)
    group = learner_group(config, task, supervisor, Placement(supervisor).gang(learner_ask(config)))
    group.start()
    return group


def train(group: LearnerGroup, steps: int) -> dict[str, float]:
    """Rank 0's metrics of ``steps`` steps, without their seconds."""
    group.train(steps)
    (answer,) = group.finish()
    return {name: value for name, value in answer.value.items() if name != "seconds"}


def published(group: LearnerGroup) -> int:
    """Checksum of the weights that ``group`` publishes now."""
    group.publish(7)
    (answer,) = group.finish()
    return answer.value.checksum


def on_ranks(group: LearnerGroup, look, *arguments) -> list:
    """``look(actor, *arguments)`` inside every rank."""
    return ray.get([actor.__ray_call__.remote(look, *arguments) for actor in group._ranks.actors])


def digests(group: LearnerGroup) -> list[str]:
    """Hash of the parameters each rank holds."""
    return on_ranks(group, lambda self: hashlib.sha256(
        b"".join(p.detach().numpy().tobytes() for p in self.core.policy.net.parameters())).hexdigest())


def state_of(group: LearnerGroup) -> dict[str, np.ndarray | float]:
    """Weights and moments by name, whole, and AdamW's step."""

    def look(self):
        core = self.core
        pieces, step = optimised(core.engine, core.policy.net, core.config.zero_stage, core.rank)
        return [(f"{piece.kind} {piece.name}", piece.start, piece.numbers.clone().numpy()) for piece in pieces], step

    ranks = on_ranks(group, look)
    parts: dict[str, list] = {}
    for name, _, numbers in sorted((piece for pieces, _ in ranks for piece in pieces), key=lambda piece: piece[:2]):
        parts.setdefault(name, []).append(numbers)
    return {**{name: np.concatenate(numbers) for name, numbers in parts.items()}, "step": ranks[0][1]}


def hold(group: LearnerGroup, rank: int, instant: str, folder: Path) -> None:
    """Have ``rank`` stop itself when it next passes ``instant``."""
    folder.mkdir(exist_ok=True)
    (folder / instant).touch()
    ray.get(group._ranks.actors[rank].__ray_call__.remote(lambda self: os.environ.update({instants.VARIABLE: str(folder)})))


def held(instant: str, folder: Path) -> int:
    """The process that stopped itself at ``instant``."""
    until = time.monotonic() + WAIT_S
    while not (found := list(folder.glob(f"{instant}.*"))):
        assert time.monotonic() < until
        time.sleep(0.02)
    found[0].unlink()
    return int(found[0].suffix[1:])


def wait_for_restart(group: LearnerGroup) -> None:
    """Poll as a stage does until the ranks have started again."""
    until, restarts = time.monotonic() + WAIT_S, group.restarts
    while group.restarts == restarts or not group.started:
        group.poll(0.2)
        assert time.monotonic() < until


ALL_ON = {"loader_threads": 1, "accumulate": 2, "latent_cache": "plain"}


def test_ranks_agree_and_one_killed_in_mid_step_or_mid_save_changes_no_bit(local_ray, store, tmp_path):
    whole = group_of(store.root, tmp_path / "whole", **ALL_ON)
    try:
        both = ray.get([actor.train.remote(2) for actor in whole._ranks.actors])
        assert both[0]["loss"] != both[1]["loss"] and both[0]["grad_norm"] == both[1]["grad_norm"]  # each draws its own samples
        train(whole, 2)
        assert len(set(digests(whole))) == 1
        wanted = state_of(whole), published(whole)
        whole.export(tmp_path / "exported", 4, {})
        whole.finish()
        policy, version = load_checkpoint(tmp_path / "exported")
        assert version == 4 and pack(policy.net.named_parameters(), 7).checksum == wanted[1]
    finally:
        whole.close()
    deaths: list[dict] = []
    group, folder = group_of(store.root, tmp_path / "killed", records=deaths, **ALL_ON), tmp_path / "instants"
    try:
        train(group, 2)
        group.save()
        group.finish()
        for rank, instant in ((0, "step"), (1, "checkpoint")):
            hold(group, rank, instant, folder)
            group.train(2)
            group.save()
            os.kill(held(instant, folder), signal.SIGKILL)
            wait_for_restart(group)
            assert group.step == 2
        train(group, 2)
        again = state_of(group)
        assert all(np.array_equal(again[name], wanted[0][name]) for name in wanted[0]) and published(group) == wanted[1]
        group.save()
        group.finish()
        assert sorted(path.name for path in (tmp_path / "killed" / "state").iterdir()) == ["step_00000002", "step_00000004"]
    finally:
        group.close()
    assert [death["who"] for death in deaths] == ["learner rank 0", "learner rank 1"] and "\n" not in deaths[0]["why"]


@pytest.mark.slow
@pytest.mark.parametrize("rank, instant", [(0, "checkpoint"), (1, "step"), (0, "publish")])
def test_a_rank_killed_at_any_instant_is_started_again(local_ray, store, tmp_path, rank, instant):
    group, folder = group_of(store.root, tmp_path, stage=2), tmp_path / "instants"
    try:
        train(group, 1)
        group.save()
        group.finish()
        continued = train(group, 2)
        hold(group, rank, instant, folder)
        group.train(1)
        group.publish(3)
        group.save()
        os.kill(held(instant, folder), signal.SIGKILL)
        wait_for_restart(group)
        assert group.step == 1 and train(group, 2) == continued
    finally:
        group.close()


@pytest.mark.slow
def test_a_hung_rank_is_ended_and_started_again(local_ray, store, tmp_path):
    deaths: list[dict] = []
    group, folder = group_of(store.root, tmp_path, records=deaths, deadline_s=30.0), tmp_path / "instants"
    try:
        hold(group, 1, "step", folder)
        group.train(2)
        pid = held("step", folder)
        wait_for_restart(group)
        assert not os.path.exists(f"/proc/{pid}") or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
        assert np.isfinite(train(group, 2)["loss"])
    finally:
        group.close()
    assert "no answer within 30 s" in deaths[0]["why"]


@pytest.mark.slow
def test_a_learner_that_dies_again_and_again_ends_with_a_diagnosis(local_ray, store, tmp_path):
    deaths: list[dict] = []
    group = group_of(store.root, tmp_path, records=deaths, world_size=1)
    try:
        with pytest.raises(LearnerLost, match="died 4 times .*rank 0: .*run the same command again to continue") as caught:
            for _ in range(LEARNER_RESTARTS + 1):
                pid = on_ranks(group, lambda self: os.getpid())[0]
                group.train(500)
                os.kill(pid, signal.SIGKILL)
                wait_for_restart(group)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        group.close()
    assert len(deaths) == LEARNER_RESTARTS + 1


@pytest.mark.parametrize("before, after", [
    ((3, 2), (1, 1)), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [
        ((1, 1), (2, 2)), ((2, 2), (3, 3)), ((0, 2), (3, 2)), ((3, 3), (3, 2)), ((1, 3), (0, 2)), ((3, 2), (3, 2))])], ids=str)
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_other_ranks_and_another_zero_stage_go_on_from_the_same_weights_and_moments(local_ray, store, tmp_path, before, after, precision):
    """(ZeRO stage, ranks) of before and after."""
    changes = {"ema": 0.0, "batch_size": 12, "precision": precision}
    first = group_of(store.root, tmp_path, before[0], world_size=before[1], **changes)
    try:
        train(first, 3)
        first.save()
        first.finish()
        wanted, state = published(first), state_of(first)
        continued = train(first, 2)
    finally:
        first.close()
    then = group_of(store.root, tmp_path, after[0], world_size=after[1], **changes)
    try:
        assert then.step == 3 and published(then) == wanted
        again = state_of(then)
        assert again.keys() == state.keys() and all(np.array_equal(again[name], state[name]) for name in state)
        metrics = train(then, 2)
        assert then.step == 5 and np.isfinite(metrics["loss"]) and (before != after or metrics == continued)
        assert after[0] == 3 or len(set(digests(then))) == 1
    finally:
        then.close()


def test_a_learner_without_its_store_raises_the_error_of_the_rank_at_once(local_ray, tmp_path):
    with pytest.raises(StoreError) as caught:
        group_of(tmp_path / "nothing", tmp_path, world_size=1)
    assert len(str(caught.value).splitlines()) == 1


STRAY = {"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "PMI_RANK": "3", "PMI_SIZE": "8",
         "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "other", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3",
         "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "LOCAL_WORLD_SIZE": "8"}


def test_variables_of_mpi_torchrun_and_slurm_do_not_mislead_a_rank(local_ray, store):
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {**STRAY, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}})
    def train(root):
        os.environ.update(rendezvous(0, 1, "127.0.0.1", free_port()))
        return core_on(root).step()["loss"]

    assert np.isfinite(ray.get(train.remote(store.root), timeout=120))
