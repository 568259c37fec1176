"""Settings from TOML and flags, their ranges, and the folder of a run."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from cosmos_ray.config import LearnerConfig, ModelConfig, PlannerConfig, RolloutConfig, RunConfig, SimConfig, check
from cosmos_ray.config.option import check_ranges
from cosmos_ray.config.settings import (
    SETTINGS,
    changed,
    format_value,
    given,
    new_config,
    parse_value,
    parse_values,
    read_toml,
    value_of,
    values_of_tree,
)
from cosmos_ray.config.upgrade import OLD_NAMES
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.run import open_run
from cosmos_ray.use import Use


def write(path, text: str) -> str:
    file = path / "settings.toml"
    file.write_text(text)
    return str(file)


def from_file(file: str) -> dict:
    return values_of_tree(pathlib.Path(file), read_toml(pathlib.Path(file)), OLD_NAMES)


# ---------------------------------------------------------------- TOML and flags


def test_flags_win_over_the_file_and_the_file_over_the_base(tmp_path):
    file = write(tmp_path, 'demos = 7\nseed = 5\n[sim]\ntask = "Stack"\nimage_size = 32\n[learner]\nlr = 1\n')
    flags = parse_values({"demos": "9", "sim.image_size": "48", "seed": None})
    config = new_config({"demos": 1, "rollouts": 3, **from_file(file), **flags})
    assert (config.demos, config.rollouts, config.seed) == (9, 3, 5)
    assert (config.sim.task, config.sim.image_size, config.sim.horizon) == ("Stack", 48, SimConfig(task="Stack").horizon)
    assert config.learner.lr == 1.0 and isinstance(config.learner.lr, float)
    assert new_config({}) == RunConfig()


def test_every_field_survives_the_command_line():
    config = RunConfig()
    flags = {name: format_value(value_of(config, name)) for name in SETTINGS}
    assert changed(RunConfig(demos=1, learner=LearnerConfig(lr=9.0), sim=SimConfig(task="Door")), parse_values(flags)) == config
    assert new_config(parse_values(flags)) == config


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
    config = new_config(from_file(file))
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
    ('[planner]\nvalue = "action"', "the setting 'planner.value' is called 'planner.rank_by' now"),
    ("verify = 5", "the setting 'verify' is called 'repeat' now"),
])  # fmt: skip
def test_wrong_toml_is_one_line_that_names_file_and_setting(tmp_path, text, complaint):
    file = write(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        from_file(file)
    assert file in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("make", [lambda p: p / "absent.toml", lambda p: p], ids=["missing", "a directory"])
def test_a_config_file_that_cannot_be_read(tmp_path, make):
    with pytest.raises(ConfigError, match="cannot read the config file"):
        from_file(str(make(tmp_path)))


# ---------------------------------------------------------------- ranges


def violations():
    """(field, a value just outside what it accepts) for every field with choices or bounds."""
    for name, setting in SETTINGS.items():
        if setting.choices:
            yield name, 99 if setting.type is int else "nonsense"
        for bound, step in ((setting.low, -1), (setting.high, 1)):
            if bound is not None:
                value = type(bound)(bound + step) if setting.type is int else float(bound + step)
                yield name, (value, 0.0, 0.0) if name.endswith("_mix") or name == "model.rope_scale" else value


@pytest.mark.parametrize("name, value", list(violations()))
def test_a_value_out_of_range_names_its_field(name, value):
    section, _, field = name.rpartition(".")
    config = RunConfig()
    part = dataclasses.replace(getattr(config, section) if section else config, **{field: value})
    with pytest.raises(ConfigError, match=rf"^{name.replace('.', '[.]')} = .*(out of range|is not one of)"):
        check(dataclasses.replace(config, **{section: part}) if section else part)


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
    (RunConfig(model=ModelConfig(output="velocity", residual=True)), "model.residual = true needs model.output = 'x0'"),
    (RunConfig(model=ModelConfig(rope_scale=(1.0, 1.0))), "model.rope_scale.*three scales"),
    (RunConfig(learner=LearnerConfig(planning_world_weight=0.0)), "learner.planning_world_weight = 0 would train no world model"),
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


# ---------------------------------------------------------------- what was given, what follows


def test_what_is_not_given_follows_another_setting():
    config = new_config({"sim.task": "Door", "model.chunk": 4, "model.world_weight": 7.0, "learner.warmup": 9, "learner.cycle": 11,
                         "learner.value_mode": "both"})
    learner, rollout = config.learner, config.rollout
    assert (config.sim.horizon, config.sim.actions, rollout.horizon, rollout.execute) == (200, "pose", 200, 4)
    assert (learner.refine_warmup, learner.refine_cycle, learner.base_value_mode, learner.planning_world_weight) == (9, 11, "both", 7.0)
    check(config)


def test_every_setting_that_follows_can_be_given():
    told = {"sim.image_size": 72, "sim.robots": ("IIWA",), "sim.wrist_cameras": (), "sim.third_cameras": ("frontview",),
            "sim.horizon": 50, "sim.actions": "pose", "sim.instruction": "lift it", "rollout.horizon": 60,
            "rollout.execute": 3, "sim.quality": "full", "sim.mesh_cell": 0.001, "learner.refine_warmup": 0, "learner.refine_cycle": 5,
            "learner.base_value_mode": "full", "learner.planning_world_weight": 2.0, "learner.decay_all": True,
            "planner.ladder": "truncated"}
    config = new_config(told)
    assert {name: value_of(config, name) for name in told} == told
    assert told.keys() | {name for name in SETTINGS if name.startswith("model.")} >= {n for n, s in SETTINGS.items() if s.follows}


def test_what_a_task_decided_follows_another_task_unless_it_was_given():
    """A run of data without a simulation gets one: its horizon is the new task's, not that of none."""
    without = new_config({"sim.task": ""})
    assert changed(without, {"sim.task": "Lift"}) == new_config({"sim.task": "Lift"}) and without.sim.instruction == ""
    given_before = new_config({"sim.task": "", "sim.horizon": 50, "sim.instruction": "up"})
    config = changed(given_before, {"sim.task": "Door", "sim.actions": "position"})
    assert (config.sim.horizon, config.sim.instruction, config.sim.actions) == (50, "up", "position")


@pytest.mark.parametrize("told, seen, rendered", [
    ({}, 64, 64), ({"model.preset": "cosmos-predict2-2b"}, 224, 224), ({"model.image_size": 96}, 96, 96),
    ({"sim.image_size": 128}, 64, 128),
    ({"model.suite": "libero"}, 224, 256), ({"model.suite": "libero", "sim.image_size": 64}, 224, 64),
    ({"model.suite": "robocasa", "model.image_size": 64, "sim.image_size": 48}, 64, 48),
], ids=str)  # fmt: skip
def test_frames_are_rendered_at_the_size_that_the_network_sees_unless_another_is_given(told, seen, rendered):
    config = new_config(told)
    assert (config.model.image_size, config.sim.image_size) == (seen, rendered)
    assert new_config(given(config)) == config


def test_a_setting_of_a_run_follows_on_unless_it_was_given_a_value_of_its_own():
    config = changed(new_config({"learner.warmup": 9, "learner.refine_cycle": 7}), {"learner.warmup": 1, "learner.cycle": 3})
    assert (config.learner.warmup, config.learner.refine_warmup) == (1, 1)
    assert (config.learner.cycle, config.learner.refine_cycle) == (3, 7)
    both = changed(RunConfig(), {"learner.value_mode": "both", "learner.refine_warmup": 4})
    assert (both.learner.base_value_mode, both.learner.refine_warmup, both.learner.warmup) == ("both", 4, RunConfig().learner.warmup)
    full = changed(new_config({"model.preset": "cosmos-predict2-2b"}), {"learner.value_mode": "both"})
    assert full.learner.base_value_mode == "full"  # the preset's own


def test_no_value_stands_for_another_one():
    for preset in ("tiny", "cosmos-predict2-2b"):
        config = new_config({"model.preset": preset})
        for name, setting in SETTINGS.items():
            if setting.follows:
                assert value_of(config, name) not in (None, "auto", "", -1), name
                assert isinstance(value_of(config, name), bool) or value_of(config, name) != 0 or name.endswith("_share"), name


@pytest.mark.parametrize("told", [
    {}, {"sim.task": "Door"}, {"sim.task": "Door", "sim.horizon": 300}, {"rollout.horizon": 120, "learner.warmup": 5},
    {"model.preset": "cosmos-predict2-2b", "model.suite": "aloha", "rollout.execute": 25, "model.width": 64},
    {"model.output": "velocity", "learner.refine_warmup": 0},
], ids=str)  # fmt: skip
def test_the_fewest_values_make_the_config_again(told):
    config = new_config(told)
    assert given(config) == told and new_config(given(config)) == config


# ---------------------------------------------------------------- the folder of a run


OPEN = """
import sys
from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.run import open_run
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
    for value in ({"a": [1, 2.5, None]}, {"a": [3]}):
        folder.write_json("x.json", value)
        assert folder.read_json("x.json") == value
    with pytest.raises(TypeError):
        folder.write_json("x.json", object())
    assert folder.read_json("x.json") == {"a": [3]}
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


@pytest.mark.parametrize("section, values", [
    (RolloutConfig, {"workers": 2**63}), (LearnerConfig, {"batch_size": 10**12}), (RunConfig, {"pretrain_steps": 2**63}),
])  # fmt: skip
def test_a_number_that_no_machine_can_serve_is_out_of_range(section, values):
    with pytest.raises(ConfigError, match="is out of range: it must be at least 1 and at most 1e"):
        check_ranges(section(**values))


def test_a_suite_of_another_robot_is_refused_before_anything_is_collected(tmp_path):
    config = RunConfig(root=str(tmp_path), name="new", sim=SimConfig(actions="pose"), model=ModelConfig(suite="aloha"))
    with pytest.raises(ConfigError, match="suite 'aloha' sees the cameras .*, and the simulation has robot0_eye_in_hand, agentview: "):
        with open_run(config, Use(needs_ray=False, demonstrates=True)):
            pass
    assert not list(tmp_path.iterdir())
