"""How well a network imagines and values recorded episodes: the arithmetic, on real stores and real small networks."""

import numpy as np
import pytest
import torch

from cosmos_ray.config import PlannerConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.latents import current_latents
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.planning.assessment import Chains, assess, recorded_chains
from cosmos_ray.replay.store import ReplayStore
from tests.test_model import CAMERAS, tiny
from tests.test_replay_episode import make_episode

HORIZON, CHUNK = 2, 8
ALL = (SampleType.VALUE_FUTURE, SampleType.VALUE_ACTION)


def chains(n: int = 6, move: int = 60) -> Chains:
    """Grey pictures: a square that goes darker by ``move`` with every chunk; half of the episodes succeed."""
    rng = np.random.default_rng(0)
    images = np.full((n, HORIZON + 1, len(CAMERAS), 32, 32, 3), 150, np.uint8)
    for state in range(HORIZON + 1):
        images[:, state, :, 8:16, 8:16] -= np.uint8(move * state)
    vectors = lambda *shape: rng.uniform(-1, 1, (n, *shape)).astype(np.float32)  # noqa: E731
    return Chains(images, vectors(HORIZON + 1, 9), vectors(HORIZON, CHUNK, 4), np.arange(n) % 2 == 1, ["lift the cube"] * n)


def test_chains_are_stretches_whose_states_are_all_stored(tmp_path):
    store = ReplayStore(tmp_path / "replay")
    episodes = [make_episode(seed, "eval", length=42, size=32, chunk=CHUNK, success=bool(seed)) for seed in range(2)]
    for episode in episodes:
        store.commit(episode)
    views = [store.view(episode.key.name) for episode in episodes]
    cameras = episodes[0].cameras
    found = recorded_chains(views, cameras, CHUNK, HORIZON, most=100, seed=0)
    possible = [(e, t) for e in episodes for t in (0, 8, 16, 24)]  # frames at 0, 8, ..., 40 and 42
    assert len(found) == len(possible)
    assert sorted(found.proprio[:, 0].tolist()) == sorted(e.proprio[t].tolist() for e, t in possible)
    for row in range(len(found)):
        episode, t = next((e, t) for e, t in possible if np.array_equal(e.proprio[t], found.proprio[row, 0]))
        assert np.array_equal(found.actions[row].reshape(-1, 4), episode.actions[t : t + HORIZON * CHUNK])
        assert np.array_equal(found.proprio[row], episode.proprio[t : t + HORIZON * CHUNK + 1 : CHUNK])
        assert found.success[row] == episode.success and found.images.shape[1:] == (HORIZON + 1, len(cameras), 32, 32, 3)
    assert len(recorded_chains(views, cameras, CHUNK, HORIZON, most=2, seed=0)) == 2
    assert recorded_chains(views, cameras, CHUNK, horizon=50, most=2, seed=0) is None


def test_a_world_model_that_predicts_no_change_is_as_good_as_copying():
    result = assess(tiny(), chains(), PlannerConfig(), ALL)  # fresh weights add nothing to the current frame
    for step, row in enumerate(result["world_model"], 1):
        assert row["horizon"] == step and row["proprioception"]["change"] == pytest.approx(0, abs=1e-5)
        for camera in CAMERAS:  # but for what the tokenizer loses
            assert row[camera]["copied"] == pytest.approx(60 * step) and row[camera]["moving"] == pytest.approx(64 / 1024)
            assert row[camera]["error"] == pytest.approx(60 * step, abs=40)
    assert result["windows"] == 6 and result["successes"] == 3
    assert result["values"] == {"V(real s')": 0.5, "V(imagined s')": 0.5, "Q(s,a)": 0.5}  # it values all alike


def test_a_world_model_that_is_right_has_no_error_in_proprioception(monkeypatch):
    policy, data = tiny(), chains()
    calls = iter(range(HORIZON))

    def imagine(policy, known, text, seeds, steps):
        state = next(calls) + 1
        out = known.clone()
        after = current_latents(policy, data.images[:, state], data.proprio[:, state])
        out[:, :, list(policy.layout.future)] = after[:, :, list(policy.layout.current)]
        return out

    monkeypatch.setattr(sampling, "imagine", imagine)
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    result = assess(policy, data, PlannerConfig(), ALL)
    assert [row["proprioception"]["change"] for row in result["world_model"]] == pytest.approx([-1, -1], abs=1e-5)
    assert result["values"]["V(imagined s')"] == result["values"]["V(real s')"]


def test_where_nothing_moves_there_is_no_ratio():
    row = assess(tiny(), chains(move=0), PlannerConfig(), ALL)["world_model"][0]
    assert row["wrist"] == {"error": None, "copied": None, "change": None, "moving": 0.0}


def test_outcomes_that_are_all_alike_have_no_auc():
    data = chains()
    data.success[:] = True
    assert set(assess(tiny(), data, PlannerConfig(), ALL)["values"].values()) == {None}


def test_only_values_that_were_trained_are_reported():
    assert set(assess(tiny(), chains(), PlannerConfig(), ALL[:1])["values"]) == {"V(real s')", "V(imagined s')"}
    assert set(assess(tiny(), chains(), PlannerConfig(), ALL[1:])["values"]) == {"Q(s,a)"}
