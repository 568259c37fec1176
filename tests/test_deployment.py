"""`load_policy` and `get_action`: a policy in a program of one's own, without Ray and a simulator."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from cosmos_ray import DeployedPolicy, PolicyOutput, load_policy
from cosmos_ray.commands.cli import main
from cosmos_ray.config import InferenceConfig, PlannerConfig, RunConfig
from cosmos_ray.config.stored import config_tree
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.inference.client import PoolClient
from cosmos_ray.inference.core import InferenceCore
from cosmos_ray.inference.messages import ActingPolicy, ActRequest
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import save_policy
from cosmos_ray.model.images import prepare
from tests import test_command_line, test_exchange_command
from tests.conftest import ROOT, environment
from tests.test_planning import demo_policy

handlers, released = test_command_line.handlers, test_exchange_command.files
LIFT = test_exchange_command.LIFT
PLANNER = PlannerConfig(candidates=3, value_samples=2, value_steps=2)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two policies, as a run has them."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    policy = demo_policy()
    save_policy(policy, folder / "checkpoints" / "refined", 1)
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(6))
    save_policy(policy, folder / "checkpoints" / "planning", 2)
    config = RunConfig(root=str(folder.parent), name="small", planner=PLANNER, inference=InferenceConfig(steps=3))
    (folder / "config.json").write_text(json.dumps(config_tree(config)))
    return folder


@pytest.fixture(scope="module")
def policy(run) -> DeployedPolicy:
    return load_policy(run / "checkpoints" / "refined")


def observed(n: int = 0, size: int = 64, **changes) -> dict:
    """One observation, or a batch of ``n``."""
    rng, rows = np.random.default_rng(5), (n,) if n else ()
    image = lambda: rng.integers(0, 256, (*rows, size, size, 3), dtype=np.uint8)  # noqa: E731
    out = {"wrist_image": image(), "primary_image": image(), "proprio": rng.uniform(-1, 1, (*rows, 9)).astype(np.float32),
           "task_description": LIFT}
    return {key: value for key, value in (out | changes).items() if value is not None}


def test_one_observation_gives_actions_a_value_and_futures_when_asked(policy):
    actions, value, futures = policy.get_action(observed())
    assert actions.shape == (8, 4) and actions.dtype == np.float32 and isinstance(value, float) and 0 <= value <= 1 and futures == {}
    again = policy.get_action(observed(), futures=True)
    assert isinstance(again, PolicyOutput) and np.array_equal(again.actions, actions) and again.value == value
    assert {key: (image.shape, image.dtype) for key, image in again.futures.items()} == {
        key: ((64, 64, 3), np.uint8) for key in ("wrist_image", "primary_image")}
    assert not np.array_equal(policy.get_action(observed(), seed=1).actions, actions)


def test_a_row_of_a_batch_is_what_the_observation_gives_alone(policy):
    texts, seeds = [LIFT, "open the door", LIFT], [4, 4, 5]
    batch = observed(3, task_description=texts)
    together = policy.get_action(batch, seed=seeds, futures=True)
    assert together.actions.shape == (3, 8, 4) and together.value.shape == (3,) and together.futures["wrist_image"].shape == (3, 64, 64, 3)
    for row in range(3):
        alone = policy.get_action({key: value[row] for key, value in batch.items()}, seed=seeds[row], futures=True)
        assert np.array_equal(alone.actions, together.actions[row]) and alone.value == together.value[row]
        assert all(np.array_equal(image, together.futures[key][row]) for key, image in alone.futures.items())
    same = policy.get_action(observed(3), LIFT)  # one instruction and one seed for all
    first = {key: value[0] for key, value in observed(3, task_description=None).items()}
    assert np.array_equal(same.actions[0], policy.get_action(first, LIFT).actions)


@pytest.mark.parametrize("planned", [False, True])
def test_the_pool_gives_the_same_actions_bit_for_bit(local_ray, run, planned):
    """`rollout` and `evaluate` ask the pool. The planner's and the sampler's settings are those of the run."""
    folder, observation = run / "checkpoints", observed()
    mine = load_policy(folder / "refined", **({"candidates": 3, "planning": folder / "planning"} if planned else {}))
    assert mine.steps == 3 and mine.planner == (PLANNER if planned else None)
    pool = InferencePool(folder / "refined", InferenceConfig(steps=3), options=[{"num_cpus": 0.5}]).start()
    try:
        acting = ActingPolicy(1, PLANNER, str(folder / "planning")) if planned else ActingPolicy(1)
        pool.load(folder / "refined", acting)
        images = np.stack([observation["wrist_image"], observation["primary_image"]])[None]
        asked = ActRequest(images, observation["proprio"][None], (LIFT,), np.array([11]), 3, acting, decode_futures=True)
        client = PoolClient(pool.actors, 60.0)
        reply = client.result(client.submit(asked))
    finally:
        pool.close()
    actions, value, futures = mine.get_action(observation, seed=11, futures=True)
    assert np.array_equal(actions, reply.actions[0]) and value == reply.scores[0].max()
    assert np.array_equal(np.stack(list(futures.values())), reply.futures[0])


def test_nothing_but_torch_and_this_package_is_imported(run):
    code = f"""
import sys
import numpy as np
from cosmos_ray import load_policy
assert "torch" in sys.modules
policy = load_policy({str(run / "checkpoints" / "refined")!r}, candidates=2, planning={str(run / "checkpoints" / "planning")!r})
image = np.zeros((48, 64, 3), np.uint8)
policy.get_action({{"wrist_image": image, "primary_image": image, "proprio": np.zeros(9)}}, "lift the red cube", futures=True)
print(sorted({{name.split(".")[0] for name in sys.modules}} & set(
    "ray robosuite mujoco deepspeed pyarrow h5py matplotlib transformers diffusers".split())))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stdout + done.stderr


def test_the_package_itself_is_imported_without_torch():
    code = "import sys, cosmos_ray; assert 'torch' not in sys.modules; cosmos_ray.nothing"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert "module 'cosmos_ray' has no attribute 'nothing'" in done.stderr


def test_images_of_any_size_pass_the_policy_s_own_pipeline(policy):
    """Every camera alone, as they may differ in size: what is prepared beforehand to the network's size gives the same actions."""
    rng = np.random.default_rng(1)
    wrist, primary = (rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((48, 80), (200, 90)))
    ready = [prepare(image[None, None], 64, False, False)[0, 0] for image in (wrist, primary)]
    given, before = (policy.get_action(observed(wrist_image=a, primary_image=b)).actions for a, b in ((wrist, primary), ready))
    assert np.array_equal(given, before)


@pytest.mark.parametrize("cameras, keys", [
    (("wrist", "primary"), ["wrist_image", "primary_image"]),
    (("wrist", "primary", "secondary"), ["wrist_image", "primary_image", "secondary_image"]),
    (("left_wrist", "right_wrist", "primary"), ["left_wrist_image", "right_wrist_image", "primary_image"]),
    (("cam_right_wrist", "cam_left_wrist", "cam_high"), ["right_wrist_image", "left_wrist_image", "primary_image"]),
    (("robot0_eye_in_hand", "agentview"), ["wrist_image", "primary_image"]),
    (("agentview",), ["primary_image"]),
    (("a", "b", "c"), ["primary_image", "secondary_image", "c"]),
])  # fmt: skip
def test_cameras_have_their_public_keys_their_names_and_robosuite_s_keys(cameras, keys):
    network = demo_policy()
    network.spec = dataclasses.replace(network.spec, cameras=cameras)
    found = DeployedPolicy(InferenceCore(network, 0), None, 1).cameras
    assert [names[0] for names in found.values()] == keys
    assert all(camera in names and f"{camera}_image" in names for camera, names in found.items())


def test_a_camera_s_own_name_gives_the_same(policy):
    public = observed()
    named = {{"wrist_image": "wrist", "primary_image": "agent_image"}.get(key, key): value for key, value in public.items()}
    given = policy.get_action(named, futures=True)
    assert np.array_equal(given.actions, policy.get_action(public).actions) and list(given.futures) == ["wrist", "agent_image"]


IMAGE = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize("changes, complaint", [
    ({"wrist_image": None}, "lacks 'wrist_image' or 'wrist': this policy takes wrist_image, primary_image, proprio and task_description"),
    ({"wrist_image": None, "wrist_img": IMAGE}, "lacks 'wrist_image'"),
    ({"secondary_image": IMAGE}, "has 'secondary_image', which this policy does not see: it takes wrist_image, primary_image"),
    ({"wrist": IMAGE}, "names one camera twice, as 'wrist_image' and 'wrist'"),
    ({"wrist_image": IMAGE.astype(np.float32) / 255}, "wrist_image is of dtype float32: give uint8"),
    ({"wrist_image": IMAGE.transpose(2, 0, 1)}, "wrist_image is 3 x 64 x 64: give height x width x 3"),
    ({"wrist_image": IMAGE[..., :1]}, "wrist_image is 64 x 64 x 1: give"),
    ({"wrist_image": IMAGE[None]}, "wrist_image is 1 x 64 x 64 x 3: give height x width x 3"),
    ({"wrist_image": IMAGE[:0]}, "wrist_image is 0 x 64 x 3: give"),
    ({"proprio": None}, "lacks 'proprio': give 9 numbers"),
    ({"proprio": np.zeros(7)}, r"proprio is of shape \(7,\): this policy takes 9 numbers, or B x 9"),
    ({"proprio": np.full(9, np.nan)}, "proprio has a number that is not finite"),
    ({"proprio": ["a"] * 9}, "proprio is of dtype <U1: give numbers"),
    ({"proprio": np.zeros((2, 9))}, "wrist_image is 64 x 64 x 3: give 2 x height x width x 3, as many as proprio"),
    ({"task_description": None}, "no instruction: give get_action one, or the observation a 'task_description'"),
    ({"task_description": " "}, "the instruction is ' ': give a text"),
    ({"task_description": ["lift", "open"]}, "the instruction is .*: give a text, or 1 of them"),
])  # fmt: skip
def test_what_is_wrong_with_an_observation_is_one_line(policy, changes, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        policy.get_action(observed(**changes))
    assert "\n" not in str(error.value)


def test_two_instructions_and_seeds_that_are_none_are_refused(policy):
    with pytest.raises(ConfigError, match="two instructions, 'open' and 'lift the red cube' of the observation"):
        policy.get_action(observed(task_description="lift the red cube"), "open")
    for seed in (1.5, [1, 2]):
        with pytest.raises(ConfigError, match="seed = .*: give a whole number, or 1 of them"):
            policy.get_action(observed(), seed=seed)
    with pytest.raises(ConfigError, match="an observation is a dict of images, proprio and task_description, not a list"):
        policy.get_action([])


@pytest.mark.parametrize("arguments, complaint", [
    ({"device": "tpu"}, "device = 'tpu': give 'cpu' or 'cuda'"),
    ({"statistics": "x.json"}, "refined is a checkpoint folder, which holds its own statistics: leave statistics out"),
    ({"planning": "planning"}, "would judge nothing, for there is one candidate: leave it out, or give candidates=8"),
    ({"planning": "planning", "candidates": 2, "settings": {"planner.rank_by": "joint"}}, "would judge nothing, for planner.rank_by ="),
    ({"candidates": 0}, "planner.candidates = 0 is out of range"),
    ({"settings": {"planner.rank": "joint"}}, "settings has no 'planner.rank'; did you mean 'planner.rank_by'"),
])  # fmt: skip
def test_what_is_wrong_with_an_argument_is_one_line(run, arguments, complaint):
    folder = run / "checkpoints"
    arguments = arguments | ({"planning": folder / arguments["planning"]} if "planning" in arguments else {})
    with pytest.raises(ConfigError, match=complaint) as error:
        load_policy(folder / "refined", **arguments)
    assert "\n" not in str(error.value)


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="device = 'cuda', and torch sees 0 GPUs here: give device='cpu'"):
        load_policy(tmp_path / "nothing", device="cuda")


def test_a_checkpoint_that_was_copied_out_of_its_run_acts_with_the_preset_s_settings(run, policy, tmp_path):
    shutil.copytree(run / "checkpoints" / "refined", tmp_path / "elsewhere" / "deep" / "policy")
    alone = load_policy(tmp_path / "elsewhere" / "deep" / "policy", steps=3)
    assert np.array_equal(alone.get_action(observed()).actions, policy.get_action(observed()).actions)
    assert load_policy(tmp_path / "elsewhere" / "deep" / "policy").steps == InferenceConfig().steps


def test_a_round_of_a_run_acts_with_the_settings_of_its_run(run, policy):
    shutil.copytree(run / "checkpoints" / "refined", run / "checkpoints" / "rounds" / "3" / "refined")
    earlier = load_policy(run / "checkpoints" / "rounds" / "3" / "refined")
    assert earlier.steps == policy.steps == 3
    assert np.array_equal(earlier.get_action(observed()).actions, policy.get_action(observed()).actions)


# ---------------------------------------------------------------- released files


@pytest.fixture(scope="module")
def release(released, tmp_path_factory):
    """A folder as a release is downloaded: weights, dataset statistics and T5 embeddings, under the public names."""
    folder = tmp_path_factory.mktemp("Cosmos-Policy-LIBERO-Predict2-2B")
    for name, public in (("policy.pt", "Cosmos-Policy-LIBERO-Predict2-2B.pt"), ("statistics.json", "libero_dataset_statistics.json"),
                         ("t5.pkl", "libero_t5_embeddings.pkl")):
        shutil.copy(released / name, folder / public)
    return folder


SMALL = {"model.width": 64, "model.heads": 2, "model.layers": 2, "model.image_size": 64}


def test_released_files_act_by_suite_and_as_the_run_that_imports_them(released, release, tmp_path, handlers):
    """Five lines of Python, and `import`: the same policy."""
    weights = release / "Cosmos-Policy-LIBERO-Predict2-2B.pt"
    policy = load_policy(weights, suite="libero", tokenizer=released / "wan", settings=SMALL, candidates=2)
    observation = observed(size=256)
    actions, value, futures = policy.get_action(observation, futures=True)
    assert actions.shape == (16, 7) and 0 <= value <= 1 and futures["primary_image"].shape == (64, 64, 3)
    assert (policy.steps, list(policy.cameras), policy.spec.jpeg, policy.spec.augmented) == (5, ["wrist", "primary"], True, True)
    assert main(test_exchange_command.importing(released, tmp_path)) == 0
    imported = load_policy(tmp_path / "lib" / "checkpoints" / "base", candidates=2)
    assert imported.planner == policy.planner and imported.steps == policy.steps
    assert np.array_equal(imported.get_action(observation).actions, actions) and imported.get_action(observation).value == value


@pytest.mark.parametrize("arguments, error, complaint", [
    ({"tokenizer": ""}, ConfigError, "has no policy.json., and released weights come without their Wan 2.1 VAE: give tokenizer=PATH"),
    ({"statistics": "other.json"}, CheckpointError, "cannot read the dataset statistics other.json"),
    ({"suite": "libro"}, ConfigError, "model.suite = 'libro' is not one of"),
    ({"path": "nothing.pt"}, ConfigError, "'nothing.pt' does not exist: give a checkpoint folder of a run, or released weights"),
])  # fmt: skip
def test_what_is_wrong_with_a_release_is_one_line(released, release, arguments, error, complaint):
    chosen = {"path": release / "Cosmos-Policy-LIBERO-Predict2-2B.pt", "suite": "libero", "tokenizer": released / "wan", "settings": SMALL}
    with pytest.raises(error, match=complaint) as raised:
        load_policy(**(chosen | arguments))
    assert "\n" not in str(raised.value)


def test_weights_that_lie_alone_name_what_is_missing(released, tmp_path):
    shutil.copy(released / "policy.pt", tmp_path / "policy.pt")
    with pytest.raises(ConfigError, match=r"released weights need text: .* has no \*_t5_embeddings.\*, give text=FILE"):
        load_policy(tmp_path / "policy.pt", suite="libero", tokenizer=released / "wan", settings=SMALL)
    with pytest.raises(ConfigError, match=r"released weights need statistics: .* has no \*_dataset_statistics.json, give statistics=FILE"):
        load_policy(tmp_path / "policy.pt", suite="libero", tokenizer=released / "wan", text=released / "t5.pkl", settings=SMALL)


def test_an_instruction_that_a_release_does_not_know_is_one_line(released, release):
    policy = load_policy(release / "Cosmos-Policy-LIBERO-Predict2-2B.pt", suite="libero", tokenizer=released / "wan", settings=SMALL)
    with pytest.raises(ConfigError, match="there is no embedding of 'dance'"):
        policy.get_action(observed(task_description="dance"))
