"""Runs that earlier versions made: their settings mean what they meant then.

``data/config_before`` holds config.json files that the version before format 2 wrote, each with what that version did with it.
"""

import dataclasses
import json
from pathlib import Path

import pytest

from cosmos_ray.config import RolloutConfig, RunConfig, SimConfig, check
from cosmos_ray.config.settings import SETTINGS, changed, new_config, value_of
from cosmos_ray.config.stored import config_tree, stored_config
from cosmos_ray.config.upgrade import BEFORE, FORMAT, OLD_NAMES, OTHERWISE_CALLED, STOOD_FOR, is_before, read_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.learner.mixture import Mixture
from cosmos_ray.model.spec import make_spec
from cosmos_ray.stages.refine import schedule

FILES = sorted((Path(__file__).parent / "data" / "config_before").glob("*.json"))

#: Settings that format 1 did not have: the preset or the suite fixed the model's, and a store kept every rollout.
NEW = ("sim.instruction", "sim.suite", "sim.tasks", "sim.quality", "sim.expert", "model.fidelity", "model.resize",
       "model.augmentation", "learner.decay_all", "planner.ladder", "planner.early_rejection", "model.attention",
       "inference.max_actors", "planner.depth", "planner.branch", "planner.beam", "planner.deadline_ms",
       "model.image_size", "model.adaln_rank", "model.rope_scale", "model.text_width", "model.text_tokens",
       "model.loss_scale", "model.jpeg", "replay.keep_newest", "replay.keep_failures",
       "keep_rounds", "learner.deadline_s", "inference.nodes", "learner.nodes", "rollout.nodes",
       "rollout.chunk_deadline_s", "rollout.simulator_memory_mb", "rollout.simulator_episodes")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def before(request, tmp_path):
    """(folder of a run with the file of before, its tree, what that version did with it)."""
    data = json.loads(request.param.read_text())
    folder = tmp_path / data["config"]["name"]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(data["config"]))
    return folder, data["config"], data["acted"]


def stored(folder: Path) -> RunConfig:
    return stored_config(RunConfig(root=str(folder.parent), name=folder.name))


def test_a_run_of_before_acts_as_it_did(before):
    folder, _, acted = before
    config = stored(folder)
    check(config)
    spec = json.loads(json.dumps(make_spec(config.model, config.sim.cameras, 7, 9).to_json()))
    assert spec["transformer"].pop("one_way") is False  # later than these runs
    assert {name: spec[name] for name in acted["spec"]} == acted["spec"]
    assert (config.sim.horizon, config.sim.actions) == (acted["horizon"], acted["actions"])
    assert (config.rollout.horizon, config.rollout.execute) == (acted["rollout_horizon"], acted["execute"])
    refine = schedule(config.learner)
    assert (refine.warmup, refine.cycle) == (acted["refine_warmup"], acted["refine_cycle"])
    assert list(config.learner.refine_mix) == acted["refine_mix"]
    base = Mixture.base(config.learner, config.replay)
    kinds = next(value for value in vars(base).values() if isinstance(value, tuple))
    assert [int(kind) for kind in kinds] == acted["base_value_kinds"]
    assert config.learner.planning_world_weight == acted["planning_world_weight"]


def test_what_was_given_is_kept_under_its_present_name(before):
    folder, tree, _ = before
    config = stored(folder)
    for name, setting in SETTINGS.items():
        old = next((then for then, now in OLD_NAMES.items() if now == name), name)
        section, _, field = old.rpartition(".")
        if name in NEW or name in STOOD_FOR or name in ("root", "name", "address", "wandb", "repeat", "plan_seed"):
            continue
        theirs = (tree[section] if section else tree)[field]
        theirs = OTHERWISE_CALLED.get((name, theirs), theirs) if isinstance(theirs, str) else theirs
        assert value_of(config, name) == (tuple(theirs) if isinstance(theirs, list) else theirs), setting.name


def test_the_file_of_before_is_kept_beside_the_new_one(before):
    folder, tree, _ = before
    for _ in range(2):
        RunFolder(stored(folder)).close()
        assert json.loads((folder / BEFORE).read_text()) == tree and is_before(tree)
        now = json.loads((folder / "config.json").read_text())
        assert now["format"] == FORMAT and not is_before(now)
    assert stored(folder) == read_config(folder / "config.json", now)


def test_the_file_of_before_keeps_its_permissions(before):
    """It may hold credentials, which a store's URI could have then."""
    folder, _, _ = before
    (folder / "config.json").chmod(0o600)
    RunFolder(stored(folder)).close()
    assert (folder / BEFORE).stat().st_mode & 0o777 == 0o600


def test_a_run_of_before_may_have_rollouts_shorter_than_an_episode_of_the_task(tmp_path):
    """The version of then compared with a horizon that was given, not with the task's own."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text(json.dumps({"name": "old", "rollout": {"horizon": 80}}))
    config = stored_config(RunConfig(root=str(tmp_path), name="old"))
    check(config)
    assert (config.rollout.horizon, config.sim.horizon) == (80, 96)
    with pytest.raises(ConfigError, match="rollout.horizon = 80 is shorter than sim.horizon = 90"):
        check(RunConfig(sim=SimConfig(horizon=90), rollout=RolloutConfig(horizon=80)))


def test_a_run_of_before_refuses_another_simulator_and_model(before):
    folder, tree, _ = before
    config = stored(folder)
    for name, value in (("sim.horizon", config.sim.horizon + 1), ("model.sigma_min", config.model.sigma_min + 1)):
        with pytest.raises(ConfigError, match=f"was made with {name} = "):
            RunFolder(changed(config, {name: value}))
    assert json.loads((folder / "config.json").read_text()) == tree and not (folder / BEFORE).exists()


def test_a_run_from_before_a_setting_came_has_its_default(tmp_path):
    file = tmp_path / "config.json"
    tree = json.loads(FILES[0].read_text())["config"]  # the 2B preset
    whole = read_config(file, tree)
    del tree["model"]["uniform_share"], tree["model"]["top_share"], tree["learner"]["refine_mix"], tree["planner"]["spread"]
    assert read_config(file, tree) == whole and whole.learner.refine_mix == (0.1, 0.45, 0.45)


@pytest.mark.parametrize("tree", [
    {"sim": {"image_size": 96}}, {"format": FORMAT, "sim": {"image_size": 96}}, {"format": FORMAT, "model": {"image_size": 96}},
    {"format": FORMAT, "model": {"suite": "libero"}, "sim": {"image_size": 96}},
], ids=str)  # fmt: skip
def test_the_network_of_a_run_from_before_sees_the_frames_as_they_were_rendered(tmp_path, tree):
    assert read_config(tmp_path / "config.json", tree).model.image_size == 96


@pytest.mark.parametrize("format", [1, 2])
def test_a_run_from_before_fidelity_computes_as_it_did(tmp_path, format):
    """Also one of a suite, which is "reference" today."""
    tree = {"model": {"preset": "cosmos-predict2-2b", "suite": "aloha"}, "learner": {"schedule": "paper"}, "planner": {"aggregate": "lcb"}}
    config = read_config(tmp_path / "config.json", tree | ({"format": 2} if format == 2 else {}))
    model, planner = config.model, config.planner
    assert (model.fidelity, model.resize, model.augmentation, config.learner.decay_all) == ("ours", "bilinear", "smooth", False)
    assert (config.learner.schedule, planner.aggregate, planner.ladder) == ("paper_before", "lcb_population", "rounded")
    again = read_config(tmp_path / "config.json", config_tree(config))
    assert again == config
    new = new_config({"model.suite": "aloha", "planner.aggregate": "lcb"})
    assert read_config(tmp_path / "config.json", config_tree(new)) == new and new.planner.aggregate == "lcb"


@pytest.mark.parametrize("change, complaint", [
    ({"format": FORMAT + 1}, f"is of format {FORMAT + 1}, this version reads up to {FORMAT}"),
    ({"planer": {"spread": 1}}, "unknown setting 'planer.spread'; did you mean 'planner.spread'"),
    ({"demos": "many"}, "demos = 'many' must be of type int"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, change, complaint):
    RunFolder(RunConfig(root=str(tmp_path))).close()
    file = tmp_path / "demo" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=complaint) as caught:
        stored_config(RunConfig(root=str(tmp_path)))
    assert str(file) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_what_is_stored_is_what_acts(tmp_path):
    config = new_config({"root": str(tmp_path), "sim.task": "Door", "model.chunk": 4})
    RunFolder(config).close()
    tree = json.loads((tmp_path / "demo" / "config.json").read_text())
    assert (tree["sim"]["horizon"], tree["sim"]["actions"], tree["rollout"]["execute"], tree["model"]["layers"]) == (200, "pose", 4, 4)
    assert {key: value for key, value in tree.items() if key != "format"} == json.loads(json.dumps(dataclasses.asdict(config)))
    assert stored_config(config) == config and config.sim == SimConfig(task="Door")
