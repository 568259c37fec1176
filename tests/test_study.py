"""Studies: what their file may say, what the table counts, and one study run for real."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.config.settings import given
from cosmos_ray.config.study import STAGES, read_study
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.report.study_table import summarise, table
from cosmos_ray.stages.cell import description, refuse_other_settings
from cosmos_ray.stages.study_results import StudyResults
from tests.conftest import ROOT, environment

SMALL = """
base = "base"
pairs = [["V(s')", "Q(s,a)"]]

[settings]
demos = 4
pretrain_steps = 20
eval_episodes = {episodes}
sim.horizon = 60
rollout.workers = 1
rollout.envs_per_worker = 2
learner.batch_size = 8
learner.threads = 1
learner.checkpoint_every = 5
learner.value_mode = "both"
planner.candidates = 2

[tasks.lift]
settings.sim.task = "Lift"

[runs.main]
stages = ["collect", "pretrain"]

[arms.base]

[arms."V(s')"]
plays = "base + planning"
settings.planner.rank_by = "future"

[arms."Q(s,a)"]
plays = "base + planning"
settings.planner.rank_by = "action"

[arms.mean]
plays = "base + planning"
settings.planner.rank_by = "both"
"""


def written(folder: Path, text: str = SMALL, episodes: int = 2) -> Path:
    file = folder / "small.toml"
    file.write_text(text.replace("{episodes}", str(episodes)).lstrip())
    return file


def study_command(file: Path, root: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "cosmos_ray", "study", str(file), "--root", str(root), *flags]


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("change, message", [
    (("demos = 4", "demo = 4"), "line 5: unknown setting 'demo'"),
    (("demos = 4", "demos = 'four'"), "line 5: demos = 'four' must be of type int"),
    (("demos = 4", "demos = 0"), "demos = 0 is out of range"),
    (("demos = 4", "seed = 4"), "line 5: settings.seed is chosen by the study for its runs"),
    (("demos = 4", "demos = = 4"), "is not valid TOML: Invalid value .at line 5"),
    (('base = "base"', 'bases = "base"'), "line 1: bases is unknown; did you mean 'base'?"),
    (('base = "base"', 'base = "bas"'), "line 1: base names no arm 'bas'; did you mean 'base'?"),
    (('base = "base"', "seeds = [0, 0]"), r"line 1: seeds must be a list of different whole numbers, such as \[0, 1\]"),
    (('"Q(s,a)"]]', '"Q"]]'), "line 2: pairs names no arm 'Q'"),
    (('stages = ["collect", "pretrain"]', 'stages = ["pretrain", "collect"]'), "line 21: runs.main.stages must be some of collect, "),
    (("[runs.main]", '[runs.main]\nbase_of = "first"'), r"line 21: runs.main.base_of names no run 'first' above this one; there are main"),
    (('settings.planner.rank_by = "future"', "settings.demos = 3"), r"line 27: arms.V\(s'\).settings.demos is a setting of a run, not"),
    (('settings.planner.rank_by = "future"', 'run = "mian"'), r"line 27: arms.V\(s'\).run names no run 'mian'; did you mean 'main'"),
    (("[tasks.lift]", '[tasks.lift]\nrecipe = "lft"'), "line 18: tasks.lift.recipe: unknown recipe 'lft'"),
    (("[arms.base]", "[arms.base]\nplanner = 3"), "line 24: arms.base.planner is unknown"),
])  # fmt: skip
def test_a_mistake_in_the_file_is_one_line_with_its_key_and_line(tmp_path, change, message, capfd):
    assert change[0] in SMALL
    assert main(["study", str(written(tmp_path, SMALL.replace(*change))), "--root", str(tmp_path / "runs")]) == 2
    error = capfd.readouterr().err
    assert re.search(message, error) and error.startswith("cosmos_ray: error: ") and len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["small.toml"]


def test_runs_that_begin_from_others_need_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="and s3://bucket/runs is a bucket: give another --root"):
        read_study(ROOT / "jobs/studies/learning.toml", "s3://bucket/runs")


def test_a_run_that_exists_with_other_settings_is_refused(tmp_path):
    cell = read_study(written(tmp_path), str(tmp_path / "runs")).cells()[0]
    RunFolder(cell.config).close()
    refuse_other_settings(cell)
    other = read_study(written(tmp_path, SMALL.replace("pretrain_steps = 20", "pretrain_steps = 21")), str(tmp_path / "runs")).cells()[0]
    with pytest.raises(ConfigError, match="run lift-0 in .* was made with pretrain_steps = 20, not 21: give another --root"):
        refuse_other_settings(other)
    elsewhere = SMALL.replace("learner.threads = 1", "learner.threads = 4").replace("rollout.workers = 1", "rollout.workers = 3")
    refuse_other_settings(read_study(written(tmp_path, elsewhere), str(tmp_path / "runs")).cells()[0])


def test_controls_begin_from_the_base_policy_and_read_the_store_of_the_main_run(tmp_path):
    study = read_study(ROOT / "jobs/studies/learning.toml", str(tmp_path))
    main_cell, compute, cloned = study.cells()[:3]
    assert [cell.config.name for cell in (main_cell, compute, cloned)] == ["wide_lift-0", "wide_lift-0-compute", "wide_lift-0-cloned"]
    assert compute.needs == ("wide_lift-0",) and main_cell.chain.stages == STAGES
    assert compute.config.init == str(tmp_path / "wide_lift-0/checkpoints/base")
    assert compute.config.replay.store == cloned.config.replay.store == str(tmp_path / "wide_lift-0/replay")
    steps = main_cell.config.rounds * (main_cell.config.planning_steps + main_cell.config.refine_steps)
    assert compute.config.pretrain_steps == steps and compute.config.learner.lr == main_cell.config.learner.refine_lr
    assert compute.config.learner.self_imitation == 0 < cloned.config.learner.self_imitation


def test_a_cell_travels_as_json(tmp_path):
    from cosmos_ray.config.settings import new_config
    from cosmos_ray.stages.cell import FROM, read_settings

    for cell in read_study(ROOT / "jobs/studies/learning.toml", str(tmp_path)).cells():
        told = json.loads(json.dumps(description(cell, "", "")))
        assert new_config(read_settings(FROM, told["settings"])) == cell.config and given(cell.config)


# ---------------------------------------------------------------- results


def test_counts_and_differences_are_over_all_seeds_and_paired():
    first = {"base": "1111100000", "planned": "1111111110", "compute": "1111100000"}
    second = {"base": "1111100000", "planned": "0111111111", "compute": "0000000000"}
    result = summarise([first, second], list(first), "base", [("planned", "compute")])
    assert result["arms"]["base"] | {"low": 0, "high": 0} == {"successes": 10, "episodes": 20, "low": 0, "high": 0, "by_seed": [5, 5]}
    gain = result["pairs"]["planned over base"]
    assert (gain["won"], gain["lost"], gain["gain_points"]) == (9, 1, pytest.approx(40)) and 0 < gain["ci_low"] < 40 < gain["ci_high"]
    assert result["pairs"]["planned over compute"]["won"] == 13
    text = table("lift", result, "base")
    assert "| planned | 18/20 (9, 9) | 69.9 to 97.2 % | +40.0 (" in text and "| planned over compute | +65.0 (" in text


def test_a_quarantined_state_counts_under_no_arm():
    result = summarise([{"base": "10-1", "refined": "1111"}], ["base", "refined"], "base")
    assert (result["arms"]["refined"]["successes"], result["arms"]["refined"]["episodes"]) == (3, 3)
    assert result["pairs"]["refined over base"]["won"] == 1


def test_the_published_table_is_what_the_file_of_the_study_gives():
    recorded = json.loads((ROOT / "docs/results/learning.json").read_text())
    study = read_study(ROOT / "jobs/studies/learning.toml")
    results = StudyResults(study, ROOT / "docs/results")
    results.check()
    assert not any(results.missing(cell) for cell in study.cells())
    for entry in recorded.values():
        made = summarise(list(entry["outcomes"].values()), list(study.arms), study.base, study.pairs)
        for part in ("arms", "pairs"):
            assert made[part].keys() == entry[part].keys()
            for name, row in made[part].items():
                assert {k: v if k == "by_seed" else pytest.approx(v, rel=1e-9) for k, v in row.items()} == entry[part][name]


def test_results_of_several_seeds_are_joined_and_those_of_other_settings_kept(tmp_path):
    study = read_study(written(tmp_path, SMALL.replace('base = "base"', "seeds = [0, 1]")), str(tmp_path / "runs"))
    results = StudyResults(study, tmp_path)
    for cell, text in zip(study.cells(), ("10", "11"), strict=True):
        assert results.missing(cell)
        results.add(cell, {"base": text, "mean": "11"})
        results.add(cell, {"V(s')": text, "Q(s,a)": text})
        assert not results.missing(cell)
    entry = json.loads(results.file.read_text())["lift"]
    assert entry["seeds"] == [0, 1] and entry["arms"]["base"]["by_seed"] == [1, 2] and list(entry["arms"]) == list(study.arms)
    assert "| mean | 4/4 (2, 2) |" in results.page.read_text()
    for change, message in ((("demos = 4", "demos = 5"), "lift in .*small.json was studied with demos = 4, not 5: give another --to"),
                            (('rank_by = "both"', 'rank_by = "future"'), "arm 'mean' of lift in .* was made by .*'both'.*, not by")):
        with pytest.raises(ConfigError, match=message):
            StudyResults(read_study(written(tmp_path, SMALL.replace(*change)), str(tmp_path / "runs")), tmp_path).check()


@pytest.mark.parametrize("content, complaint", [('{"lift": {"settings": {}}}', "is of an older version"), ('{"lift": ', "cannot read the"),
                                                ("[]", "is not a file of results")])  # fmt: skip
def test_a_file_that_nothing_can_be_joined_with_is_kept(tmp_path, content, complaint):
    (tmp_path / "small.json").write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        StudyResults(read_study(written(tmp_path)), tmp_path).check()
    assert (tmp_path / "small.json").read_text() == content


# ---------------------------------------------------------------- run for real


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_study_killed_four_times_has_the_table_of_an_undisturbed_one(tmp_path):
    """SIGKILL of the study's own process, four times, at moments spread over its work."""
    file = written(tmp_path, episodes=6)
    undisturbed = subprocess.run(study_command(file, tmp_path / "one"), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stderr[-3000:]
    folder, killed = tmp_path / "two", 0
    evaluations = (0, 3, 9, 15)  # kill once so many evaluation episodes are stored
    for most in evaluations:
        process = subprocess.Popen(study_command(file, folder), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
        while process.poll() is None and _stored(folder / "lift-0") <= most:
            try:
                process.wait(0.2)
            except subprocess.TimeoutExpired:
                continue
        if process.poll() is None:
            process.kill()
            killed += 1
        process.communicate()
    again = subprocess.run(study_command(file, folder), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "small.json").read_text()) for name in ("one", "two"))
    assert killed == 4 and one == two and one["lift"]["arms"]["mean"]["episodes"] == 6
    assert (tmp_path / "one/small.md").read_text() == (folder / "small.md").read_text()
    assert _stored(folder / "lift-0") == 4 * 6  # nothing lost, nothing twice


def _stored(run: Path) -> int:
    """Evaluation episodes in a run's store; -1 before there is a base policy."""
    if not (run / "checkpoints" / "base" / "policy.json").exists():
        return -1
    store = ReplayStore(run / "replay", create=False)
    store.refresh()
    return sum(summary.source == "eval" for summary in store.summaries())
