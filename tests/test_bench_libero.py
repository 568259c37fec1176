"""The LIBERO benchmark's own side: recorded actions through the real rollout worker."""

import numpy as np

from jobs.bench.libero import CHUNK, RECORDED, Replaying, ours, recorded


def test_recorded_actions_end_as_they_did_where_they_were_recorded(tmp_path):
    """One episode at full quality; all sixty are in test_libero_task.py."""
    actions = recorded(1)
    assert sorted(actions) == ["0_0", "2_0", "7_0"] and all(a.ndim == 2 and a.shape[1] == 7 for a in actions.values())
    name = min(actions, key=lambda name: len(actions[name]))
    outcomes, seconds = ours([name], actions, str(tmp_path))
    with np.load(RECORDED / f"expert_spatial_{name[0]}.npz") as file:
        assert outcomes == {name: bool(file["ok"][0])}
    assert seconds > 0 and len(list(tmp_path.rglob("*.arrow"))) == 1


def test_past_the_recording_nothing_moves_and_the_gripper_stays():
    from cosmos_ray.replay.format.episode import EpisodeKey
    from cosmos_ray.rollout.ticket import EpisodeTicket, decision_noise_seed

    actions = {"0_0": np.random.default_rng(0).uniform(-1, 1, (20, 7))}
    client = Replaying(actions, {"0_0": EpisodeTicket(EpisodeKey("bench", "libero_spatial/0", "eval", 1), noise_seed=5)})

    class Asked:
        seeds = np.array([decision_noise_seed(5, CHUNK), decision_noise_seed(5, 0)])

    reply = client.result(Asked)
    np.testing.assert_allclose(reply.actions[1], actions["0_0"][:CHUNK], rtol=1e-6)
    np.testing.assert_allclose(reply.actions[0, :4], actions["0_0"][CHUNK:], rtol=1e-6)
    assert not reply.actions[0, 4:, :6].any() and np.allclose(reply.actions[0, 4:, 6], actions["0_0"][-1, 6])
