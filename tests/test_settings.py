"""Settings, the command line's answers to wrong input, and the folder of a run."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import ray

from cosmos_ray.commands.cli import main, starting_point
from cosmos_ray.config import DEMO, LearnerConfig, ModelConfig, PlannerConfig, RolloutConfig, RunConfig, SimConfig, check
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.settings import FIELDS, format_value, make_config, parse_value


def write(path, text: str) -> str:
    file = path / "settings.toml"
    file.write_text(text)
    return str(file)


# ---------------------------------------------------------------- TOML and flags


def test_flags_win_over_the_file_and_the_file_over_the_base(tmp_path):
    file = write(tmp_path, 'demos = 7\nseed = 5\n[sim]\ntask = "Stack"\nimage_size = 32\n[learner]\nlr = 1\n')
    base = dataclasses.replace(RunConfig(), demos=1, rollouts=3)
    config = make_config(base, file, {"demos": "9", "sim.image_size": "48", "seed": None})
    assert (config.demos, config.rollouts, config.seed) == (9, 3, 5)
    assert (config.sim.task, config.sim.image_size, config.sim.horizon) == ("Stack", 48, SimConfig().horizon)
    assert config.learner.lr == 1.0 and isinstance(config.learner.lr, float)
    assert make_config(base, None, {}) == base


def test_every_field_survives_the_command_line():
    config = RunConfig()
    flags = {}
    for name in FIELDS:
        section, _, field = name.rpartition(".")
        flags[name] = format_value(getattr(getattr(config, section) if section else config, field))
    assert make_config(RunConfig(demos=1, learner=LearnerConfig(lr=9.0)), None, flags) == config


@pytest.mark.parametrize("kind, text, value", [
    (int, "12", 12), (float, "1e-3", 1e-3), (str, "a,b", "a,b"), (bool, "True", True), (bool, "false", False),
    (tuple[str, ...], "front, side", ("front", "side")), (tuple[str, ...], "", ()), (tuple[float, ...], "0.1,0.45,0.45", (0.1, 0.45, 0.45)),
])  # fmt: skip
def test_flag_texts(kind, text, value):
    assert parse_value("x", kind, text) == value


@pytest.mark.parametrize("kind, text, complaint", [
    (int, "1.5", "x = '1.5' is not a whole number"), (int, "many", "not a whole number"), (float, "fast", "x = 'fast' is not a number"),
    (bool, "yes", "x = 'yes' is neither true nor false"), (tuple[float, ...], "0.5,half", "'half' is not a number"),
])  # fmt: skip
def test_flag_texts_of_the_wrong_type(kind, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_value("x", kind, text)


def test_toml_lists_and_booleans(tmp_path):
    file = write(tmp_path, '[sim]\nfast_step = false\nthird_cameras = ["frontview", "agentview"]\n[learner]\nbase_mix = [1, 0, 0]\n')
    config = make_config(RunConfig(), file, {})
    assert config.sim.fast_step is False and config.sim.third_cameras == ("frontview", "agentview")
    assert config.learner.base_mix == (1.0, 0.0, 0.0) and all(isinstance(x, float) for x in config.learner.base_mix)


@pytest.mark.parametrize("text, complaint", [
    ('[sim]\ntsk = "Lift"', r"unknown setting 'sim.tsk'; did you mean 'sim.task'\?"),
    ("demoss = 1", "unknown setting 'demoss'; did you mean 'demos'"),
    ("sim = 3", "unknown setting 'sim'"),
    ("demos = 1.5", "demos = 1.5 must be of type int"),
    ('demos = "many"', "must be of type int"),
    ("demos = true", "demos = True must be of type int"),
    ("[learner]\nlr = false", "learner.lr = False must be of type float"),
    ("[sim]\nfast_step = 1", "sim.fast_step = 1 must be of type bool"),
    ('[sim]\nrobots = "Panda"', "sim.robots = 'Panda' must be a list of str"),
    ('[learner]\nbase_mix = [0.5, "a"]', "must be a list of float"),
    ("demos = ", "is not valid TOML"),
])  # fmt: skip
def test_wrong_toml_is_one_line_that_names_file_and_setting(tmp_path, text, complaint):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        make_config(RunConfig(), file, {})
    assert file in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda p: p / "absent.toml", lambda p: p], ids=["missing", "a directory"])
def test_a_config_file_that_cannot_be_read(tmp_path, make):
    with pytest.raises(ConfigError, match="cannot read the config file"):
        make_config(RunConfig(), str(make(tmp_path)), {})


# ---------------------------------------------------------------- ranges


def violations():
    """(field, a value just outside what it accepts) for every field with choices or bounds."""
    for name, (item, kind) in FIELDS.items():
        choices, low, high = (item.metadata[k] for k in ("choices", "low", "high"))
        if choices is not None:
            yield name, 99 if kind is int else "nonsense"
        for bound, step in ((low, -1), (high, 1)):
            if bound is not None:
                value = type(bound)(bound + step) if kind is int else float(bound + step)
                yield name, (value, 0.0, 0.0) if name.endswith("_mix") else value


@pytest.mark.parametrize("name, value", list(violations()))
def test_a_value_out_of_range_names_its_field(name, value):
    section, _, field = name.rpartition(".")
    config = RunConfig()
    part = dataclasses.replace(getattr(config, section) if section else config, **{field: value})
    with pytest.raises(ConfigError, match=rf"^{name.replace('.', '[.]')} = .*(out of range|is not one of)"):
        check(dataclasses.replace(config, **{section: part}) if section else part)


@pytest.mark.parametrize("command, file, told, base", [
    ("demo", None, {}, DEMO),
    ("demo", None, {"demos": "3", "seed": "1"}, DEMO),
    ("demo", None, {"sim.task": "Stack"}, RunConfig()),
    ("demo", None, {"model.preset": "cosmos-predict2-2b"}, RunConfig()),
    ("demo", "run.toml", {}, RunConfig()),
    ("collect", None, {}, RunConfig()),
], ids=str)  # fmt: skip
def test_demo_has_a_task_of_its_own_unless_it_is_told_what_to_run(command, file, told, base):
    assert starting_point(command, file, dict.fromkeys(FIELDS) | told) == base
    check(make_config(base, None, told))


def test_help_names_the_defaults_of_its_command(capsys):
    for command, demos in (("demo", DEMO.demos), ("collect", RunConfig().demos)):
        assert main([command, "--help"]) == 0
        assert f"in the store after `collect` [{demos}]" in " ".join(capsys.readouterr().out.split())


def test_the_defaults_and_both_ends_of_every_range_are_accepted():
    check(RunConfig())
    check(RunConfig(learner=LearnerConfig(base_mix=(1.0, 0.0, 0.0), ema=1.0), sim=SimConfig(image_size=1024)))


@pytest.mark.parametrize("config, complaint", [
    (RunConfig(learner=LearnerConfig(base_mix=(0.5, 0.5))), "learner.base_mix"),
    (RunConfig(learner=LearnerConfig(refine_mix=(0.5, 0.5, 0.1))), "learner.refine_mix.*add up to 1"),
    (RunConfig(learner=LearnerConfig(zero_stage=3)), "learner.ema"),
    (RunConfig(learner=LearnerConfig(batch_size=9, world_size=2)), "learner.batch_size = 9"),
    (RunConfig(learner=LearnerConfig(accelerate="graphs", accumulate=2)), "learner.accelerate.*learner.accumulate to 1"),
    (RunConfig(learner=LearnerConfig(accelerate="graphs", zero_stage=3, ema=0.0)), "learner.accelerate.*learner.zero_stage"),
    (RunConfig(learner=LearnerConfig(accelerate="graphs", activation_checkpointing=True)), "learner.accelerate.*activation_checkpointing"),
    (RunConfig(rollout=RolloutConfig(execute=9), model=ModelConfig(chunk=8)), "rollout.execute = 9"),
    (RunConfig(rollout=RolloutConfig(horizon=160), sim=SimConfig(horizon=300)), "rollout.horizon = 160 is shorter than sim.horizon = 300"),
    (RunConfig(sim=SimConfig(wrist_cameras=(), third_cameras=())), "at least one camera"),
    (RunConfig(sim=SimConfig(wrist_cameras=("a",), third_cameras=("b", "a"))), "name a camera twice"),
    (RunConfig(learner=LearnerConfig(planning_mix=())), "learner.planning_mix"),
    (RunConfig(learner=LearnerConfig(advantage_temperature=0.1, self_imitation=0.5)), "learner.advantage_temperature.*set planning_steps"),
    (RunConfig(learner=LearnerConfig(advantage_temperature=0.1), planning_steps=9), "learner.advantage_temperature.*neither may be 0"),
    (RunConfig(learner=LearnerConfig(value_mode="action", advantage_temperature=0.1), planner=PlannerConfig(rank_by="action"),
               planning_steps=9),
     "learner.advantage_temperature weighs by V"),
    (RunConfig(planner=PlannerConfig(rank_by="action")), "planner.rank_by = 'action'.*or to 'both'"),
    (RunConfig(planner=PlannerConfig(rank_by="both")), "planner.rank_by = 'both'.*learner.value_mode = 'future' does not train"),
    (RunConfig(name="a/b"), "name = 'a/b'"), (RunConfig(name=".."), "name"), (RunConfig(name=""), "name"),
])  # fmt: skip
def test_settings_that_do_not_go_together(config, complaint):
    with pytest.raises(ConfigError, match=complaint) as caught:
        check(config)
    assert len(str(caught.value).splitlines()) == 1


# ---------------------------------------------------------------- the command line


@pytest.fixture
def handlers():
    """Puts the signal handler back that a command installs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("arguments, complaint", [
    (["collect", "--sim.task", "Lft"], "unknown task 'Lft'.*did you mean Lift"),
    (["collect", "--sim.third-cameras", "agentveiw"], "no camera 'agentveiw'"),
    (["collect", "--sim.robots", "Pnda"], "robot 'Pnda'.*did you mean Panda"),
    (["collect", "--model.preset", "huge"], "model.preset = 'huge' is not one of tiny, cosmos-predict2-2b"),
    (["collect", "--demos", "many"], "demos = 'many' is not a whole number"),
    (["collect", "--demos", "0"], "demos = 0 is out of range"),
    (["collect", "--learner.advantage-temperature", "0.1", "--learner.self-imitation", "0.5", "--planning-steps", "9",
      "--model.top-share", "0"],
     "model.top_share trains: set it above 0"),
    (["collect", "--sim.image-size", "60"], "sim.image_size = 60 is not a multiple of 8"),
    (["pretrain", "--learner.base-mix", "0.5,0.5,0.5"], "learner.base_mix.*add up to 1"),
    (["collect", "--config", "nowhere.toml"], "cannot read the config file nowhere.toml"),
    (["collect", "--sim.tsk", "Lift"], r"unknown flag --sim\.tsk; did you mean --sim\.task\?"),
    (["collect", "--learner.batchsize=4"], r"unknown flag --learner\.batchsize; did you mean --learner\.batch-size\?"),
    (["collect", "--zzz"], "unknown flag --zzz; see --help"),
    (["collect", "--demos"], "demos: expected one argument"),
    (["dmo"], "invalid choice: 'dmo'"),
    ([], "required: COMMAND"),
    (["pretrain"], "there is no run 'demo' in .*run `collect` first"),
    (["pretrain", "--fresh"], "unknown flag --fresh"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_wrong_input_is_one_line_and_exit_code_2(arguments, complaint, tmp_path, capfd, handlers, monkeypatch):
    root = ["--root", str(tmp_path)] if arguments and arguments[0] != "dmo" else []
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    assert main(arguments + root) == 2
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    assert re.search(complaint, err) and err.startswith("cosmos_ray: error: ")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the folder of a run


OPEN = """
import sys
from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
try:
    folder = RunFolder(RunConfig(root=sys.argv[1]))
except ConfigError as error:
    print(error)
else:
    print("opened", flush=True)
    sys.stdin.read()
"""


def other_process(root) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", OPEN, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_run_in_use_by_another_process_is_refused(tmp_path):
    config = RunConfig(root=str(tmp_path))
    folder = RunFolder(config)
    out, _ = other_process(tmp_path).communicate("")
    assert f"is in use by process {os.getpid()}" in out
    folder.close()
    out, _ = other_process(tmp_path).communicate("")
    assert out == "opened\n"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    other = other_process(tmp_path)
    assert other.stdout.readline() == "opened\n"
    with pytest.raises(ConfigError, match=f"is in use by process {other.pid}"):
        RunFolder(RunConfig(root=str(tmp_path)))
    other.kill()
    other.communicate()
    RunFolder(RunConfig(root=str(tmp_path))).close()


@pytest.mark.parametrize("change, name", [
    ({"sim": SimConfig(task="Stack")}, "sim.task = 'Lift', not 'Stack'"),
    ({"sim": SimConfig(third_cameras=("frontview",))}, "sim.third_cameras"),
    ({"model": ModelConfig(chunk=4)}, "model.chunk = 8, not 4"),
])  # fmt: skip
def test_a_run_of_another_simulator_or_model_is_refused(tmp_path, change, name):
    RunFolder(RunConfig(root=str(tmp_path))).close()
    with pytest.raises(ConfigError, match=name):
        RunFolder(RunConfig(root=str(tmp_path), **change))
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["sim"]["task"] == "Lift"


def test_counts_and_learning_rates_may_change_between_stages(tmp_path):
    RunFolder(RunConfig(root=str(tmp_path))).close()
    RunFolder(RunConfig(root=str(tmp_path), demos=3, learner=LearnerConfig(lr=1e-4))).close()
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["demos"] == 3


def test_a_run_from_before_a_setting_has_its_default(tmp_path):
    RunFolder(RunConfig(root=str(tmp_path))).close()
    file = tmp_path / RunConfig().name / "config.json"
    settings = json.loads(file.read_text())
    del settings["model"]["uniform_share"]
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=re.escape("was made with model.uniform_share = 0.3, not 0.0")):
        RunFolder(RunConfig(root=str(tmp_path), model=ModelConfig(uniform_share=0.0)))
    RunFolder(RunConfig(root=str(tmp_path))).close()


def test_fresh_moves_the_old_run_aside_and_keeps_it(tmp_path):
    for demos in (1, 2, 3):
        folder = RunFolder(RunConfig(root=str(tmp_path), demos=demos), fresh=True)
        folder.write_json("notes.json", demos)
        with pytest.raises(ConfigError, match="in use"):
            RunFolder(RunConfig(root=str(tmp_path)))
        folder.close()
    kept = {p.name: json.loads((p / "notes.json").read_text()) for p in tmp_path.iterdir()}
    assert kept == {"demo.1": 1, "demo.2": 2, "demo": 3}


def test_a_stage_that_continues_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match="there is no run 'demo'"):
        RunFolder(RunConfig(root=str(tmp_path)), create=False)
    assert not list(tmp_path.iterdir())


def test_json_files_are_replaced_whole(tmp_path):
    folder = RunFolder(RunConfig(root=str(tmp_path)))
    assert folder.read_json("x.json") is None
    for value in ({"a": [1, 2.5, None]}, [3]):
        folder.write_json("x.json", value)
        assert folder.read_json("x.json") == value
    with pytest.raises(TypeError):
        folder.write_json("x.json", object())
    assert folder.read_json("x.json") == [3]
    folder.close()


def test_a_metrics_line_torn_by_a_crash_is_skipped(tmp_path):
    folder = RunFolder(RunConfig(root=str(tmp_path)))
    assert folder.metrics("refine") == []
    folder.record("refine", step=1)
    folder.record("pretrain", step=9)
    folder.record("refine", step=2)
    with open(folder.path / "metrics.jsonl", "a") as file:
        file.write('{"stage": "refine", "st')
    assert [row["step"] for row in folder.metrics("refine")] == [1, 2]
    folder.close()
