"""The audit of planning: branches of the real simulator, arms that cannot be wrong, and the shares that come of them."""

import dataclasses
import json
import threading
import time

import numpy as np
import psutil
import pytest
import torch

from cosmos_ray.config import PlannerConfig, RunConfig, SimConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.oracle.branch import Simulator
from cosmos_ray.oracle.chooser import ARMS, Chooser
from cosmos_ray.oracle.core import OracleCore
from cosmos_ray.oracle.shares import shares
from cosmos_ray.planning.scoring import score
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.report.audit_page import headline, write_audit_page
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.ticket import EpisodeTicket, evaluation_noise_seed
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.experts import expert
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.stages.audit import audit
from cosmos_ray.tracking import Tracker
from tests.test_planning import demo_policy

SIM = SimConfig(horizon=60)
PLANNER = PlannerConfig(candidates=3, value_samples=1)
CHUNK = 8


@pytest.fixture(scope="module")
def env():
    torch.set_num_threads(1)
    made = Environment(SIM)
    yield made
    made.close()


@pytest.fixture
def chooser(env):
    return Chooser(demo_policy().eval(), Simulator(env), PLANNER, steps=1, gamma=0.98)


def branch_of(chooser, index=0):
    seed = state_seed("eval", 0, index)
    return chooser.simulator.begin(seed, evaluation_noise_seed(seed))


def demonstrated(env, seed: int) -> np.ndarray:
    """(T, d) actions of the scripted expert from an initial state to success."""
    env.reset(seed)
    actions, steps = [], expert(env)
    while not env.done:
        actions.append(np.clip(next(steps), -1, 1).astype(np.float32))
        env.step(actions[-1])
    assert env.success
    return np.array(actions)


def test_branches_do_not_disturb_each_other(chooser):
    start = branch_of(chooser)
    rng = np.random.default_rng(0)
    one, other = (rng.uniform(-1, 1, (CHUNK, 4)) for _ in range(2))
    first = chooser.simulator.run(start, one)
    chooser.simulator.run(chooser.simulator.run(start, other), other)
    again = chooser.simulator.run(start, one)
    assert np.array_equal(first.state, again.state) and np.array_equal(first.images, again.images) and first.step == CHUNK
    assert not np.array_equal(first.state, chooser.simulator.run(start, other).state)


def test_the_policy_arm_is_the_evaluation_episode(chooser, tmp_path, env):
    seed = state_seed("eval", 0, 0)
    core = RolloutCore(Simulators([env]), ReplayStore(tmp_path), LocalClient(InferenceCore(demo_policy(), 1)), steps=1)
    ticket = EpisodeTicket(EpisodeKey("run", "Lift", "eval", seed), noise_seed=evaluation_noise_seed(seed))
    finished = core.advance([ticket], 60)
    episode = core.store.read(finished[0].name)
    (end,) = chooser.play_on([branch_of(chooser)])
    assert (end.step, end.success) == (episode.length, episode.success) and np.array_equal(end.state, episode.states[-1])


@pytest.mark.parametrize("planner", [PLANNER, dataclasses.replace(PLANNER, depth=2, branch=2, beam=2)], ids=["depth 1", "depth 2"])
def test_the_planned_arm_is_the_planned_evaluation_episode(chooser, tmp_path, env, planner):
    chooser.planner = planner
    seed = state_seed("eval", 0, 0)
    core = RolloutCore(Simulators([env]), ReplayStore(tmp_path), LocalClient(InferenceCore(demo_policy(), 1)), steps=1)
    planned = EpisodeTicket(EpisodeKey("run", "Lift", "eval", seed), evaluation_noise_seed(seed), ActingPolicy(planner=planner))
    finished = core.advance([planned], 60)
    episode = core.store.read(finished[0].name)
    branch = branch_of(chooser)
    while not branch.done:
        branch = chooser.choose("V(s')", [branch])[0]
    assert np.array_equal(branch.state, episode.states[-1])


class Scripted(Chooser):
    """Candidates from a script instead of the policy: the last one of several is the demonstration's chunk."""

    def __init__(self, chooser, actions, alone):
        super().__init__(chooser.policy, chooser.simulator, chooser.planner, steps=chooser.steps, gamma=chooser.gamma)
        self.actions, self.alone = actions, alone

    def propose(self, branches, n=None):
        proposals = super().propose(branches, n)
        n = n or self.planner.candidates
        for i, branch in enumerate(branches):
            good = np.resize(self.actions[branch.step : branch.step + CHUNK], (CHUNK, 4)) if branch.step < len(self.actions) else 0.0
            proposals.actions[i * n : (i + 1) * n] = 0.0
            if n > 1 or self.alone:
                proposals.actions[(i + 1) * n - 1] = torch.as_tensor(good)
        return proposals


@pytest.mark.parametrize("alone", [True, False], ids=["policy goes on well", "policy goes on badly"])
def test_true_returns_find_the_one_candidate_that_leads_to_success(chooser, env, alone):
    seed = state_seed("eval", 0, 0)
    scripted = Scripted(chooser, demonstrated(env, seed), alone)
    branch, decisions = branch_of(chooser), 0
    while not branch.done:
        (branch,), decisions = scripted.choose("return", [branch]), decisions + 1
    assert branch.success == alone  # where the policy fails from everywhere, no return tells candidates apart
    if alone:
        assert decisions == 1 and branch.step <= len(scripted.actions)


def test_returns_discount_from_the_decision_on(chooser, env):
    seed = state_seed("eval", 0, 0)
    scripted = Scripted(chooser, actions := demonstrated(env, seed), True)
    start = branch_of(chooser)
    later = scripted.simulator.run(start, actions[:CHUNK])
    first, second = scripted.returns([start, later], np.array([0, CHUNK]))
    assert first == pytest.approx(0.98 ** len(actions)) and second == pytest.approx(0.98 ** (len(actions) - CHUNK))
    assert Scripted(chooser, actions, False).returns([start], np.array([0])) == [0.0]


def test_the_learned_value_of_a_true_future_sees_that_future(chooser):
    branches = [branch_of(chooser, 0), branch_of(chooser, 1)]
    proposals = chooser.propose(branches)
    outcomes = chooser.outcomes(branches, proposals)
    values = chooser.true_future_values(branches, proposals, outcomes)
    assert values.shape == (6,) and ((values >= 0) & (values <= 1)).all()
    other = [dataclasses.replace(o, images=255 - o.images) if i == 4 else o for i, o in enumerate(outcomes)]
    changed = chooser.true_future_values(branches, proposals, other) != values
    assert changed.tolist() == [False] * 4 + [True, False]


def test_a_future_with_one_true_part_is_valued_by_that_part_alone(chooser):
    branches = [branch_of(chooser, 0), branch_of(chooser, 1)]
    proposals = chooser.propose(branches)
    outcomes = chooser.outcomes(branches, proposals)
    values = chooser.partly_true_values(branches, proposals, outcomes)
    wrist, third = chooser.policy.layout.cameras
    assert list(values) == ["proprioception", wrist, third]
    seen = [dataclasses.replace(o, images=np.stack([255 - o.images[0], o.images[1]])) for o in outcomes]
    changed = chooser.partly_true_values(branches, proposals, seen)
    assert {name: bool((changed[name] != values[name]).all()) for name in values} == {"proprioception": False, wrist: True, third: False}
    felt = [dataclasses.replace(o, proprio=o.proprio + 0.01) for o in outcomes]
    changed = chooser.partly_true_values(branches, proposals, felt)
    assert [bool((changed[name] != values[name]).all()) for name in values] == [True, False, False]


def test_an_imagined_part_in_its_own_place_changes_nothing(chooser):
    proposals = chooser.propose([branch_of(chooser)])
    planner = dataclasses.replace(chooser.planner, futures=2, future_steps=2, value_samples=2)
    network = chooser.planning_network
    futures, scores = score(network, proposals, planner)
    again, same = score(network, proposals, planner, {})
    assert torch.equal(again, futures) and torch.equal(same, scores)
    frame = network.layout.future_images[0]
    _, other = score(network, proposals, planner, {frame: futures[:, :, frame] + 1})
    one = dataclasses.replace(planner, futures=1)
    _, alone = score(network, proposals, one)
    assert not torch.equal(other, scores)
    assert torch.equal(score(network, proposals, one, {frame: score(network, proposals, one)[0][:, :, frame]})[1], alone)


def test_a_probe_has_every_part(run):
    core = OracleCore(run.config, str(run.folder.checkpoint("base")))
    found = [row for index in range(2) for row in core.probe([index])]
    core.close()
    assert found and all(list(row["parts"]) == ["proprioception", *core.chooser(0).planning_network.layout.cameras] for row in found)
    assert all(len(values) == 2 for row in found for values in row["parts"].values())


@pytest.mark.parametrize("arm", ARMS)
def test_arms_do_not_depend_on_what_else_is_in_the_batch(chooser, arm):
    branches = [branch_of(chooser, i) for i in range(2)]
    together = chooser.choose(arm, branches)
    alone = [chooser.choose(arm, [branch])[0] for branch in branches]
    assert all(np.array_equal(a.state, b.state) for a, b in zip(together, alone, strict=True))


# ---------------------------------------------------------------- what comes of it

OUTCOMES = {"policy": "1100000000", "random": "1000000000", "Q(s,a)": "1110000000", "V(s')": "1111000000", "V(true s')": "1111110000",
            "return": "1111111100"}


def rows(**texts):
    return [{"arm": arm, "index": i, "success": c == "1", "steps": 40} for arm, text in texts.items() for i, c in enumerate(text)]


def probe(returns, **scores):
    return {"index": 0, "step": 8, "spread": 0.1, "return": returns, "Q(s,a)": [0.5] * len(returns), "V(s')": [0.5] * len(returns),
            "V(true s')": [0.5] * len(returns), "parts": {}, **scores}


def test_points_are_lost_to_candidates_then_to_the_value_then_to_the_world_model():
    result = shares(rows(**OUTCOMES), [])
    assert [(row["part"], round(row["points"])) for row in result["lost"]] == [("candidates", 20), ("value", 20), ("world model", 20)]
    assert (result["arms"]["V(s')"]["gain_points"], result["arms"]["V(s')"]["won"], result["arms"]["V(s')"]["lost"]) == (20, 2, 0)
    assert result["arms"]["V(s')"]["ci_low"] <= 20 <= result["arms"]["V(s')"]["ci_high"]
    assert headline({**result, "candidates": 8}) == (
        "Over 10 held-out initial states the policy alone succeeds in 20.0 %, best of 8 by V(s') in 40.0 %, and the best choice there is "
        "in 80.0 %. Points lost from 100: 20.0 to the candidates, 20.0 to the value, 20.0 to the world model.")


def test_only_initial_states_that_every_arm_played_count():
    played = [row for row in rows(**OUTCOMES) if row["arm"] != "return" or row["index"] < 5]
    result = shares(played, [])
    assert result["episodes"] == 5 and result["arms"]["policy"]["successes"] == 2


def test_a_score_is_measured_where_candidates_differ():
    decided = probe([0.5, 0.0, 0.0], **{"V(s')": [0.9, 0.1, 0.2], "V(true s')": [0.1, 0.9, 0.2]})
    hopeless, safe = probe([0.0, 0.0, 0.0]), probe([0.5, 0.6, 0.5])
    found = shares(rows(**OUTCOMES), [decided, hopeless, safe])["probes"]
    assert (found["decisions"], found["candidates_differ"], found["all_fail"]) == (3, 1, 1)
    good, bad, blind = (found["judgements"][name] for name in ("V(s')", "V(true s')", "Q(s,a)"))
    assert (good["auc_within_a_decision"], good["chose_success"]) == (1.0, 1.0) and good["chance"] == pytest.approx(1 / 3)
    assert (bad["auc_within_a_decision"], bad["chose_success"]) == (0.0, 0.0) and blind["auc_within_a_decision"] == 0.5


def test_the_part_that_misleads_the_value_is_the_one_whose_truth_restores_the_order(tmp_path):
    true = [0.1, 0.2, 0.3, 0.4]
    parts = {"proprioception": [0.4, 0.3, 0.2, 0.1], "wrist": [0.0, 0.1, 0.6, 0.9], "third": [0.5] * 4}
    one = probe(true, **{"V(true s')": true, "V(s')": [0.1, 0.2, 0.4, 0.3], "parts": parts})
    other = probe(true, **{"V(true s')": true, "V(s')": true, "parts": parts})
    result = shares(rows(**OUTCOMES), [one, other])
    found = result["probes"]["agreement"]
    assert found == pytest.approx({"Q(s,a)": 0, "V(s')": (0.8 + 1) / 2, "V(s') with the true proprioception": -1,
                                   "V(s') with the true wrist": 1, "V(s') with the true third": 0})
    write_audit_page({**result, "task": "Lift", "checkpoint": "base", "candidates": 4, "gamma": 0.98}, tmp_path / "audit.html")
    assert "<td>V(s&#x27;) with the true proprioception</td><td>-1.00</td>" in (tmp_path / "audit.html").read_text()
    assert shares(rows(**OUTCOMES), [])["probes"]["agreement"] == {}


def test_the_page_says_what_the_result_says(tmp_path):
    result = {**shares(rows(**OUTCOMES), [probe([0.5, 0.0])]), "task": "Lift<b>", "checkpoint": "base", "candidates": 8, "gamma": 0.98}
    write_audit_page(result, tmp_path / "audit.html")
    page = (tmp_path / "audit.html").read_text()
    assert "Lift&lt;b&gt;" in page and "4/10" in page and "data:image/png" in page and "20.0 to the world model" in page


# ---------------------------------------------------------------- the stage


@pytest.fixture
def run(tmp_path):
    config = RunConfig(root=str(tmp_path), eval_episodes=2, planner=PlannerConfig(candidates=2, value_samples=1), sim=SimConfig(horizon=16))
    folder = RunFolder(config)
    save_policy(demo_policy(config.sim.cameras), folder.checkpoint("base"), 1)
    yield Run(config, folder, Tracker(config, folder), quiet=True)
    folder.close()


@pytest.mark.slow  # four actor starts
def test_an_audit_goes_on_where_it_was_cut_off(run, local_ray):
    first = audit(run, probes=1)
    assert first["episodes"] == 2 and first["checkpoint"] == "base" and run.folder.read_json("audit_base.json")["arms"] == first["arms"]
    (file,) = (run.folder.path / "audit").iterdir()
    lines = file.read_text().splitlines()
    assert len(lines) == 2 * len(ARMS) + 1
    file.write_text("\n".join(lines[:-2]) + '\n{"kind": "pl')  # the last two answers are lost, one of them half written
    assert audit(run, probes=1) == first
    assert sorted(json.loads(line)["index"] for line in file.read_text().splitlines() if line.endswith("}")) == sorted(
        json.loads(line)["index"] for line in lines)
    before = file.read_text()
    audit(run, probes=1)
    assert file.read_text() == before


@pytest.mark.slow  # two audits
def test_an_audit_goes_on_when_its_processes_are_killed(run, local_ray):
    wanted = audit(run, probes=1)
    (file,) = (run.folder.path / "audit").iterdir()
    file.unlink()

    def kill():
        while not (file.exists() and file.read_text().count("\n") > 2):
            time.sleep(0.1)
        for process in psutil.process_iter(["cmdline"]):
            if "ray::OracleActor" in " ".join(process.info["cmdline"] or []):
                killed.append(process.pid)
                process.kill()

    killed = []
    killer = threading.Thread(target=kill)
    killer.start()
    assert audit(run, probes=1) == wanted
    killer.join()
    assert killed


def test_the_core_answers_one_row_per_episode(run):
    core = OracleCore(run.config, str(run.folder.checkpoint("base")))
    try:
        played = core.play("random", [1, 0])
        assert [(row["arm"], row["index"]) for row in played] == [("random", 1), ("random", 0)]
        assert all(0 < row["steps"] <= 16 and isinstance(row["success"], bool) for row in played)
    finally:
        core.close()


@pytest.mark.parametrize("settings, arguments, message", [
    ({"planner": PlannerConfig(candidates=1)}, {}, "planner.candidates = 1 leaves nothing to choose"),
    ({}, {"checkpoint": "refined"}, "there is no policy 'refined'"),
    ({}, {"probes": -1}, "--probes -1"),
])  # fmt: skip
def test_what_cannot_be_audited_is_one_clear_line(run, settings, arguments, message):
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, **settings))
    with pytest.raises(ConfigError, match=message) as error:
        audit(run, **arguments)
    assert "\n" not in str(error.value)
