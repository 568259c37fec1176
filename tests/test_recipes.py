"""Recipes: the settings behind the measured tables, and how a run begins with one."""

import json

import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.config import SimConfig, check
from cosmos_ray.config.recipes import recipe, recipe_names
from cosmos_ray.config.settings import given, new_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from tests.conftest import ROOT
from tests.test_command_line import configured, make_run


def test_the_list_of_recipes_needs_no_name(capfd):
    assert main(["collect", "--recipe", "list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names() and all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_a_config_that_runs(name):
    config = new_config(recipe(name))
    check(config)
    assert given(config).items() <= recipe(name).items()


def test_a_file_wins_over_the_recipe_and_flags_over_both(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("demos = 7\nrollouts = 8\n[replay]\ngamma = 0.9\n")
    config = configured("collect", "--recipe", "wide_door", "--config", str(file), "--name", "door", "--rollouts", "9",
                        "--root", str(tmp_path))
    assert (config.demos, config.rollouts, config.replay.gamma) == (7, 9, 0.9)
    assert config == new_config({**recipe("wide_door"), "demos": 7, "rollouts": 9, "replay.gamma": 0.9, "name": "door",
                                 "root": str(tmp_path)})


def test_a_stage_goes_on_with_the_recipe_that_the_run_began_with(tmp_path):
    where = ["--name", "door", "--root", str(tmp_path)]
    began = configured("collect", "--recipe", "wide_door", *where)
    RunFolder(began).close()
    for command in ("pretrain", "rollout", "refine", "evaluate"):
        assert configured(command, *where) == began
    assert configured("collect", "--recipe", "wide_door", *where) == began


def test_a_recipe_that_an_existing_run_disagrees_with_is_refused(tmp_path):
    make_run(tmp_path, "door", {**recipe("wide_door"), "pretrain_steps": 5})
    where = ["--name", "door", "--root", str(tmp_path)]
    message = "run 'door' has pretrain_steps = 5, recipe 'wide_door' 3000: leave out --recipe to go on .* or give another --name"
    with pytest.raises(ConfigError, match=message):
        configured("collect", "--recipe", "wide_door", *where)
    with pytest.raises(ConfigError, match="run 'door' has .*recipe 'can'"):
        configured("demo", "--recipe", "can", *where)
    # What the command line gives anew is no disagreement.
    assert configured("collect", "--recipe", "wide_door", "--pretrain-steps", "5", *where).pretrain_steps == 5
    assert configured("collect", "--recipe", "can", "--fresh", *where).sim == SimConfig(task="PickPlaceCan", horizon=200, placement=0.04)


def test_the_recipes_are_the_runs_of_the_measured_tables(tmp_path):
    """The settings in docs/results/learning.json are what the recipes give, and the studies run nothing else."""
    from jobs.studies.learning import TASKS, Study
    from jobs.studies.results import settings_of

    recorded = json.loads((ROOT / "docs" / "results" / "learning.json").read_text())
    assert sorted(TASKS) == sorted(recorded) and set(TASKS) < set(recipe_names())
    for task in TASKS:
        study = Study(task, 1, tmp_path, {}).main
        assert settings_of(study) == recorded[task]["settings"]
        assert configured("collect", "--recipe", task, "--name", study.name, "--root", str(tmp_path), "--seed", "1") == study
