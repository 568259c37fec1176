"""`size`: the simulation of the fleet against what can be computed by hand, and the command on a saved probe."""

import dataclasses

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.errors import ConfigError
from cosmos_ray.sizing.probe import Probe, load_probe

pytest.importorskip("simpy")

from cosmos_ray.sizing.fleet import Shape, simulate  # noqa: E402

PROBE = Probe(task="Lift", horizon=80, chunk=8, step_s=0.002, reset_s=0.0, infer_s={1: 0.01, 8: 0.024}, commit_s=0.0, learn_s=0.1,
              worker_mb=500, network_mb=25, episode_mb=0.1)


def test_one_worker_beside_a_fast_gpu_steps_all_the_time():
    out = simulate(PROBE, Shape(nodes=1, cores=4, workers=1, envs=2, gpu_speed=1000))
    assert out.steps_s == pytest.approx(1 / PROBE.step_s, rel=0.03)
    assert out.episodes_h == pytest.approx(3600 * out.steps_s / PROBE.horizon)


def test_one_episode_waits_for_every_answer():
    out = simulate(PROBE, Shape(nodes=1, cores=2, workers=1, envs=1))
    assert out.steps_s == pytest.approx(8 / (8 * 0.002 + 0.01), rel=0.03) and out.rows == 1 and out.bottleneck == "waits"


def test_cores_that_do_everything_share_their_time():
    """Two cores, work of 16 ms of simulation for each decision, and an answer's share of a batch."""
    out = simulate(PROBE, Shape(nodes=1, cores=2, workers=4, envs=4))
    per_decision = 8 * PROBE.step_s + PROBE.answer_s(out.rows) / out.rows
    assert out.steps_s == pytest.approx(out.cores_busy * 2 * 8 / per_decision, rel=0.05) and 0.8 < out.cores_busy <= 1


def test_the_bottleneck_moves_from_waiting_to_inference():
    outcomes = [simulate(PROBE, Shape(nodes=count, cores=1, workers=count, envs=4, gpu_speed=2)) for count in (1, 4, 16, 64)]
    assert [out.bottleneck for out in outcomes][-1] == "inference" and outcomes[0].actors_busy < 0.5
    most = 2 * 16 / PROBE.answer_s(16) * PROBE.chunk  # rows a second of one GPU, in full batches
    assert outcomes[-1].steps_s == pytest.approx(most, rel=0.05)
    assert [out.steps_s for out in outcomes] == sorted(out.steps_s for out in outcomes)


def test_a_learner_takes_a_core_from_the_fleet():
    alone = Shape(nodes=1, cores=2, workers=4, envs=4)
    without, beside = simulate(PROBE, alone), simulate(PROBE, dataclasses.replace(alone, learner=True))
    assert beside.steps_s < 0.8 * without.steps_s and 0 < beside.learner_h <= 3600 / PROBE.learn_s
    assert beside.node_mb > without.node_mb


def test_two_nodes_give_twice_as_much():
    one, two = (simulate(PROBE, Shape(nodes=n, cores=2, workers=2 * n, envs=4, gpu_speed=50)) for n in (1, 2))
    assert two.episodes_h == pytest.approx(2 * one.episodes_h, rel=0.05) and two.node_mb == pytest.approx(one.node_mb, rel=0.1)


def test_the_command_says_what_a_saved_probe_gives(tmp_path, capfd):
    PROBE.save(tmp_path / "probe.json")
    assert load_probe(tmp_path / "probe.json") == PROBE
    flags = ["--probe", str(tmp_path / "probe.json"), "--nodes", "2", "--price", "0.5", "--learner"]
    assert main(["size", *flags, "--plot", str(tmp_path / "sizes.png")]) == 0
    text = capfd.readouterr().out
    assert "2 nodes of 2 cores, 4 workers of 6 episodes" in text and "1000 episodes cost" in text and "learner steps/h" in text
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"format": 1, "task": "Lift"}'])
def test_a_file_that_is_no_probe_is_one_clear_line(tmp_path, content, capfd):
    (tmp_path / "probe.json").write_text(content)
    with pytest.raises(ConfigError, match="is no saved probe"):
        load_probe(tmp_path / "probe.json")
    assert main(["size", "--probe", str(tmp_path / "probe.json")]) == 2 and len(capfd.readouterr().err.splitlines()) == 1


def test_a_cluster_that_cannot_be_is_one_clear_line(capfd):
    assert main(["size", "--nodes", "0"]) == 2
    assert capfd.readouterr().err == "cosmos_ray: error: --nodes 0 must be at least 1\n"
