"""Publishing: what a learner of any ZeRO stage puts into Ray's object store, and a learner that is killed while it does."""

import dataclasses
import os
import signal

import pytest
import ray
import torch

from cosmos_ray.learner.core import LearnerCore
from cosmos_ray.learner.engine import free_port, rendezvous
from cosmos_ray.model.checkpoint import load_checkpoint
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.weights import pack, unpack
from tests.test_learner import CONFIG, fill, source
from tests.test_learner_ranks import group_of, on_ranks, published
from tests.test_model import tiny

STAGES = ((0, 0.9, "fp32"), (1, 0.9, "fp32"), (2, 0.9, "bf16"), (3, 0.0, "fp32"))  #: ZeRO stage, decay of the average, precision


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("store") / "replay")


@ray.remote(num_cpus=0, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}})
def rank(number: int, port: int, root, folder) -> list:
    """Train two steps in every ZeRO stage, then publish and export; per stage the record and, where they are, whether views were put."""
    os.environ.update(rendezvous(number, 2, "127.0.0.1", port))
    torch.set_num_threads(1)
    out = []
    for stage, ema, precision in STAGES:
        config = dataclasses.replace(CONFIG, world_size=2, zero_stage=stage, ema=ema, precision=precision)
        core = LearnerCore(config, tiny(world_weight=1.0), source(ReplayStore(root, create=False), batch_size=config.rows, seed=number),
                           peak_lr=2e-3, total_steps=40, seed=3, rank=number)
        for _ in range(2):
            core.step()
        views = []

        def put(buffers, core=core, views=views):
            here = {tensor.data_ptr() for tensor in core.average or core.policy.net.parameters()}
            views.append(all(buffer.ctypes.data in here for buffer in buffers))
            return ray.put(buffers)

        out.append((core.weights(10 + stage, put), views))
        core.export(folder / str(stage), 10 + stage)
    return out


def test_two_ranks_publish_in_every_zero_stage_what_they_export(local_ray, store, tmp_path):
    port = free_port()
    first, second = ray.get([rank.remote(number, port, store.root, tmp_path) for number in range(2)], timeout=600)
    assert [record for record, _ in second] == [None] * len(STAGES)
    for (stage, ema, precision), (record, views) in zip(STAGES, first, strict=True):
        exported, version = load_checkpoint(tmp_path / str(stage), dtype=None)
        assert record.version == version == 10 + stage and record.dtype == {"fp32": "float32", "bf16": "bfloat16"}[precision]
        assert record.checksum == pack(exported.net.named_parameters(), version).checksum
        # No copy but the store's: of float32 averages, of parameters, of parameters gathered from both ranks.
        assert views == [precision == "fp32"], (stage, ema)
        assert sum(map(len, fetched := ray.get(record.data))) == (4 if precision == "fp32" else 2) * sum(
            p.numel() for p in exported.net.parameters())
        net = tiny().net
        unpack(dataclasses.replace(record, data=fetched), net)
        assert all(torch.equal(mine, theirs.float()) for mine, theirs in zip(net.parameters(), exported.net.parameters(), strict=True))


def test_a_learner_killed_in_mid_publish_is_started_again_and_publishes_anew(local_ray, store, tmp_path):
    deaths: list[dict] = []
    group = group_of(store.root, tmp_path, records=deaths, world_size=1)
    try:
        before = published(group)
        (pid,) = on_ranks(group, lambda actor: os.getpid())
        os.kill(pid, signal.SIGSTOP)
        group.publish(8)
        assert [group.poll() for _ in range(3)] == [[]] * 3
        os.kill(pid, signal.SIGKILL)
        answers = []
        while not answers:  # the restart, after which what was called is forgotten
            answers = group.poll(0.5)
        assert [answer.kind for answer in answers] == ["start"] and [death["who"] for death in deaths] == ["learner rank 0"]
        assert published(group) == before
    finally:
        group.close()
