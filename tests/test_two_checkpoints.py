"""A base checkpoint acts, a planning checkpoint imagines and values: both imported, as they are released."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from cosmos_ray.commands.cli import main
from cosmos_ray.config import PlannerConfig, RunConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import load_checkpoint, read_description, save_policy
from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import planning_network
from cosmos_ray.stages.evaluate import arms, evaluate, ticket
from cosmos_ray.stages.plan import plan_episode
from cosmos_ray.stages.round import Round
from cosmos_ray.tracking import Tracker
from tests import test_command_line, test_exchange_command
from tests.conftest import run_command
from tests.test_exchange import same
from tests.test_exchange_command import export, fails, importing
from tests.test_planning import demo_policy

handlers, released = test_command_line.handlers, test_exchange_command.files

BASE_ARMS = ["base", "base + planning", "base + planning checkpoint"]
REFINED_ARMS = ["refined", "refined + planning", "refined + planning checkpoint"]


@pytest.fixture(scope="module")
def files(released):
    """A release with a second, planning checkpoint beside the first, and statistics of its own."""
    state, generator = torch.load(released / "policy.pt", weights_only=True)["model"], torch.Generator().manual_seed(2)
    torch.save({k: (v + 0.02 * torch.randn(v.shape, generator=generator)).bfloat16() if v.is_floating_point() else v
                for k, v in state.items()}, released / "planning.pt")
    statistics = json.loads((released / "statistics.json").read_text())
    (released / "planning.json").write_text(json.dumps(statistics | {"actions_max": [2] * 7, "num_transitions": 7}))
    return released


def planning(files, root, **changes: str) -> list[str]:
    return [*importing(files, root, "planning.pt", "planning.json", **changes), "--as", "planning"]


@pytest.mark.parametrize("planning_first", [False, True])
def test_both_checkpoints_are_imported_in_either_order_each_with_its_own_statistics(files, tmp_path, capfd, handlers, planning_first):
    commands = [importing(files, tmp_path), planning(files, tmp_path)]
    for command in reversed(commands) if planning_first else commands:
        assert main(command) == 0
    said = capfd.readouterr().out
    assert "planning network of " in said and "base policy of " in said
    folder = tmp_path / "lib" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["base", "initial", "planning", "planning_initial"]
    for names, weights, statistics in ((("base", "initial"), "policy.pt", "statistics.json"),
                                       (("planning", "planning_initial"), "planning.pt", "planning.json")):
        ranges = read_statistics(files / statistics)
        for name in names:
            policy, _ = load_checkpoint(folder / name, dtype=None)
            assert same(policy.net.state_dict(), read_weights(files / weights))
            assert np.array_equal(policy.action_high, ranges.actions_high)
            assert read_description(folder / name)[2]["statistics"] == ranges.raw
    assert main(export(tmp_path, tmp_path / "out.pt", "pt", "--checkpoint", "planning")) == 0
    assert same(read_weights(tmp_path / "out.pt"), read_weights(files / "planning.pt"))
    assert read_statistics(tmp_path / "out_dataset_statistics.json").raw == read_statistics(files / "planning.json").raw


def test_a_second_import_of_one_kind_is_refused_and_leaves_the_first(files, tmp_path, capfd, handlers):
    assert main(planning(files, tmp_path)) == 0
    before = (tmp_path / "lib" / "checkpoints" / "planning" / "policy.json").read_bytes()
    fails(planning(files, tmp_path), 2, "run 'lib' has a planning network already: give another --name, or --fresh", capfd)
    assert (tmp_path / "lib" / "checkpoints" / "planning" / "policy.json").read_bytes() == before
    assert main(importing(files, tmp_path)) == 0
    fails(importing(files, tmp_path), 2, "run 'lib' has a base policy already", capfd)


@pytest.mark.parametrize("planning_first", [False, True])
def test_checkpoints_of_two_robots_are_refused(files, tmp_path, capfd, handlers, planning_first):
    narrow = json.loads((files / "statistics.json").read_text())
    narrow = {key: value[:6] if key.startswith("actions") else value for key, value in narrow.items()}
    (tmp_path / "six.json").write_text(json.dumps(narrow))
    second = importing(files, tmp_path, statistics=tmp_path / "six.json", model__suite="", model__chunk="16")
    first = planning(files, tmp_path, model__suite="", model__chunk="16")
    if not planning_first:
        first, second = [*first[:-2]], [*second, "--as", "planning"]
    assert main(first) == 0
    whose = "planning network" if planning_first else "base policy"
    fails(second, 2, f"policy.pt and the run's {whose} differ in action_dim: 6 and 7; import networks of one robot", capfd)
    assert len(list((tmp_path / "lib" / "checkpoints").iterdir())) == 2


def test_tiny_policies_that_see_differently_cannot_judge_each_other(tmp_path, capfd, handlers):
    """The tokenizer of `tiny` is fitted: the same weights mean nothing on another fit. A file of weights has no fit at all."""
    acts, judges = demo_policy(), demo_policy()
    judges.tokenizer.fit(torch.from_numpy(np.random.default_rng(3).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)))
    ranges = {"actions_min": [-1] * 4, "actions_max": [1] * 4, "proprio_min": [-2] * 9, "proprio_max": [1] * 9}
    (tmp_path / "ranges.json").write_text(json.dumps(ranges))
    save_policy(acts, tmp_path / "acts", 1)
    save_policy(judges, tmp_path / "judges", 1)
    command = ["import", "--root", str(tmp_path), "--name", "tiny", "--statistics", str(tmp_path / "ranges.json"), "--weights"]
    torch.save(acts.net.state_dict(), tmp_path / "alone.pt")
    fails([*command, str(tmp_path / "alone.pt")], 2, "alone.pt holds no tokenizer, and preset 'tiny' fits its own on demonstrations", capfd)
    assert main([*command, str(tmp_path / "acts")]) == 0
    imported, _ = load_checkpoint(tmp_path / "tiny" / "checkpoints" / "base")
    assert same(imported.tokenizer.state_dict(), acts.tokenizer.state_dict())
    fails([*command, str(tmp_path / "judges"), "--as", "planning"], 2, "have tokenizers fitted on different frames", capfd)
    assert main([*command, str(tmp_path / "acts"), "--as", "planning"]) == 0


@pytest.fixture
def run(tmp_path):
    """A run with a base and a refined policy, and a planning network in ``tmp_path/judge`` that is not imported yet; no Ray."""
    config = RunConfig(root=str(tmp_path), name="two", planner=PlannerConfig(candidates=2))
    folder = RunFolder(config)
    policy = demo_policy()
    save_policy(policy, folder.checkpoint("base"), 1, {"stage": "import", "step": 0})
    save_policy(policy, folder.checkpoint("refined"), 3, {"base_version": 1, "step": 5})
    policy.action_high += 1
    save_policy(policy, tmp_path / "judge", 2, {"stage": "import", "step": 0})
    yield Run(config, folder, Tracker(config, folder), quiet=True)
    folder.close()


def judge(run: Run) -> None:
    for name in ("planning", "planning_initial"):
        shutil.copytree(run.folder.path.parent / "judge", run.folder.checkpoint(name))


def asked(run: Run, planner: PlannerConfig) -> Run:
    return dataclasses.replace(run, config=dataclasses.replace(run.config, planner=planner))


def test_each_policy_has_an_arm_that_each_network_judges(run):
    before = {arm.name: arm.run_keys for arm in arms(run)}
    assert list(before) == ["base", "refined", "refined + planning"]
    judge(run)
    after = {arm.name: arm for arm in arms(run)}
    assert list(after) == BASE_ARMS + REFINED_ARMS
    assert {name: after[name].run_keys for name in before} == before  # what was evaluated before the import stays evaluated
    judges = {name: arm.acting.planning_checkpoint for name, arm in after.items()}
    assert [name for name, path in judges.items() if path] == [BASE_ARMS[2], REFINED_ARMS[2]]
    assert {load_checkpoint(path)[1] for path in judges.values() if path} == {2}
    assert [bool(arm.acting.planner) for arm in after.values()] == 2 * [False, True, True]
    assert len({str(arm.run_keys) for arm in after.values()}) == 6
    assert list({arm.name for arm in arms(run, ["base + planning checkpoint"])}) == ["base + planning checkpoint"]


def test_no_other_network_judges_by_a_joint_value(run):
    judge(run)
    joint = asked(run, PlannerConfig(candidates=2, rank_by="joint"))
    assert [arm.name for arm in arms(joint)] == BASE_ARMS[:2] + REFINED_ARMS[:2]
    assert not any(arm.acting.planning_checkpoint for arm in arms(joint))


def test_an_arm_that_a_run_cannot_have_is_named_with_those_it_can(run):
    complaint = r"run 'two' has no arm 'base \+ planning checkpoint': its arms are base, base \+ planning, refined, refined \+ planning"
    with pytest.raises(ConfigError, match=complaint):
        evaluate(run, ["base", "base + planning checkpoint"])
    assert [arm.name for arm in arms(run, ["base + planning", "base"])] == ["base", "base + planning"]  # asked for, no usual arm


def test_further_training_begins_from_the_imported_planning_network_and_replaces_it(run):
    assert Round(run, 1, 1).start("planning") == "base"
    judge(run)
    assert Round(run, 1, 1).start("planning") == "planning_initial" and Round(run, 1, 1).start("refined") == "base"
    assert not Round(run, 1, 1).done("planning", 1)
    save_policy(demo_policy(), run.folder.checkpoint("planning"), 4, {"base_version": 1, "round": 1, "step": 10})
    for policy in ("base", "refined"):
        assert planning_network(run, policy) == run.folder.checkpoint("planning").resolve()
    save_policy(demo_policy(), run.folder.checkpoint("base"), 9, {"step": 20})  # another base policy, which it was not trained for
    assert planning_network(run, "base") == run.folder.checkpoint("planning_initial").resolve()


@pytest.mark.slow
def test_a_released_pair_acts_and_judges_in_evaluate_plan_audit_and_report(tmp_path):
    acts, judges = demo_policy(), demo_policy()
    torch.nn.init.normal_(judges.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(6))
    for name, policy, high in (("acts", acts, 1.0), ("judges", judges, 2.0)):
        save_policy(policy, tmp_path / name, 1)
        (tmp_path / f"{name}.json").write_text(json.dumps({"actions_min": [-1] * 4, "actions_max": [high] * 4, "proprio_min": [-2] * 9,
                                                           "proprio_max": [1] * 9}))
    small = ["--eval-episodes", "1", "--quiet", "--sim.horizon", "20"]
    for role, name in (("planning", "judges"), ("base", "acts")):
        given = ["--as", role, "--weights", str(tmp_path / name), "--statistics", str(tmp_path / f"{name}.json")]
        run_command("import", tmp_path, *given, *small, name="pair")
    said = run_command("evaluate", tmp_path, *small, "--repeat", "1", name="pair").stdout
    assert all(f"{name} " in said for name in BASE_ARMS) and "3 bit-identical" in said
    config = stored_config(RunConfig(root=str(tmp_path), name="pair"))
    folder = RunFolder(config)
    run = Run(config, folder, Tracker(config, folder), quiet=True)
    store = ReplayStore(folder.replay, create=False)
    store.refresh()
    decisions = {arm.name: store.view(ticket(run, arm, 0).key.name).header["info"]["decisions"] for arm in arms(run)}
    itself, other = (decisions[name][0]["scores"] for name in BASE_ARMS[1:])
    assert len(itself) == len(other) == 3 and itself != other  # the same candidates in the same state, judged by another network
    trace = plan_episode(run)
    folder.close()
    stored = decisions[BASE_ARMS[2]]
    assert trace.chosen == [d["chosen"] for d in stored]
    assert np.allclose(trace.scores, [d["scores"] for d in stored], atol=6e-5)  # an episode stores four digits
    assert "filmstrip in" in run_command("plan", tmp_path, "--quiet", name="pair").stdout
    assert "page in" in run_command("audit", tmp_path, *small, "--probes", "1", name="pair").stdout
    assert "report in" in run_command("report", tmp_path, "--quiet", name="pair").stdout
    assert "base + planning checkpoint" in json.loads((tmp_path / "pair" / "report.json").read_text())["headline"]
