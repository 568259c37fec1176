"""Planning by a deadline, on a clock that only network evaluations move."""

import asyncio
import dataclasses
import json
import logging
import time

import numpy as np
import pytest
import torch

from cosmos_ray.config import LearnerConfig, PlannerConfig, RunConfig, check
from cosmos_ray.deployment import DeployedPolicy
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import InferenceCore, load_core
from cosmos_ray.model import sampling
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.speed.accelerate import accelerate
from cosmos_ray.planning import costs as costs_module
from cosmos_ray.planning.autopilot import ENOUGH, Autopilot, gears
from cosmos_ray.planning.best_of_n import act_directly, best_of_n
from cosmos_ray.planning.costs import KINDS, Costs, costs_file, kept_costs, measure
from cosmos_ray.serving.core import PolicyServer
from tests.test_inference import request
from tests.test_planning import demo_policy, observed

pytestmark = pytest.mark.usefixtures("one_thread")

EACH = 0.010  #: seconds of an evaluation, and 1 ms more for every row
TABLE = {kind.name: tuple(EACH + 0.001 * n for n in (1, 1000)) for kind in KINDS}
COSTS = Costs((1, 1000), TABLE, TABLE)
FOREVER = 1e5  #: ms
ENSEMBLES = PlannerConfig(candidates=6, futures=2, future_steps=2, value_samples=3, value_steps=2, aggregate="majority_mean")


@pytest.fixture(scope="module")
def policy():
    return demo_policy()


class Slow:
    """A clock that every network evaluation moves by its time, ``slower`` times what was measured; ``spikes`` (n) moves it further.
    Without ``network`` the time passes, and nothing is computed."""

    def __init__(self, monkeypatch, slower=1.0, spikes=None, network=True):
        self.now, self.slower, self.spikes, self.longest, self.evaluations = 100.0, slower, spikes or (lambda n: 1.0), 0.0, 0
        denoise = sampling.denoise

        def evaluated(policy, net, noised, sigma, known, *rest):
            takes = (EACH + 0.001 * len(noised)) * self.slower * self.spikes(self.evaluations)
            self.now, self.longest, self.evaluations = self.now + takes, max(self.longest, takes), self.evaluations + 1
            return denoise(policy, net, noised, sigma, known, *rest) if network else known.clone()

        monkeypatch.setattr(sampling, "denoise", evaluated)

    def __call__(self) -> float:
        return self.now


def decided(policy, config, clock, rows=1, steps=5, arrived=None, pilot=None, network=None):
    known, text, seeds = observed(policy, rows)
    pilot = pilot or Autopilot(COSTS, clock)
    return pilot.decide(policy, known, text, seeds, steps, config, clock() if arrived is None else arrived, network)


@pytest.mark.parametrize("config", [
    PlannerConfig(candidates=7), PlannerConfig(candidates=5, spread=0.3), PlannerConfig(candidates=6, rank_by="joint"),
    PlannerConfig(candidates=5, rank_by="action", value_samples=2), ENSEMBLES, dataclasses.replace(ENSEMBLES, rank_by="both"),
], ids=["V(s')", "spread", "joint", "Q(s, a)", "ensembles", "both"])  # fmt: skip
def test_with_time_enough_the_waves_choose_as_best_of_n(policy, config, monkeypatch):
    clock = Slow(monkeypatch)
    known, text, seeds = observed(policy, 3)
    wanted = best_of_n(policy, known, text, seeds, 2, config)
    monkeypatch.setattr("cosmos_ray.planning.autopilot.SHARE", 1e-3)  # small waves
    left = 0.2 + 3 * 4 * config.candidates * EACH * 10 * config.futures  # so many candidates at a time
    found = decided(policy, dataclasses.replace(config, deadline_ms=left * 1000), clock, rows=3, steps=2)
    assert found.autopilot["gear"] == "full" and found.autopilot["candidates"] == config.candidates and found.autopilot["in_time"]
    assert torch.equal(found.chosen, wanted.chosen) and torch.equal(found.actions, wanted.actions)
    assert torch.equal(found.candidates, wanted.candidates) and torch.equal(found.latents, wanted.latents)
    if config.rank_by == "joint" or config.value_samples * config.futures == 1:  # else early rejection leaves estimates
        assert torch.equal(found.scores, wanted.scores)
    assert found.scores.shape == wanted.scores.shape and torch.equal(found.values, wanted.values)


def test_candidates_come_in_several_waves(policy, monkeypatch):
    found = decided(policy, PlannerConfig(candidates=200, deadline_ms=500), Slow(monkeypatch))
    assert found.autopilot["waves"] > 1 and 10 < found.autopilot["candidates"] < 200 and found.autopilot["in_time"]


@pytest.mark.parametrize("deadline_ms", [1, 15, 40, 100, 300])
@pytest.mark.parametrize("slower", [0.7, 1.0, 3.0, 20.0])
def test_an_answer_is_late_by_one_evaluation_at_most(policy, deadline_ms, slower, monkeypatch):
    """Whatever the device does: as measured, slower all the time, or with spikes."""
    draws = np.random.default_rng(int(deadline_ms * slower))
    clock = Slow(monkeypatch, slower, lambda n: 1 + 4 * float(draws.random() < 0.2), network=False)
    pilot = Autopilot(COSTS, clock)
    for _ in range(6):
        arrived = clock()
        found = decided(policy, PlannerConfig(candidates=64, deadline_ms=deadline_ms), clock, pilot=pilot)
        late = clock() - arrived - deadline_ms / 1000
        assert late <= clock.longest and found.autopilot["in_time"] == (late <= 0)
        assert torch.isfinite(found.actions).all() and found.scores.shape == found.candidates.shape[:2]
        assert torch.equal(found.candidates[[0], found.chosen], found.actions)


def test_without_any_time_the_answer_is_the_policys_own_after_one_evaluation(policy, monkeypatch):
    clock = Slow(monkeypatch)
    found = decided(policy, PlannerConfig(deadline_ms=1), clock)
    known, text, seeds = observed(policy, 1)
    assert clock.evaluations == 1 and found.chosen.tolist() == [0] and found.autopilot["gear"] == "policy first"
    assert torch.equal(found.actions, act_directly(policy, known, text, seeds, 1).actions)


def test_the_first_candidate_is_taken_as_far_as_it_got(policy, monkeypatch):
    """Five evaluations were planned, and a spike leaves time for two: what the second one predicted is the answer."""
    clock = Slow(monkeypatch, spikes=lambda n: 20.0 if n == 1 else 1.0)
    found = decided(policy, PlannerConfig(candidates=64, deadline_ms=200), clock)
    assert found.autopilot["steps"] == 5 and clock.evaluations == 2 and found.autopilot["candidates"] == 1
    assert clock() - 100.0 <= 0.2 + clock.longest and torch.isfinite(found.actions).all()


def test_a_wave_that_is_given_up_changes_nothing(policy, monkeypatch):
    """The best of the candidates that were compared, as if the others had never been proposed."""
    clock = Slow(monkeypatch, spikes=lambda n: 60.0 if n == 20 else 1.0)
    found = decided(policy, PlannerConfig(candidates=64, deadline_ms=600), clock)
    n = found.autopilot["candidates"]
    known, text, seeds = observed(policy, 1)
    wanted = best_of_n(policy, known, text, seeds, 5, PlannerConfig(candidates=n))
    assert 1 < n < 64 and torch.equal(found.scores, wanted.scores) and torch.equal(found.actions, wanted.actions)


def test_the_time_in_the_queue_counts(policy, monkeypatch):
    clock, config = Slow(monkeypatch), PlannerConfig(candidates=64, deadline_ms=400)
    at_once, waited = (decided(policy, config, clock, arrived=clock() - s).autopilot for s in (0.0, 0.3))
    assert waited["waited_ms"] == pytest.approx(300) and waited["took_ms"] <= 100 < at_once["took_ms"]
    assert waited["in_time"] and waited["candidates"] < at_once["candidates"]
    clock.evaluations = 0
    assert not decided(policy, config, clock, arrived=clock() - 5).autopilot["in_time"] and clock.evaluations == 1


def test_a_device_that_got_slower_gets_smaller_tasks_and_comes_back(policy, monkeypatch):
    clock, config = Slow(monkeypatch, network=False), PlannerConfig(candidates=64, deadline_ms=400)
    pilot = Autopilot(COSTS, clock)
    found = {}
    for slower in (1.0, 4.0, 1.0):
        clock.slower = slower
        found[slower] = [decided(policy, config, clock, pilot=pilot).autopilot for _ in range(12)][-1]
    assert found[4.0]["slowness"] > 3 and found[4.0]["in_time"] and found[1.0]["slowness"] < 1.5
    assert found[4.0]["candidates"] < found[1.0]["candidates"]


@pytest.mark.parametrize("clients", [2, 5])
def test_clients_that_come_at_any_time_are_answered_in_time(policy, clients, monkeypatch):
    """One that comes just after a decision began has to wait for its end, and needs time for its own."""
    clock, config, draws = Slow(monkeypatch, network=False), PlannerConfig(candidates=64, deadline_ms=400), np.random.default_rng(1)
    pilot, waiting, found = Autopilot(COSTS, clock), [clock() + 0.1 * i for i in range(clients)], []
    while len(found) < 150:
        taken = clock.now = max(clock(), min(waiting))
        together = [arrived for arrived in waiting if arrived <= taken]
        known, text, seeds = observed(policy, len(together))
        choice = pilot.decide(policy, known, text, seeds, 5, config, min(together), None, taken).autopilot
        found += [(clock() - arrived <= 0.4, choice["candidates"]) for arrived in together]
        waiting = [arrived for arrived in waiting if arrived > taken] + [clock() + float(draws.random()) * 0.5 for _ in together]
    in_time, candidates = np.array(found).T
    assert in_time.mean() >= 0.95 and np.percentile(candidates[50:], 5) > {2: 6, 5: 2}[clients]  # all of them get some


@pytest.mark.parametrize("deadline_ms", [50, 100])
def test_interruptions_make_few_answers_late(policy, deadline_ms, monkeypatch):
    """Every tenth evaluation is interrupted for up to 15 ms, as on a core that is shared: the autopilot learns to end earlier."""
    draws = np.random.default_rng(0)
    clock = Slow(monkeypatch, spikes=lambda n: 1 + 1.5 * float(draws.random()) * (draws.random() < 0.1), network=False)
    pilot = Autopilot(COSTS, clock)
    found = [decided(policy, PlannerConfig(candidates=64, deadline_ms=deadline_ms), clock, pilot=pilot).autopilot for _ in range(150)]
    assert np.mean([choice["in_time"] for choice in found]) >= 0.95
    assert np.mean([choice["candidates"] for choice in found[75:]]) > 3


def test_a_shorter_deadline_takes_a_cheaper_gear(policy, monkeypatch):
    clock = Slow(monkeypatch)
    config = dataclasses.replace(ENSEMBLES, candidates=16)
    taken = {ms: decided(policy, dataclasses.replace(config, deadline_ms=ms), clock).autopilot for ms in (20, 45, 80, 120, 220, 1000)}
    names = [taken[ms]["gear"] for ms in taken]
    assert names == ["policy first", "joint value, one step", "joint value", "few steps", "single values", "full"]
    assert [(taken[ms]["steps"], taken[ms]["value_samples"]) for ms in (120, 220, 1000)] == [(2, 1), (5, 1), (5, 3)]
    assert taken[220]["candidates"] >= ENOUGH and all(t["in_time"] for t in taken.values())


def test_gears_never_take_more_than_the_settings():
    for config in (PlannerConfig(), ENSEMBLES, PlannerConfig(rank_by="joint"), PlannerConfig(spread=0.1)):
        made = gears(config, 2)
        assert len({(gear.steps, gear.planner) for gear in made}) == len(made)
        for gear in made:
            assert gear.steps <= 2 and gear.planner.futures <= config.futures and gear.planner.value_samples <= config.value_samples
            assert not (config.spread and gear.planner.rank_by == "joint")


def test_a_planning_network_judges_by_the_deadline_too(policy, monkeypatch):
    clock, network = Slow(monkeypatch), demo_policy()
    for p in network.net.parameters():
        torch.nn.init.normal_(p, std=0.05, generator=torch.Generator().manual_seed(p.numel()))
    known, text, seeds = observed(policy, 1)
    pair = network, network.embed(["lift the cube 0"])
    found = decided(policy, PlannerConfig(candidates=5, deadline_ms=FOREVER), clock, network=pair)
    assert torch.equal(found.scores, best_of_n(policy, known, text, seeds, 5, PlannerConfig(candidates=5), pair).scores)
    assert policy.watch is None and network.watch is None


# ---------------------------------------------------------------- what the network takes


def test_costs_are_measured_per_kind_and_batch_while_the_time_lasts(policy, monkeypatch):
    clock = Slow(monkeypatch, network=False)
    found = measure(policy, observed(policy, 1)[1], clock, budget_s=5.0)
    assert found.rows[:3] == (1, 2, 4) and found.rows[-1] < 32 and clock() <= 100.0 + 5.0
    for kind in KINDS:
        assert found.evaluation(kind, 1) == pytest.approx(0.011) and found.call(kind, 3, 5) == pytest.approx(5 * 0.013)
        top = found.rows[-1]
        assert found.evaluation(kind, 10 * top) == pytest.approx(10 * found.evaluation(kind, top))  # beyond what was measured


@pytest.fixture
def checkpoint(policy, tmp_path, monkeypatch):
    """A checkpoint, and how often its network's speed was measured."""
    save_policy(policy, tmp_path / "base", 1)
    counted = []
    monkeypatch.setattr(costs_module, "measure", lambda *_: counted.append(1) or COSTS)
    return tmp_path / "base", counted


def test_costs_are_kept_beside_the_checkpoint(policy, checkpoint):
    folder, counted = checkpoint
    text = observed(policy, 1)[1]
    assert kept_costs(policy, text, folder) == kept_costs(policy, text, folder) == COSTS and len(counted) == 1
    assert costs_file(folder) == folder.parent / "base.costs.json" and costs_file(folder).exists()
    save_policy(policy, folder, 2)  # other weights
    assert kept_costs(policy, text, folder) == COSTS and len(counted) == 2
    torch.set_num_threads(2)
    assert kept_costs(policy, text, folder) == COSTS and len(counted) == 3  # another device; both are kept
    torch.set_num_threads(1)
    assert kept_costs(policy, text, folder) == COSTS and len(counted) == 3
    assert len(json.loads(costs_file(folder).read_text())) == 2


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"rows": 1}', "another shape"])
def test_damaged_costs_are_measured_again(policy, checkpoint, damage, caplog):
    folder, counted = checkpoint
    text = observed(policy, 1)[1]
    kept_costs(policy, text, folder)
    table = json.loads(costs_file(folder).read_text())
    for entry in table.values():
        entry["rows"] = [1]
    costs_file(folder).write_text(json.dumps(table) if damage == "another shape" else damage)
    assert kept_costs(policy, text, folder) == COSTS and len(counted) == 2
    assert kept_costs(policy, text, folder) == COSTS and len(counted) == 2


def test_costs_that_cannot_be_kept_are_a_warning(policy, checkpoint, caplog):
    folder, counted = checkpoint
    costs_file(folder).mkdir()
    (costs_file(folder) / "something else").touch()
    with caplog.at_level(logging.WARNING):
        assert kept_costs(policy, observed(policy, 1)[1], folder) == COSTS
    assert "base.costs.json" in caplog.text and (costs_file(folder) / "something else").exists()


# ---------------------------------------------------------------- in use


def test_a_core_answers_by_the_deadline_and_says_what_it_chose(policy, tmp_path):
    save_policy(policy, tmp_path / "base", 1)
    core = load_core(tmp_path / "base", RunConfig().inference, "cpu")
    core._pilot = Autopilot(COSTS)
    planner = PlannerConfig(candidates=3, deadline_ms=FOREVER)
    requests = [request(rows, seed=rows, planner=planner) for rows in (1, 2)]
    for asked, reply in zip(requests, core.answer(requests), strict=True):
        assert reply.autopilot["candidates"] == 3 and reply.scores.shape == (len(asked.seeds), 3)
    late = dataclasses.replace(requests[0], arrived=time.monotonic() - FOREVER / 1000 - 1)
    (reply,) = core.answer([late])
    assert not reply.autopilot["in_time"] and reply.autopilot["candidates"] == 1
    (plain,) = core.answer([request(1, planner=dataclasses.replace(planner, deadline_ms=0.0))])
    assert plain.autopilot is None


def test_a_core_that_is_prepared_measures_nothing_when_it_is_asked(policy, checkpoint):
    folder, counted = checkpoint
    core = load_core(folder, RunConfig().inference, "cpu")
    core.prepare(None)
    core.prepare(PlannerConfig())
    assert not counted
    core.prepare(PlannerConfig(deadline_ms=5))
    core.answer([request(1, planner=PlannerConfig(deadline_ms=50))])
    assert len(counted) == 1
    InferenceCore(policy, 1).prepare(PlannerConfig(deadline_ms=5))  # from nowhere: measured, and kept in the process
    assert len(counted) == 2


def test_a_compiled_network_has_costs_of_its_own_and_of_padded_batches():
    policy = demo_policy()
    before = costs_module.place(policy)
    accelerate(policy, "compile")
    assert costs_module.place(policy) == f"{before}, compile"
    padded = Costs((1, 16, 64), *(({kind.name: (0.1, 0.2, 0.8) for kind in KINDS},) * 2), padded=True)
    assert padded.evaluation(KINDS[0], 9) == padded.evaluation(KINDS[0], 16) == 0.2


@pytest.mark.parametrize("change, words", [
    ({"rank_by": "medoid"}, "planner.rank_by = 'medoid' compares all candidates at once.*rank by a value"),
    ({"depth": 2}, "planner.depth does not go with planner.deadline_ms"),
    ({"early_rejection": True}, "planner.early_rejection does not go with planner.deadline_ms"),
    ({"deadline_ms": -1.0}, "planner.deadline_ms = -1.0 is out of range"),
])  # fmt: skip
def test_settings_that_do_not_go_with_a_deadline_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        check(RunConfig(planner=PlannerConfig(**{"deadline_ms": 100.0, **change}), learner=LearnerConfig(value_mode="both")))
    with pytest.raises(ConfigError, match="repeat = 2 compares episodes bit for bit"):
        check(RunConfig(repeat=2, planner=PlannerConfig(deadline_ms=100.0)))


def test_a_policy_server_counts_the_deadline_from_the_arrival_of_a_request(policy):
    """Of the request that waited longest: what is answered together has one decision."""
    core = InferenceCore(policy, 1)
    core._pilot = Autopilot(COSTS)
    server = PolicyServer(DeployedPolicy(core, PlannerConfig(candidates=3, deadline_ms=FOREVER), steps=1), 16, 50.0, 8)
    told = []
    decide = core._pilot.decide
    core._pilot.decide = lambda *given: told.append(decide(*given).autopilot) or decide(*given)
    seen = {"proprio": np.zeros(9, np.float32), "task_description": "lift the cube",
            **{camera: np.zeros((64, 64, 3), np.uint8) for camera in policy.spec.cameras}}

    async def two():
        return await asyncio.gather(server.ask(seen, seed=1), server.ask(seen, seed=2))

    assert [len(answer.scores[0]) for answer in asyncio.run(two())] == [3, 3]
    assert len(told) == 1 and told[0]["candidates"] == 3 and told[0]["waited_ms"] > 40
