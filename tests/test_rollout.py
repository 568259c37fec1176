"""Rollout and demonstration workers, with the real simulator and a policy in this process."""

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest

from cosmos_ray.config import PlannerConfig, SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.replay.format import codec
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.sampling.windows import window_offsets
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.core import RolloutCore, frame_offsets
from cosmos_ray.rollout.demonstrator import DemonstratorCore, failure_key
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.seeds import PURPOSES, SPAN, state_seed
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.resimulate import resimulate
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.weights import pack
from tests.test_planning import demo_policy

SIM = SimConfig(horizon=20)  # chunks of 8: two whole ones and a half
PLANS = ActingPolicy(planner=PlannerConfig(candidates=3, value_samples=1))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def environments():
    made = [Environment(SIM) for _ in range(3)]
    yield made
    for env in made:
        env.close()


@pytest.fixture
def work(environments, tmp_path):
    """``work(envs, folder, ...)``: a rollout worker over the shared environments."""

    def make(envs: int, folder: str = "replay", version: int = 4, **settings) -> RolloutCore:
        client = LocalClient(InferenceCore(demo_policy(), version))
        return RolloutCore(Simulators(environments[:envs]), ReplayStore(tmp_path / folder), client, steps=1, **settings)

    return make


def ticket(index: int, **settings) -> EpisodeTicket:
    seed = state_seed("rollout", 0, index)
    return EpisodeTicket(EpisodeKey("run", "Lift", "rollout", seed), noise_seed=1000 + index, **settings)


def finish(core: RolloutCore, tickets: list[EpisodeTicket]) -> list:
    finished = core.advance(tickets, 0.5)
    while core._queue or any(slot.running for half in core._halves for slot in half.slots):
        finished += core.advance([], 0.5)
    return finished


def test_every_ticket_finishes_once_and_is_in_the_store(work):
    core, tickets = work(2), [ticket(i) for i in range(5)]
    finished = finish(core, tickets)
    assert sorted(f.name for f in finished) == sorted(t.key.name for t in tickets) == core.store.keys()
    for done in finished:
        episode = core.store.read(done.name)
        assert done.new and done.policy_version == 4
        assert (done.success, done.length, done.invalid) == (episode.success, episode.length, "")
    assert core.advance([], 0.1) == []


@pytest.mark.parametrize("settings, stride, frames, decisions", [
    ({}, 0, [0, 8, 16, 20], [0, 8, 16]),
    ({}, 4, [0, 4, 8, 12, 16, 20], [0, 8, 16]),
    ({}, 3, [0, 3, 6, 8, 9, 11, 12, 14, 15, 16, 17, 18, 20], [0, 8, 16]),
    ({"execute": 5}, 0, [0, 5, 8, 10, 13, 15, 18, 20], [0, 5, 10, 15]),
])  # fmt: skip
def test_what_an_episode_records(work, settings, stride, frames, decisions):
    core = work(1, **settings)
    (done,) = finish(core, [ticket(0, frame_stride=stride, arm="rollout")])
    episode = core.store.read(done.name)
    assert episode.length == 20 and episode.timed_out and not episode.success
    assert sorted(episode.frames) == frames
    assert [d["step"] for d in episode.info["decisions"]] == decisions
    assert episode.step_versions.tolist() == [4] * 20 and episode.policy_version == 4
    assert np.flatnonzero(~np.isnan(episode.predicted_values)).tolist() == decisions
    for decision in episode.info["decisions"]:
        assert decision["value"] == pytest.approx(episode.predicted_values[decision["step"]], abs=1e-4)
        assert decision["chosen"] == 0 and len(decision["scores"]) == 1
    assert (episode.info["arm"], episode.info["noise_seed"], episode.info["candidates"], episode.info["steps"]) == ("rollout", 1000, 1, 1)
    assert np.array_equal(episode.actions, episode.labels) and np.abs(episode.actions).max() <= 1


@pytest.mark.parametrize("settings, stride, frames", [({}, 0, 4), ({}, 4, 6), ({"execute": 5}, 0, 8)])
def test_no_frame_is_drawn_or_encoded_that_nobody_reads(work, monkeypatch, settings, stride, frames):
    """A frame is read by a decision, by either end of a training window, or as the last one by the report."""
    drawn, encoded = [], []
    draw, encode = Environment.render_state, codec.encode_jpeg
    monkeypatch.setattr(Environment, "render_state", lambda env, state: drawn.append(1) or draw(env, state))
    monkeypatch.setattr(codec, "encode_jpeg", lambda image: encoded.append(1) or encode(image))
    (done,) = finish(core := work(1, **settings), [ticket(0, frame_stride=stride)])
    assert len(core.store.read(done.name).frames) == len(drawn) == frames
    assert len(encoded) == frames * len(SIM.cameras)


def test_a_rollout_may_be_longer_or_shorter_than_the_environments_own_horizon(work):
    core = work(1)
    finished = finish(core, [ticket(0, horizon=28), ticket(1, horizon=12), ticket(2)])
    assert [f.length for f in finished] == [28, 12, 20]
    episodes = [core.store.read(f.name) for f in finished]
    assert [e.info["horizon"] for e in episodes] == [28, 12, 20] and all(e.timed_out for e in episodes)
    assert all(resimulate(e).identical for e in episodes[:2])


def test_a_ticket_that_was_run_before_is_not_run_again(work):
    first = finish(work(1), [ticket(0)])
    core = work(2)
    asked, submit = [], core.client.submit
    core.client.submit = lambda request: asked.append(len(request.seeds)) or submit(request)
    again = finish(core, [ticket(0), ticket(1), ticket(0)])
    assert sum(asked) == 3  # the three chunks of ticket 1 alone
    outcomes = sorted((f.name, f.new, f.policy_version, f.length) for f in again)
    assert outcomes == sorted([(first[0].name, False, 4, 20)] * 2 + [(ticket(1).key.name, True, 4, 20)])
    core.store.refresh()
    assert len(core.store.keys()) == 2


def assert_same_episode(left, right):
    for name, value in vars(left).items():
        other = getattr(right, name)
        if isinstance(value, np.ndarray):
            assert value.tobytes() == other.tobytes(), name
        elif name == "info":
            assert {**value, "seconds": 0} == {**other, "seconds": 0}
        else:
            assert value == other, name


def test_episodes_do_not_depend_on_how_many_run_beside_them(work):
    tickets = [ticket(i, acting=PLANS if i == 3 else ActingPolicy(), frame_stride=4, action_noise=0.1 * (i == 1)) for i in range(5)]
    alone, beside = work(1, "alone"), work(3, "beside")
    finish(alone, tickets)
    finish(beside, tickets[::-1])
    assert alone.store.keys() == beside.store.keys()
    for name in alone.store.keys():
        assert_same_episode(alone.store.read(name), beside.store.read(name))


def test_planned_and_unplanned_tickets_share_a_worker(work):
    tickets = [ticket(i, acting=PLANS if i % 2 else ActingPolicy()) for i in range(4)]
    core = work(3)
    finish(core, tickets)
    for each in tickets:
        info = core.store.read(each.key.name).info
        assert info["candidates"] == (3 if each.acting.planner else 1)
        assert {len(d["scores"]) for d in info["decisions"]} == {info["candidates"]}
        assert all(d["scores"][d["chosen"]] == max(d["scores"]) for d in info["decisions"])


def test_the_noise_seed_of_a_ticket_decides_its_episode(work):
    cores = [work(1, folder) for folder in "abc"]
    for core, noise_seed in zip(cores, (1, 1, 2), strict=True):
        finish(core, [dataclasses.replace(ticket(0), noise_seed=noise_seed)])
    same, again, other = (core.store.read(ticket(0).key.name).actions for core in cores)
    assert np.array_equal(same, again)
    assert not np.array_equal(same[0], other[0])


def test_action_noise_is_executed_recorded_and_reproducible(work):
    clean, noisy, again = work(1, "clean"), work(1, "noisy"), work(1, "again")
    for core, noise in ((clean, 0.0), (noisy, 0.2), (again, 0.2)):
        finish(core, [ticket(0, action_noise=noise)])
    a, b, c = (core.store.read(ticket(0).key.name) for core in (clean, noisy, again))
    assert not np.array_equal(a.actions[0], b.actions[0]) and np.array_equal(b.actions, c.actions)
    assert np.abs(b.actions).max() <= 1
    assert np.array_equal(a.labels, a.actions)
    assert np.array_equal(b.labels[:8], a.actions[:8]) and not np.array_equal(b.labels[:8], b.actions[:8])  # what was meant, to imitate


def test_steps_carry_the_version_that_decided_them(work):
    core = work(1)
    policy, replies = core.client.core, []
    answer = core.client.result

    def answer_and_push(pending):
        replies.append(answer(pending))
        policy.set_weights(pack(demo_policy().net.named_parameters(), policy.version + 1))  # newer weights arrive between two decisions
        return replies[-1]

    core.client.result = answer_and_push
    (done,) = finish(core, [ticket(0)])
    episode = core.store.read(done.name)
    assert episode.step_versions.tolist() == [4] * 8 + [5] * 8 + [6] * 4
    assert episode.policy_version == done.policy_version == 4


def test_state_seeds_of_purposes_and_runs_are_disjoint():
    ranges = [(state_seed(purpose, run, 0), state_seed(purpose, run, SPAN - 1)) for run in range(4) for purpose in PURPOSES]
    for (low, high), (other_low, other_high) in itertools.combinations(ranges, 2):
        assert high < other_low or other_high < low
    assert state_seed("demo", 0, 1) - state_seed("demo", 0, 0) == 1


@pytest.mark.parametrize("index", [-1, SPAN])
def test_an_index_outside_of_its_range_is_refused(index):
    with pytest.raises(ConfigError, match="out of range"):
        state_seed("eval", 0, index)


# ---------------------------------------------------------------- demonstrations


def demonstrator(config: SimConfig, folder) -> DemonstratorCore:
    return DemonstratorCore(Simulators([Environment(config)]), ReplayStore(folder))


def test_a_successful_demonstration_is_stored_once(tmp_path):
    core = demonstrator(SimConfig(), tmp_path / "replay")
    key = EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, 0))
    done = core.record(key)
    assert done.success and done.new and done.name == key.name and done.policy_version == -1
    summary = core.store.summaries()[0]
    assert (summary.source, summary.episode_class, summary.policy_version) == ("demo", "demo", -1)
    episode = core.store.read(key.name)
    assert sorted(episode.frames) == list(range(episode.length + 1))
    again = core.record(key)
    assert (again.new, again.success, again.length, again.name) == (False, True, done.length, done.name)
    assert len(core.store.keys()) == 1
    core.simulators.close()


def test_a_failed_demonstration_becomes_a_rollout_of_version_minus_one(tmp_path):
    core = demonstrator(SimConfig(horizon=5), tmp_path / "replay")  # too short for any expert
    key = EpisodeKey("run", "Lift", "demo", state_seed("demo", 0, 0))
    done, again = core.record(key), core.record(key)
    assert not done.success and done.new and not again.new and done.name == again.name == failure_key(key).name
    assert done.seconds > 0 and again.seconds == 0.0  # found in the store, not run a second time
    (summary,) = core.store.summaries()
    assert (summary.source, summary.episode_class, summary.policy_version, summary.key.seed) == ("rollout", "failure", -1, key.seed)
    core.simulators.close()


@pytest.mark.parametrize("execute", range(1, 9))
@pytest.mark.parametrize("stride", [0, 3, 4])
def test_every_decision_begins_a_training_window(execute, stride):
    """Also where the executed part does not divide the chunk: both ends of the window are rendered."""
    length, frames = 60, {0}
    for decision in range(0, length, execute):
        frames |= {decision + offset for offset in frame_offsets(decision, execute, 8, stride)}
    windows = set(window_offsets(np.array(sorted(f for f in frames | {length} if f <= length)), length, 8).tolist())
    assert set(range(0, length, execute)) <= windows
    assert not stride or set(range(0, length, stride)) <= windows


def test_a_worker_starts_without_torch_and_without_a_simulator():
    """They take longer to import, and more memory, than everything else that a worker needs."""
    code = ("import sys, cosmos_ray.rollout.actor, cosmos_ray.rollout.core, cosmos_ray.rollout.demonstrator, cosmos_ray.inference.client; "
            "assert not {'torch', 'deepspeed', 'pandas', 'mujoco', 'robosuite', 'numba'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_serving_a_policy_does_not_import_what_only_an_exchange_needs():
    code = "import sys, cosmos_ray.inference.core; assert not {'torch.distributed.checkpoint', 'deepspeed'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_chunk_noise_moves_the_hand_alike_through_half_of_the_chunks(work):
    tickets = [ticket(i, chunk_noise=0.3) for i in range(12)]
    cores = work(3, "once"), work(1, "again")
    for core in cores:
        finish(core, tickets)
    moved = []
    for name in cores[0].store.keys():
        episode = cores[0].store.read(name)
        assert_same_episode(episode, cores[1].store.read(name))  # a function of the ticket, whatever runs beside it
        assert episode.info["chunk_noise"] == 0.3
        difference = episode.actions - episode.labels
        for start in range(0, len(difference), 8):
            chunk, labels = difference[start : start + 8], episode.labels[start : start + 8]
            inside = np.abs(labels + chunk).max(1) < 1  # elsewhere it was clipped
            assert np.all(chunk[:, 3] == 0)  # the gripper does what the policy wants
            if chunk.any():
                assert np.allclose(chunk[inside], chunk[inside][:1], atol=1e-6)
            moved.append(chunk.any())
    assert 0.25 < np.mean(moved) < 0.75 and len(moved) == 36
