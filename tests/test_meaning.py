"""A wrong option, setting or command suggests the nearest meaning."""

from __future__ import annotations

import pytest

from cosmos_ray import __version__
from cosmos_ray.commands.cli import main
from cosmos_ray.commands.command import COMMANDS
from cosmos_ray.commands.suggest import COMMANDS_MEANT
from cosmos_ray.config.meaning import MEANT, ONE, meant
from cosmos_ray.config.settings import SETTINGS

FLAGS = {
    "--learner.ranks": "--learner.world-size", "--epochs": "--pretrain-steps or --refine-steps",
    "--lr": "--learner.lr or --learner.refine-lr",
    "--batch": "--learner.batch-size", "--batch-size": "--learner.batch-size or --inference.max-batch", "--env": "--sim.task",
    "--inference.batch-size": "--inference.max-batch", "--robot": "--sim.robots", "--num-envs": "--rollout.envs-per-worker",
    "--gpus": "--inference.gpus or --learner.gpus", "--steps": "--pretrain-steps or --refine-steps or --inference.steps",
    "--out": "--root", "--output_dir": "--root", "--checkpoint": "--init", "--task": "--sim.task", "--num-workers": "--rollout.workers",
    "--world-size": "--learner.world-size", "--learning-rate": "--learner.lr", "--lora-rank": "--learner.lora-rank",
    "--learner.gpu": "--learner.gpus", "--seeed": "--seed", "--num-trials": "--eval-episodes", "--run-name": "--name",
    "--gamma": "--replay.gamma", "--sim.tsk": "--sim.task", "--learner.batchsize": "--learner.batch-size", "--wandb-mode": "--wandb",
    "--device": "--inference.gpus or --learner.gpus", "--num_open_loop_steps": "--rollout.execute", "--fps": "--sim.control-freq",
}  # fmt: skip


@pytest.mark.parametrize("bad", FLAGS)
def test_a_flag_suggests_what_means_the_same(bad, capfd):
    assert main(["pretrain", "--name", "x", bad, "3"]) == 2
    err = capfd.readouterr().err
    assert f"unknown flag {bad}; did you mean {FLAGS[bad]}" in err and len(err.splitlines()) == 1


def test_a_flag_of_one_command_is_suggested_to_that_command(capfd):
    assert main(["audit", "--name", "x", "--checkpont", "base"]) == 2
    assert "did you mean --checkpoint?" in capfd.readouterr().err
    assert main(["export", "--name", "x", "--to", "y", "--overwrit"]) == 2
    assert "did you mean --overwrite?" in capfd.readouterr().err


@pytest.mark.parametrize("bad, good", [("pretain", "pretrain"), ("train", "pretrain"), ("eval", "evaluate"), ("colect", "collect"),
                                       ("import-weights", "import"), ("finetune", "refine"), ("replya", "replay"), ("ls", "replay ls")])
def test_a_command_suggests_what_means_the_same(bad, good, capfd):
    assert main([bad, "--name", "x"]) == 2
    assert capfd.readouterr().err == f"cosmos_ray: error: unknown command {bad!r}; did you mean `{good}`?\n"


def test_a_setting_in_a_file_suggests_what_means_the_same(tmp_path, capfd):
    file = tmp_path / "run.toml"
    file.write_text("[learner]\nranks = 2\n")
    assert main(["collect", "--name", "x", "--config", str(file)]) == 2
    assert "unknown setting 'learner.ranks'; did you mean 'learner.world_size'?" in capfd.readouterr().err


def test_the_tables_name_what_there_is():
    assert not {name for names in (*MEANT.values(), *ONE.values()) for name in names} - set(SETTINGS)
    assert not {command.split()[0] for command in COMMANDS_MEANT.values()} - {*COMMANDS, "replay"}
    assert not set(COMMANDS_MEANT) & set(COMMANDS)
    assert meant("zzz", SETTINGS) == []


def test_the_version_is_printed(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"cosmos_ray {__version__}\n"
