"""The three released suites: layout, copies and settings of method 1.1, 1.3 and 5.3, and how they are laid over the defaults."""

import dataclasses
from pathlib import Path

import pytest
import torch

from cosmos_ray.config import ModelConfig, RunConfig, check
from cosmos_ray.config.presets import FIDELITIES, LARGE, PRESETS, TINY, preset_settings
from cosmos_ray.config.settings import SETTINGS, changed, new_config, parse_values, read_toml, value_of, values_of_tree
from cosmos_ray.config.stored import stored_config
from cosmos_ray.config.suites import SUITES
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.injection import extract, inject
from cosmos_ray.model.layout import LatentLayout
from cosmos_ray.model.sample_types import SampleType, clean_frames
from cosmos_ray.model.spec import make_spec
from cosmos_ray.planning.scoring import step_ladder

LARGE_PRESET = "cosmos-predict2-2b"

NAMES = {  # method 1.1, column by column
    "libero": "blank proprio wrist primary ACTION future_proprio future_wrist future_primary VALUE",
    "robocasa": "blank proprio wrist primary secondary ACTION future_proprio future_wrist future_primary future_secondary VALUE",
    "aloha": "blank proprio left_wrist right_wrist primary ACTION future_proprio future_left_wrist future_right_wrist future_primary VALUE",
}


@pytest.mark.parametrize("name, action, frames, pixel_frames, tokens", [
    ("libero", 4, 9, 33, 1764), ("robocasa", 5, 11, 41, 2156), ("aloha", 5, 11, 41, 2156),
])  # fmt: skip
def test_layout_is_the_one_of_the_method(name, action, frames, pixel_frames, tokens):
    suite = SUITES[name]
    layout = LatentLayout(suite.cameras)
    assert [n.replace(" ", "_") for n in layout.names] == NAMES[name].split()
    assert (layout.action, layout.frames, layout.value) == (action, frames, frames - 1)
    assert layout.images == tuple(range(2, action)) and layout.future_images == tuple(range(action + 2, frames - 1))
    assert clean_frames(layout, SampleType.POLICY) == tuple(range(action))  # the clean prefix: all that comes before ACTION
    assert 1 + 4 * (layout.frames - 1) == pixel_frames
    spec = make_spec(ModelConfig(preset=LARGE_PRESET, suite=name), suite.cameras, suite.action_dim, suite.proprio_dim)
    _, height, width = spec.frame_shape
    assert spec.layout == layout
    assert layout.frames * (height // spec.transformer.patch) * (width // spec.transformer.patch) == tokens


@pytest.mark.parametrize("name, chunk, dimensions, numbers, copies, remainder", [
    ("libero", 16, 7, 112, 112, 0), ("robocasa", 32, 7, 224, 56, 0), ("aloha", 50, 14, 700, 17, 644),
])  # fmt: skip
def test_a_chunk_fills_its_frame_with_the_copies_of_the_method(name, chunk, dimensions, numbers, copies, remainder):
    suite = SUITES[name]
    assert (suite.chunk, suite.action_dim, suite.chunk * suite.action_dim) == (chunk, dimensions, numbers)
    spec = make_spec(ModelConfig(preset=LARGE_PRESET, suite=name, chunk=chunk), suite.cameras, dimensions, suite.proprio_dim)
    vector = torch.arange(numbers).float()[None]
    flat = inject(vector, spec.frame_shape).flatten()
    assert divmod(len(flat), numbers) == (copies, remainder)
    assert torch.equal(flat, vector[0].repeat(copies + 1)[: len(flat)])
    flat[copies * numbers :] = -1e6  # the remainder does not count
    assert torch.equal(extract(flat.view(1, *spec.frame_shape), numbers), vector)


#: Every value that the public evaluation of a suite sets, and where it stands there (files of NVlabs/cosmos-policy).
PUBLISHED = {  # libero, robocasa, aloha
    "seed": (195, 195, 195),  # LIBERO.md, ROBOCASA.md, aloha/deploy.py: --seed
    "sim.image_size": (256, 224, 224),  # env_img_res of run_*_eval.py; input_image_size of run_aloha_eval.py
    "sim.control_freq": (20, 20, 25),  # robosuite's default; STEP_DURATION_IN_SEC of run_aloha_eval.py
    "sim.horizon": (520, 500, 1100),  # TASK_MAX_STEPS of run_*_eval.py (libero_10; the usual task); --max_steps of run_aloha_eval.py
    "sim.quality": ("full", "full", "full"),  # robosuite's own renderer; a real robot
    "sim.wrist_cameras": (("robot0_eye_in_hand",), ("robot0_eye_in_hand",), ("cam_left_wrist", "cam_right_wrist")),
    "sim.third_cameras": (("agentview",), ("robot0_agentview_left", "robot0_agentview_right"), ("cam_high",)),
    "model.image_size": (224, 224, 224),  # COSMOS_IMAGE_SIZE
    "model.chunk": (16, 32, 50),  # --chunk_size
    "model.jpeg": (True, True, False),  # --use_jpeg_compression
    "rollout.execute": (16, 16, 50),  # --num_open_loop_steps
    "replay.gamma": (0.99, 0.99, 0.998),  # gamma of the data sets in cosmos_policy_experiment_configs.py
    "inference.steps": (5, 5, 10),  # --num_denoising_steps_action
    "planner.futures": (1, 1, 3),  # --num_future_state_predictions_in_ensemble, where ensembles are used
    "planner.future_steps": (1, 1, 5),  # --num_denoising_steps_future_state
    "planner.value_samples": (1, 1, 5),  # --num_value_predictions_in_ensemble, where ensembles are used
    "planner.value_steps": (1, 1, 5),  # --num_denoising_steps_value
    "planner.aggregate": ("average", "average", "majority_mean"),  # --value_ensemble_aggregation_scheme
    "planner.candidates": (8, 8, 8),  # --num_queries_best_of_n of the planning command in aloha/deploy.py
}


@pytest.mark.parametrize("preset", ["tiny", LARGE_PRESET])
@pytest.mark.parametrize("place, suite", list(enumerate(SUITES)))
def test_a_suite_sets_what_its_public_evaluation_sets(preset, place, suite):
    config = configured(model__preset=preset, model__suite=suite)
    assert {name: value_of(config, name) for name in PUBLISHED} == {name: values[place] for name, values in PUBLISHED.items()}
    assert (SUITES[suite].action_dim, SUITES[suite].proprio_dim) == {"aloha": (14, 14)}.get(suite, (7, 9))
    learner = {name for name in SUITES[suite].settings() if name.startswith("learner.")}
    assert SUITES[suite].settings().keys() - learner - {"sim.task", "sim.actions"} <= PUBLISHED.keys()  # each value has its row


def test_a_suite_that_nothing_here_simulates_has_no_task():
    assert [configured(model__suite=name).sim.task for name in SUITES] == ["Lift", "", ""]
    assert configured(model__suite="robocasa", sim__task="Door").sim.task == "Door"


def test_a_horizon_that_was_given_wins_over_the_suites():
    for flags, horizons in (({}, (520, 520)), ({"sim__horizon": "40"}, (40, 40)), ({"rollout__horizon": "80"}, (520, 80)),
                            ({"sim__horizon": "40", "rollout__horizon": "60"}, (40, 60))):
        config = configured(model__suite="libero", **flags)
        check(config)
        assert (config.sim.horizon, config.rollout.horizon) == horizons
    with pytest.raises(ConfigError, match="rollout.horizon = 80 is shorter than sim.horizon = 600"):
        check(configured(model__suite="libero", sim__horizon="600", rollout__horizon="80"))


@pytest.mark.parametrize("name, jpeg", [("libero", True), ("robocasa", True), ("aloha", False), ("", False)])
def test_frames_go_through_jpeg_in_the_simulated_suites_alone(name, jpeg):
    assert make_spec(ModelConfig(preset=LARGE_PRESET, suite=name), ("a",), 7, 9).jpeg is jpeg


@pytest.mark.parametrize("preset, augment, expected", [
    (LARGE_PRESET, None, True), ("tiny", None, False), (LARGE_PRESET, False, False), ("tiny", True, True),
])  # fmt: skip
def test_augmentation_is_the_presets_unless_it_is_set(preset, augment, expected):
    for suite in ("", *SUITES):
        assert make_spec(ModelConfig(preset=preset, suite=suite, augment=augment), ("a",), 7, 9).augmented is expected


# ---------------------------------------------------------------- laid over the defaults


def configured(*, file: str | None = None, **flags: str) -> RunConfig:
    """The config of a new run with flags ``sim__task="Stack"``."""
    path = Path(file or "")
    values = values_of_tree(path, read_toml(path), {}) if file else {}
    return new_config({**values, **parse_values({k.replace("__", "."): v for k, v in flags.items()})})


def test_the_presets_are_complete_records_of_the_same_settings():
    assert list(TINY) == list(LARGE) and TINY.keys() <= SETTINGS.keys()
    spec = {name for name, setting in SETTINGS.items()
            if name.startswith("model.") and setting.follows and name != "model.fidelity" and name not in FIDELITIES["ours"]}
    assert {name for name in TINY if name.startswith("model.")} == spec
    for name, value in TINY.items():  # the defaults are the tiny preset
        assert value is None or value_of(RunConfig(), name) == value and type(value_of(RunConfig(), name)) is type(value), name


def test_presets_and_suites_are_the_choices_of_their_settings():
    assert SETTINGS["model.preset"].choices == tuple(PRESETS) and SETTINGS["model.suite"].choices == ("", *SUITES)


def test_a_model_that_is_made_by_hand_has_its_presets_values():
    for preset, record in PRESETS.items():
        model = ModelConfig(preset=preset, width=48)
        assert (model.width, model.layers, model.sigma_min) == (48, record["model.layers"], record["model.sigma_min"])
    assert ModelConfig(suite="libero").jpeg and not ModelConfig().jpeg and not ModelConfig(output="velocity").residual


@pytest.mark.parametrize("suite", ["", *SUITES])
@pytest.mark.parametrize("preset", ["tiny", LARGE_PRESET])
def test_every_preset_setting_exists_and_is_accepted(preset, suite):
    settings = preset_settings(preset, suite)
    assert settings.keys() <= SETTINGS.keys()
    config = configured(model__preset=preset, model__suite=suite)
    check(config)
    for name, value in settings.items():
        held = value_of(config, name)
        assert value is None or held == value and type(held) is type(value), name


def test_the_large_preset_trains_and_plans_as_the_paper_does():
    config = configured(model__preset=LARGE_PRESET)
    learner, planner = config.learner, config.planner
    assert (learner.lr, learner.refine_lr, learner.schedule, learner.warmup, learner.cycle) == (1e-4, 1e-4, "paper", 1000, 30_000)
    assert (learner.beta2, learner.weight_decay, learner.clip, learner.ema, learner.precision) == (0.99, 0.1, 1.0, 0.0, "bf16")
    assert step_ladder(planner.future_steps, planner.futures) == [1, 3, 5]
    assert step_ladder(planner.value_steps, planner.value_samples) == [1, 2, 3, 4, 5]
    assert planner.aggregate == "majority_mean" and learner.base_value_mode == "full"


@pytest.mark.parametrize("suite, chunk, execute, gamma, steps, learner", [
    ("libero", 16, 16, 0.99, 5, (1000, 30_000, 1000, 30_000)), ("robocasa", 32, 16, 0.99, 5, (1000, 30_000, 1000, 30_000)),
    ("aloha", 50, 50, 0.998, 10, (2000, 20_000, 1500, 15_000)),
])  # fmt: skip
def test_a_suite_brings_its_chunk_discount_steps_and_schedule(suite, chunk, execute, gamma, steps, learner):
    config = configured(model__preset=LARGE_PRESET, model__suite=suite)
    assert (config.model.chunk, config.rollout.execute, config.replay.gamma, config.inference.steps) == (chunk, execute, gamma, steps)
    held = config.learner
    assert (held.warmup, held.cycle, held.refine_warmup, held.refine_cycle) == learner
    assert (config.sim.image_size, config.model.image_size, config.sim.actions) == (SUITES[suite].rendered, 224, "pose")


def test_the_defaults_are_untouched_without_preset_and_suite():
    assert preset_settings("tiny", "") == TINY | {"model.fidelity": "ours"} | FIDELITIES["ours"] and configured() == RunConfig()


def test_a_suite_wins_over_the_preset_and_files_and_flags_over_both(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\npreset = "{LARGE_PRESET}"\nsuite = "aloha"\n[learner]\nlr = 3e-5\nwarmup = 7\n[replay]\ngamma = 0.9\n')
    config = configured(file=str(file), learner__warmup="11", sim__image_size="64")
    assert LARGE["learner.warmup"] == 1000 and SUITES["aloha"].warmup == 2000
    assert (config.learner.lr, config.learner.warmup, config.replay.gamma, config.sim.image_size) == (3e-5, 11, 0.9, 64)
    assert (config.model.chunk, config.learner.weight_decay) == (50, 0.1)  # the rest of suite and preset stays


def test_a_suite_in_the_file_counts_and_a_flag_takes_it_back(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\nsuite = "robocasa"\n')
    assert configured(file=str(file)).model.chunk == 32
    assert configured(file=str(file), model__suite="").model.chunk == RunConfig().model.chunk


def test_a_stored_run_is_not_overlaid_again(tmp_path):
    """What a user changed in a run must not fall back to the suite's at its next stage."""
    first = configured(root=str(tmp_path), model__preset=LARGE_PRESET, model__suite="aloha", learner__lr="3e-5", rollout__execute="25",
                       sim__image_size="64")
    RunFolder(first).close()
    stored = stored_config(configured(root=str(tmp_path)))
    assert stored == first
    assert changed(stored, {"demos": 5}) == dataclasses.replace(first, demos=5)
    assert changed(stored, {"replay.gamma": 0.9}).replay.gamma == 0.9
    assert configured(model__preset=LARGE_PRESET, model__suite="aloha").learner.lr == LARGE["learner.lr"]  # a new run has the suite's again


def test_a_chunk_shorter_than_the_suite_executes_is_refused():
    with pytest.raises(ConfigError, match="rollout.execute = 50 is longer than the chunk, model.chunk = 20"):
        check(configured(model__preset=LARGE_PRESET, model__suite="aloha", model__chunk="20"))
    check(configured(model__preset=LARGE_PRESET, model__suite="aloha", model__chunk="20", rollout__execute="20"))
