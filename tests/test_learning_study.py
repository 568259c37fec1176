"""The study of what refinement and planning bring: its arithmetic, and the whole of it at toy size."""

import dataclasses
import importlib
import json
import re
from unittest.mock import ANY

import pytest

from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.use import Use


@pytest.fixture(scope="module")
def study():
    return importlib.import_module("jobs.studies.learning")


def outcomes(study, **changed):
    """Ten initial states: every arm wins the first five, but for what is ``changed``."""
    return {arm: changed.get(arm, [1] * 5 + [0] * 5) for arm in study.ARMS}


def test_counts_and_differences_are_over_all_seeds_and_paired(study):
    first = outcomes(study, **{study.FUTURE: [1] * 9 + [0]})
    second = outcomes(study, **{study.FUTURE: [0] + [1] * 9, study.COMPUTE: [0] * 10})
    result = study.summarise([first, second])
    assert result["arms"][study.BASE] | {"low": 0, "high": 0} == {"successes": 10, "episodes": 20, "low": 0, "high": 0, "by_seed": [5, 5]}
    gain = result["pairs"][f"{study.FUTURE} over {study.BASE}"]
    assert (gain["won"], gain["lost"], gain["gain_points"]) == (9, 1, pytest.approx(40))
    assert 0 < gain["ci_low"] < 40 < gain["ci_high"]
    same = result["pairs"][f"{study.REFINED} over {study.BASE}"]
    assert same == {"gain_points": 0, "ci_low": 0, "ci_high": 0, "won": 0, "lost": 0, "p": 1}
    assert result["pairs"][f"{study.FUTURE} over {study.COMPUTE}"]["won"] == 13


def test_the_table_names_every_arm_with_its_gain(study):
    text = study.table("lift", study.summarise([outcomes(study, **{study.REFINED: [1] * 10})]))
    assert all(f"| {arm} | " in text for arm in study.ARMS)
    assert "| refined | 10/10 (10) | 72.2 to 100.0 % | +50.0 (+20.0 to +80.0) | 5, 0 |" in text
    assert f"| {study.BASE} | 5/10 (5) | 23.7 to 76.3 % |  |  |" in text


@pytest.mark.parametrize("flags, message", [
    (["--set", "rollouts"], "argument --set: 'rollouts' is not NAME=VALUE"),
    (["--set", "rollout=3"], "argument --set: 'rollout=3' is not NAME=VALUE with the name of a setting"),
    (["--set", "planner.rank_by=both"], "argument --set: 'planner.rank_by=both': planner.rank_by is the study's own"),
    (["--task", "fold"], "invalid choice: 'fold'"),
])  # fmt: skip
def test_wrong_flags_are_one_clear_line(study, flags, message, capsys):
    with pytest.raises(SystemExit) as leaving:
        study.main(flags)
    assert leaving.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_setting_out_of_range_is_one_clear_line(study, tmp_path, capsys):
    flags = ["--task", "wide_lift", "--seed", "0", "--root", str(tmp_path / "runs"), "--to", str(tmp_path / "results"), "--set", "demos=0"]
    assert study.main(flags) == 1
    assert capsys.readouterr().err == "learning: demos = 0 is out of range: it must be at least 1 and at most 500000\n"
    assert not (tmp_path / "runs").exists()


def test_a_study_that_was_run_with_other_settings_is_refused(study, tmp_path, capsys):
    RunFolder(study.Study("wide_lift", 0, tmp_path, {"demos": "12"}).main).close()
    assert study.main(["--task", "wide_lift", "--seed", "0", "--root", str(tmp_path), "--to", str(tmp_path / "results")]) == 1
    assert "study wide_lift-0 in " in (error := capsys.readouterr().err) and "was run with demos = 12, not 20: give another" in error


def test_a_study_may_go_on_with_other_threads_and_workers(study, tmp_path):
    RunFolder(study.Study("wide_lift", 0, tmp_path, {}).main).close()
    there = {"learner.threads": "4", "rollout.workers": "16", "inference.gpus": "0.5", "inference.precision": "fp32", "wandb": "offline"}
    study.refuse_other_settings(study.Study("wide_lift", 0, tmp_path, there).main)
    with pytest.raises(ConfigError, match="was run with inference.precision = fp32, not bf16"):  # what "auto" is on a GPU
        study.refuse_other_settings(study.Study("wide_lift", 0, tmp_path, {"inference.gpus": "0.5"}).main)


def test_a_store_with_credentials_is_refused_and_they_are_not_shown(study, studied, tmp_path, capsys):
    flags = ["--task", "can", "--seed", "0", "--to", str(tmp_path), "--set", "replay.store=s3://name:secret@bucket/store"]
    assert study.main(flags) == 1
    error = capsys.readouterr().err
    assert "holds credentials" in error and "secret" not in error.replace("AWS_SECRET", "") and not studied


def test_controls_that_were_run_with_other_settings_are_refused(study, tmp_path):
    first, second = (study.Study("wide_lift", 0, tmp_path, {"refine_steps": steps}) for steps in ("5", "6"))
    RunFolder(first._control("compute", "base", "replay", 0.0)).close()
    study.refuse_other_settings(first._control("compute", "moved/base", "moved/replay", 0.0))
    with pytest.raises(ConfigError, match="study wide_lift-0-compute in .* was run with pretrain_steps = 3010, not 3012"):
        study.refuse_other_settings(second._control("compute", "base", "replay", 0.0))


@pytest.fixture
def studied(study, monkeypatch):
    """Studies that are done already, V(s') of seed 1 winning one more; the training seeds asked for, in order."""
    asked, won = [], {0: [1] * 8 + [0] * 2, 1: [1] * 9 + [0]}

    def done(self):
        asked.append(self.main.seed)
        return outcomes(study, **{study.FUTURE: won[self.main.seed]})

    monkeypatch.setattr(study.Study, "outcomes", done)
    return asked


def test_training_seeds_studied_apart_are_joined(study, studied, tmp_path):
    for seed in "10":
        assert study.main(["--task", "can", "--seed", seed, "--to", str(tmp_path), "--set", f"learner.threads={seed}"]) == 0
    result = json.loads((tmp_path / "learning.json").read_text())["can"]
    assert result["seeds"] == [0, 1] and result["arms"][study.FUTURE]["by_seed"] == [8, 9]
    assert result["gain_points"] == pytest.approx(35)
    assert result["outcomes"]["1"][study.FUTURE] == "1111111110"


def test_results_that_name_a_setting_as_it_was_called_before_are_joined(study, studied, tmp_path):
    assert study.main(["--task", "can", "--seed", "0", "--to", str(tmp_path)]) == 0
    file = tmp_path / "learning.json"
    before = file.read_text().replace("learner.advantage_temperature", "learner.advantage")
    assert before != file.read_text()
    file.write_text(before)
    assert study.main(["--task", "can", "--seed", "1", "--to", str(tmp_path)]) == 0
    assert json.loads(file.read_text())["can"]["seeds"] == [0, 1]


def test_training_seeds_studied_with_other_settings_are_not_joined(study, studied, tmp_path, capsys):
    assert study.main(["--task", "can", "--seed", "0", "--to", str(tmp_path), "--set", "demos=12"]) == 0
    before = (tmp_path / "learning.json").read_text()
    assert study.main(["--task", "can", "--seed", "1", "--to", str(tmp_path)]) == 1
    assert "learning.json was studied with demos = 12, not 20: give another --to" in capsys.readouterr().err
    assert (tmp_path / "learning.json").read_text() == before and studied == [0]  # refused before it ran


@pytest.mark.parametrize("content, complaint", [
    ('{"can": {"seeds": [0], "settings": {}}}', "can in .*learning.json is of an older version, which did not keep its outcomes"),
    ('{"can": ', "cannot read the results in .*learning.json"),
    ("[]", "learning.json is not a file of results"),
])  # fmt: skip
def test_results_that_nothing_can_be_joined_with_are_kept(study, studied, tmp_path, content, complaint, capsys):
    (tmp_path / "learning.json").write_text(content)
    assert study.main(["--task", "can", "--seed", "1", "--to", str(tmp_path)]) == 1
    assert re.search(complaint, error := capsys.readouterr().err) and len(error.splitlines()) == 1
    assert (tmp_path / "learning.json").read_text() == content and not studied


@pytest.fixture(scope="module")
def curves():
    return importlib.import_module("jobs.studies.curves")


def test_points_of_several_seeds_are_added_up_where_all_have_them_and_drawn(curves):
    first = {"V(s')": [[1, 3, 10], [2, 4, 10], [4, 9, 10]], "Q(s,a)": [[1, 3, 10], [2, 5, 10], [4, 9, 10]]}
    second = {"V(s')": [[1, 4, 20], [2, 9, 20]], "Q(s,a)": [[1, 4, 20], [2, 2, 20]]}
    both = curves.joined([first, second])
    assert both == {"V(s')": [[1, 7, 30], [2, 13, 30]], "Q(s,a)": [[1, 7, 30], [2, 7, 30]]}
    panels = curves.draw({0: first, 1: second}, "candidates", "lift").axes
    titles = ["lift, training seed 0", "lift, training seed 1", "lift, 2 training seeds together"]
    assert [axis.get_title(loc="left") for axis in panels] == titles
    assert [line.get_label() for line in panels[2].lines] == ["V(s')", "Q(s,a)"]
    assert panels[2].lines[0].get_ydata() == pytest.approx([7 / 30, 13 / 30])
    assert [[t.get_text() for t in axis.get_xticklabels()] for axis in panels] == [["1", "2", "4"], ["1", "2"], ["1", "2"]]
    assert len(curves.draw({0: first}, "candidates", "lift").axes) == 1


def test_seeds_without_a_common_point_are_drawn_all_the_same(curves):
    panels = curves.draw({0: {"base": [[0, 1, 10]]}, 1: {"base": [[0.3, 2, 10]]}}, "uniform", "lift").axes
    assert [list(axis.lines[0].get_ydata()) for axis in panels] == [[0.1], [0.2]]


@pytest.fixture
def measured(curves, monkeypatch):
    """A study whose points are known: V(s') wins as many of ten as there are candidates."""
    monkeypatch.setattr(curves, "_studied", lambda task, seed, root, flags, over, at: (curves.Study(task, seed, root, flags).main, at))
    monkeypatch.setitem(curves.OVER, "candidates", lambda main, n: {"V(s')": [n, n, 10]})


def test_points_of_several_commands_make_one_curve(curves, measured, tmp_path):
    for seed, n in (("0", "4"), ("0", "2"), ("1", "2")):
        assert curves.main(["--task", "can", "--seed", seed, "--over", "candidates", "--at", n, "--to", str(tmp_path)]) == 0
    curve = json.loads((tmp_path / "curves.json").read_text())["can over candidates"]
    assert curve["lines"] == {"V(s')": [[2, 4, 20]]} and (tmp_path / "can_candidates.png").stat().st_size
    assert curve["by_seed"] == {"0": {"V(s')": [[2, 2, 10], [4, 4, 10]]}, "1": {"V(s')": [[2, 2, 10]]}}


def test_a_curve_of_other_settings_is_kept(curves, measured, tmp_path, capsys):
    flags = ["--task", "can", "--seed", "0", "--over", "candidates", "--at", "4", "--to", str(tmp_path)]
    assert curves.main(flags) == 0
    file = tmp_path / "curves.json"
    file.write_text(before := file.read_text().replace('"rollouts": "300"', '"rollouts": "500"'))
    assert curves.main(flags) == 1
    assert "can over candidates in " in (error := capsys.readouterr().err) and "studied with rollouts = 500, not 300: give" in error
    assert file.read_text() == before


def test_a_point_takes_its_place_in_the_curve(curves):
    curve = {"refined": [[50, 1, 10], [200, 3, 10]]}
    assert curves.with_point(curve, {"refined": [100, 2, 10]}) == {"refined": [[50, 1, 10], [100, 2, 10], [200, 3, 10]]}
    assert curves.with_point(curve, {"refined": [50, 9, 10]}) == {"refined": [[50, 9, 10], [200, 3, 10]]}
    assert curves.with_point({}, {"refined": [50, 9, 10]}) == {"refined": [[50, 9, 10]]}


def test_few_rollouts_are_learned_from_in_one_round_and_more_as_in_the_study(curves, monkeypatch, tmp_path):
    main = curves.Study("wide_lift", 0, tmp_path, {}).main
    monkeypatch.setattr(curves, "_refined", lambda main, config, x: config)
    few, more = curves.over_rollouts(main, 64), curves.over_rollouts(main, 100)
    assert (few.rounds, few.rollouts, more.rounds, more.rollouts) == (1, 64, 2, 50) and curves.over_rollouts(main, 800) is main
    assert curves.over_rollouts(main, 65).rollouts == 65 and few.rollout.horizon == 2 * main.rollout.horizon
    assert few.learner.self_imitation < main.learner.self_imitation == more.learner.self_imitation
    assert few.learner.planning_mix == main.learner.planning_mix
    assert [few.name, more.name] == ["wide_lift-0-rollouts64", "wide_lift-0-rollouts100"]
    assert curves._studied("wide_lift", 0, tmp_path, {}, "rollouts", [64]) == (main, [64])  # needs a base policy alone, and trains it


def test_rollouts_that_do_not_divide_into_rounds_are_refused_before_anything_runs(curves, tmp_path, capsys):
    flags = ["--task", "wide_lift", "--seed", "0", "--over", "rollouts", "--at", "64", "--at", "101", "--root", str(tmp_path / "runs")]
    assert curves.main([*flags, "--to", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err == "curves: 101 rollouts do not divide into 2 rounds: give another --at\n"
    assert not list(tmp_path.iterdir())


def test_a_curve_names_how_few_rollouts_are_learned_from(curves, tmp_path):
    main = curves.Study("wide_lift", 0, tmp_path, {}).main
    few = curves._settings(main, "rollouts").items() - curves._settings(main, "candidates").items()
    assert {("rounds (up to 65 rollouts)", "1"), ("rollout.horizon (up to 65 rollouts)", "320")} < few and len(few) == 5


def test_planning_by_another_value_leaves_the_run_its_settings(study, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(study, "evaluate", lambda run, only: {"arms": {name: seen.append(run.config) for name in only}})
    with study.open_run(study.Study("can", 0, tmp_path, {}).main, Use(needs_ray=False)) as run:
        study.planned(run, rank_by="action", candidates=2)
        assert run.config.planner.rank_by == "future" and run.folder.read_json("config.json")["planner"]["rank_by"] == "future"
    assert (seen[0].planner.rank_by, seen[0].planner.candidates) == ("action", 2)


def test_a_share_is_all_that_differs_and_the_studys_own_is_the_study(curves, monkeypatch, tmp_path):
    main = curves.Study("can", 0, tmp_path, {}).main
    monkeypatch.setattr(curves, "_refined", lambda main, config, x: config)
    config = curves.over_successes(main, 0.85)
    assert (config.name, config.replay.success_share) == ("can-0-successes0.85", 0.85)
    assert dataclasses.replace(config, name=main.name, replay=main.replay) == main
    assert curves.over_successes(main, main.replay.success_share) is main


def test_curves_before_the_study_are_one_clear_line(curves, tmp_path, capsys):
    assert curves.main(["--task", "wide_lift", "--seed", "0", "--root", str(tmp_path / "runs"), "--to", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().err.startswith("curves: there is no study of wide_lift")
    assert not (tmp_path / "runs").exists()


def test_curves_of_a_study_that_was_run_with_other_settings_are_refused(curves, tmp_path, capsys):
    run = RunFolder(curves.Study("can", 0, tmp_path, {"demos": "12"}).main)
    run.checkpoint("refined").mkdir(parents=True)
    (run.checkpoint("refined") / "policy.json").write_text("{}")
    run.close()
    assert curves.main(["--task", "can", "--seed", "0", "--root", str(tmp_path), "--to", str(tmp_path / "results")]) == 1
    assert "study can-0 in " in (error := capsys.readouterr().err) and "was run with demos = 12, not 20: give another" in error


def test_an_interrupted_study_says_that_the_same_command_goes_on(study, monkeypatch, tmp_path, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run_studies", interrupted)
    assert study.main(["--to", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "learning: interrupted; the same command continues where it stopped\n"


@pytest.mark.parametrize("flags, reason", [(["--at", "50"], "--at needs one curve"),
                                           (["--over", "rollouts", "--at", "0"], "--at 0 must be a whole number, at least 1"),
                                           (["--over", "candidates", "--at", "2.5"], "--at 2.5 must be a whole number"),
                                           (["--over", "uniform", "--at", "2"], "--at 2 must be a share, from 0 to 1")])
def test_points_that_no_curve_has_are_refused(curves, capsys, flags, reason):
    with pytest.raises(SystemExit):
        curves.parse(flags)
    assert reason in capsys.readouterr().err


@pytest.mark.slow
def test_the_whole_study_at_toy_size_and_again_changes_nothing(study, curves, tmp_path):
    small = {"demos": 4, "pretrain_steps": 10, "planning_steps": 5, "rollouts": 3, "refine_steps": 10, "refine_rollouts": 2,
             "publish_every": 5,
             "eval_episodes": 2, "rollout.workers": 1, "rollout.envs_per_worker": 2, "learner.batch_size": 8, "planner.candidates": 2}
    flags = ["--task", "wide_lift", "--seed", "0", "--root", str(tmp_path / "runs"), "--to", str(tmp_path / "results")]
    for name, value in small.items():
        flags += ["--set", f"{name}={value}"]
    assert curves.main([*flags, "--over", "rollouts", "--at", "4"]) == 0  # before the study: trains its base policy
    assert not (tmp_path / "runs" / "wide_lift-0" / "checkpoints" / "refined").exists()
    assert study.main(flags) == 0
    planner = json.loads((tmp_path / "runs/wide_lift-0/config.json").read_text())["planner"]
    assert (planner["rank_by"], planner["candidates"]) == ("future", 2)
    file = tmp_path / "results" / "learning.json"
    result = json.loads(file.read_text())["wide_lift"]
    assert list(result["arms"]) == list(study.ARMS) and all(arm["episodes"] == 2 for arm in result["arms"].values())
    assert {"gain_points", "ci_low", "ci_high"} <= result.keys()
    before, stamps = file.read_text(), {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.arrow")}
    assert study.main(flags) == 0
    assert file.read_text() == before and {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*.arrow")} == stamps
    # Ten rollouts are what the study had, and 0.3 its uniform noise: its own networks, trained no further.
    for over, points in (("candidates", (1, 2)), ("rollouts", (4, 10)), ("successes", (1,)), ("uniform", (0, 0.3))):
        assert curves.main([*flags, "--over", over, *(word for point in points for word in ("--at", str(point)))]) == 0
    assert json.loads((tmp_path / "runs/wide_lift-0/config.json").read_text())["planner"] == planner  # no measurement changes a run
    lines = {name: curve["lines"] for name, curve in json.loads((tmp_path / "results" / "curves.json").read_text()).items()}
    assert [[point[0] for point in line] for line in lines["wide_lift over candidates"].values()] == [[1, 2]] * 2
    assert [[point[0] for point in line] for line in lines["wide_lift over rollouts"].values()] == [[4, 10]] * 3
    own = {name: line[1][1] for name, line in lines["wide_lift over rollouts"].items()}
    assert own == {name: result["arms"][name]["successes"] for name in (study.REFINED, study.FUTURE, study.ACTION)}
    assert not (tmp_path / "runs" / "wide_lift-0-rollouts10").exists()
    assert list(lines["wide_lift over successes"]) == [study.REFINED, study.FUTURE, study.ACTION]
    assert json.loads((tmp_path / "runs/wide_lift-0-successes1/config.json").read_text())["replay"]["success_share"] == 1
    assert lines["wide_lift over uniform"] == {study.BASE: [[0, ANY, 2], [0.3, result["arms"][study.BASE]["successes"], 2]]}
