"""The command line: wrong input, help, and which settings `demo` works with."""

import os
import re
import signal
import subprocess
import sys

import pytest
import ray

from cosmos_ray.commands.cli import main, make_parser
from cosmos_ray.commands.command import COMMANDS
from cosmos_ray.commands.configure import configure
from cosmos_ray.commands.tools import TOOLS
from cosmos_ray.config import RunConfig, check
from cosmos_ray.config.recipes import recipe
from cosmos_ray.config.settings import SETTINGS, new_config
from cosmos_ray.folder import RunFolder
from tests.conftest import ROOT


def configured(*arguments: str) -> RunConfig:
    """The config that a command line works with."""
    return configure(make_parser().parse_args(arguments))


def make_run(root, name: str, values: dict | None = None) -> RunConfig:
    """A stored run with ``values`` by name."""
    config = new_config({"root": str(root), "name": name, **(values or {})})
    RunFolder(config).close()
    return config


@pytest.fixture
def handlers():
    """Puts the signal handlers back that a command installs."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize("arguments, complaint", [
    (["collect", "--sim.task", "Lft"], "unknown task 'Lft'.*did you mean Lift"),
    (["collect", "--sim.third-cameras", "agentveiw"], "no camera 'agentveiw'"),
    (["collect", "--sim.robots", "Pnda"], "robot 'Pnda'.*did you mean Panda"),
    (["collect", "--model.preset", "huge"], "model.preset = 'huge' is not one of tiny, cosmos-predict2-2b"),
    (["collect", "--model.suite", "liber"], "model.suite = 'liber' is not one of an empty text, libero, robocasa, aloha"),
    (["collect", "--sim.actions", "auto"], "sim.actions = 'auto' is not one of position, pose"),
    (["collect", "--sim.horizon", "0"], "sim.horizon = 0 is out of range: it must be at least 1"),
    (["collect", "--demos", "many"], "demos = 'many' is not a whole number"),
    (["collect", "--demos", "0"], "demos = 0 is out of range"),
    (["collect", "--learner.advantage-temperature", "0.1", "--learner.self-imitation", "0.5", "--planning-steps", "9",
      "--model.top-share", "0"],
     "model.top_share trains: set it above 0"),
    (["collect", "--model.image-size", "60"], "model.image_size = 60 is not a multiple of 8"),
    (["pretrain", "--learner.base-mix", "0.5,0.5,0.5"], "learner.base_mix.*add up to 1"),
    (["collect", "--config", "nowhere.toml"], "cannot read the config file nowhere.toml"),
    (["collect", "--recipe", "wide_dor"], "unknown recipe 'wide_dor'; did you mean 'wide_door'"),
    (["collect", "--recipe", "xyz"], "unknown recipe 'xyz'; there are can, demo, libero, quick, wide_door, wide_lift"),
    (["collect", "--sim.tsk", "Lift"], r"unknown flag --sim\.tsk; did you mean --sim\.task\?"),
    (["collect", "--learner.batchsize=4"], r"unknown flag --learner\.batchsize; did you mean --learner\.batch-size\?"),
    (["collect", "--zzz"], "unknown flag --zzz; see --help"),
    (["collect", "--demos"], "demos: expected one argument"),
    (["dmo"], "unknown command 'dmo'; did you mean `demo`"),
    (["pretrain"], "there is no run 'lift' in .*run `collect` or `replay import` first"),
    (["pretrain", "--fresh"], "unknown flag --fresh"),
    (["pretrain", "--recipe", "can"], "--recipe is for the commands that make a run"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments, complaint, tmp_path, capfd, handlers, monkeypatch):
    root = [] if arguments[0] == "dmo" else ["--name", "lift", "--root", str(tmp_path)]
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    assert main(arguments + root) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert re.search(complaint, err) and err.startswith("cosmos_ray: error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo"])
def test_every_command_but_demo_needs_the_name_of_its_run(command, tmp_path, capfd):
    needed = {"import": ["--weights", "w", "--statistics", "s"], "export": ["--to", "there"]}.get(command, [])
    assert main([command, *needed, "--root", str(tmp_path)]) == 2
    assert capfd.readouterr().err == f"cosmos_ray: error: `{command}` needs the name of its run: give --name\n"
    make_run(tmp_path, "door")
    assert main([command, *needed, "--root", str(tmp_path)]) == 2
    assert capfd.readouterr().err.endswith(f"give --name; {tmp_path} has door\n")


@pytest.mark.parametrize("verb", ["ls", "stats", "verify"])
def test_a_replay_command_needs_a_store_or_the_name_of_a_run(verb, capfd):
    assert main(["replay", verb]) == 2
    assert f"`replay {verb}` needs a store: give --name of a run, or --store" in capfd.readouterr().err


def test_a_name_in_the_config_file_counts(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('name = "door"\n')
    assert configured("pretrain", "--config", str(file), "--root", str(tmp_path)).name == "door"


# ---------------------------------------------------------------- help


def test_without_a_command_the_commands_are_listed_a_line_each(capfd):
    assert main([]) == 2  # nothing was done: a script that lost its command must not go on
    listed = capfd.readouterr().err
    assert main(["--help"]) == 0
    assert capfd.readouterr().out == listed
    lines = listed.splitlines()
    for command in (*COMMANDS, *TOOLS, "replay"):
        assert sum(line.startswith(f"  {command} ") for line in lines) == 1
    assert len(lines) <= len(COMMANDS) + len(TOOLS) + 6 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("columns", [80, 140])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_at_most_60_lines_of_the_terminal(command, columns, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([command, "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert 10 < len(lines) <= 60 and max(map(len, lines)) <= columns
    for name in COMMANDS[command].reads:
        flags = [s.flag for s in SETTINGS.values() if name in (s.name, s.section)]
        assert flags and all(flag in "\n".join(lines) for flag in flags), name


def test_no_help_text_is_cut_on_a_wide_terminal(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "140")
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        assert "…" not in capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_long_help_has_every_setting_with_all_that_is_known_of_it(command, capfd):
    assert main([command, "--help-all"]) == 0
    text = " ".join(capfd.readouterr().out.split())
    for setting in SETTINGS.values():
        assert f" {setting.flag} " in text
    assert "transformer blocks [4; cosmos-predict2-2b: 28]" in text


def test_help_names_the_defaults_of_its_command_and_what_others_follow(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "140")
    for command, demos, horizon in (("demo", 20, "160"), ("collect", RunConfig().demos, None)):
        assert main([command, "--help"]) == 0
        text = capfd.readouterr().out
        assert f"demonstrations in the store after `collect` [{demos}]" in text
        assert horizon is None or f"control steps before a rollout times out [{horizon}]" in text
    assert main(["rollout", "--help"]) == 0
    text = capfd.readouterr().out
    assert "times out [96, sim.horizon]" in text and "before the next query [8, model.chunk]" in text
    assert main(["collect", "--help"]) == 0 and "[96, the task's]" in capfd.readouterr().out


def test_help_and_stored_settings_need_neither_torch_nor_ray():
    code = ("import sys; from cosmos_ray.commands.cli import main; main(['refine', '--help']); import cosmos_ray.config.stored\n"
            "assert not {'torch', 'ray', 'robosuite'} & set(sys.modules), sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, env={**os.environ})


# ---------------------------------------------------------------- demo


@pytest.mark.parametrize("arguments, name, base", [
    ([], "demo", recipe("demo")),
    (["--demos", "3", "--seed", "1"], "demo", {**recipe("demo"), "demos": 3, "seed": 1}),
    (["--sim.task", "Stack"], "demo", {"sim.task": "Stack"}),
    (["--model.preset", "cosmos-predict2-2b"], "demo", {"model.preset": "cosmos-predict2-2b"}),
    (["--quick"], "quick", {**recipe("demo"), **recipe("quick")}),
    (["--quick", "--demos", "2"], "quick", {**recipe("demo"), **recipe("quick"), "demos": 2}),
    (["--recipe", "can"], "can", recipe("can")),
    (["--recipe", "can", "--name", "mine"], "mine", recipe("can")),
], ids=str)  # fmt: skip
def test_demo_has_a_task_of_its_own_unless_it_is_told_what_to_run(arguments, name, base, tmp_path):
    config = configured("demo", *arguments, "--root", str(tmp_path))
    assert config == new_config({**base, "name": name, "root": str(tmp_path)})
    check(config)


def test_demo_with_a_file_takes_the_plain_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("demos = 7\n")
    assert configured("demo", "--config", str(file), "--root", str(tmp_path)) == RunConfig(demos=7, root=str(tmp_path))


def test_the_quick_counts_apply_to_an_existing_run_too(tmp_path):
    make_run(tmp_path, "quick", {"sim.placement": 0.2, "demos": 50})
    config = configured("demo", "--quick", "--root", str(tmp_path))
    assert (config.demos, config.sim.placement) == (recipe("quick")["demos"], 0.2)


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_command_that_is_refused_leaves_every_run_as_it_was(tmp_path, capfd, flags):
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "kept.txt").write_text("kept")
    name = "good" if flags else "new"
    assert main(["collect", "--root", str(tmp_path), "--name", name, "--sim.task", "Wipe", *flags]) != 0
    assert "no scripted expert for task" in capfd.readouterr().err
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["good", "good/kept.txt"]


def test_a_flag_of_before_is_named_by_its_present_name(capfd):
    for flag, now in (("--planner.values", "--planner.value-samples"), ("--verify", "--repeat")):
        assert main(["evaluate", "--name", "x", flag, "3"]) == 2
        assert f"unknown flag {flag}: it is called {now} now" in capfd.readouterr().err
    assert main(["replay", "ls", "--name", "x", "--kind", "demo"]) == 2 and "it is called --class now" in capfd.readouterr().err
    assert main(["collect", "x"]) == 2 and "did you mean --name x?" in capfd.readouterr().err
