"""The flows of the public cosmos-policy pages, with small weights in its formats: convert, train, evaluate, plan, export.

The table of docs/model.md names the same commands.
"""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from cosmos_ray import load_policy
from cosmos_ray.model.checkpoint import load_checkpoint, read_description
from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.replay.store import ReplayStore
from tests import public_files as public
from tests.conftest import ROOT, environment
from tests.test_exchange import same

DRAWER, BOWL = "open the top drawer", "put the bowl on the plate"
LIBERO_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
ROBOCASA_CAMERAS = ("robot0_agentview_left_rgb", "robot0_agentview_right_rgb", "robot0_eye_in_hand_rgb")
NETWORK = [part for name, value in public.WIDTH.items() for part in ("--" + name, value)]
TRAINING = ["--learner.batch-size", "4", "--quiet"]


@pytest.fixture
def run(tmp_path):
    """``run(command, ...)`` of a user in ``tmp_path``: what it prints."""

    def command(*words: str | Path) -> str:
        arguments = [sys.executable, "-m", "cosmos_ray", *map(str, words), "--root", str(tmp_path / "runs")]
        done = subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    return command


def release(folder: Path, suite: str, texts: list[str], seed: int = 1) -> dict[str, Path]:
    """A released policy as it is downloaded."""
    dims = (14, 14) if suite == "aloha" else (7, 9)
    return {"weights": public.weights(folder / f"{folder.name}.pt", seed),
            "statistics": public.statistics(folder / f"{suite}_dataset_statistics.json", *dims),
            "text": public.embeddings(folder / f"{suite}_t5_embeddings.pkl", texts)}


def new_run(suite: str, tokenizer: Path, text: Path) -> list[str | Path]:
    return ["--model.preset", "cosmos-predict2-2b", "--model.suite", suite, *NETWORK,
            "--model.tokenizer-path", tokenizer, "--model.text-path", text]


def classes(root: Path, name: str) -> list[str]:
    store = ReplayStore(root / "runs" / name / "replay", create=False)
    store.update()
    return sorted(s.episode_class for s in store.summaries())


@pytest.mark.slow
def test_a_released_policy_is_evaluated_planned_and_rolled_out_and_goes_back(run, tmp_path):
    """LIBERO.md, ROBOCASA.md: `run_libero_eval`; with `--data_collection True` its rollouts."""
    files = release(tmp_path / "Cosmos-Policy-LIBERO-Predict2-2B", "libero", [DRAWER, BOWL])
    weights = ["--weights", files["weights"], "--statistics", files["statistics"]]
    said = run("import", "--name", "libero", *new_run("libero", public.vae(tmp_path / "wan"), files["text"]), *weights,
               "--sim.task", "Lift", "--sim.instruction", DRAWER, "--sim.horizon", "40")
    assert "base policy of" in said
    said = run("evaluate", "--name", "libero", "--eval-episodes", "1", "--arms", "base,base + planning", "--planner.candidates", "2",
               "--planner.rank-by", "joint", "--quiet")
    assert "base " in said and "base + planning " in said
    assert "filmstrip in" in run("plan", "--name", "libero", "--quiet")
    few = ["--rollout.workers", "1", "--rollout.envs-per-worker", "1"]
    assert "2 rollouts" in run("rollout", "--name", "libero", "--rollouts", "2", *few, *TRAINING)
    run("replay", "export", "--name", "libero", "--format", "cosmos", "--class", "success", "failure", "--render",
        "--to", tmp_path / "rollout_data")
    collected = sorted((tmp_path / "rollout_data").rglob("*.hdf5"))
    assert len(collected) == 2
    with h5py.File(collected[0]) as file:
        assert file.attrs["task_description"] == DRAWER and file["actions"].shape[1] == 7 and file["proprio"].shape[1] == 9
        assert len(file["primary_images_jpeg"]) == len(file["wrist_images_jpeg"]) == len(file["actions"])
    run("export", "--name", "libero", "--checkpoint", "base", "--to", tmp_path / "again.pt")
    assert same(read_weights(tmp_path / "again.pt"), read_weights(files["weights"]))
    assert read_statistics(tmp_path / "again_dataset_statistics.json").raw == json.loads(files["statistics"].read_text())


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["libero", "robocasa"])
def test_a_policy_is_trained_on_the_public_demonstrations_and_rollouts(run, tmp_path, suite):
    """LIBERO.md, ROBOCASA.md: `scripts.train` from the video model, on `success_only` and `all_episodes`."""
    folder, text = tmp_path / f"{suite}-Cosmos-Policy", DRAWER
    if suite == "libero":
        for instruction in (DRAWER, BOWL):
            name = f"{instruction.replace(' ', '_')}_demo.hdf5"
            public.demonstrations(folder / "success_only" / "libero_goal_regen" / name, LIBERO_CAMERAS, None)
    else:
        text = "turn off the microwave"
        file = folder / "success_only" / "TurnOffMicrowave" / "demo.hdf5"
        public.demonstrations(file, ROBOCASA_CAMERAS, [text, "press stop"], 4, actions=12)
    texts = [DRAWER, BOWL] if suite == "libero" else [text, "press stop"]
    t5 = public.embeddings(folder / "success_only" / "t5_embeddings.pkl", texts)
    views = ("primary", "wrist") if suite == "libero" else ("primary", "secondary", "wrist")
    public.rollouts(folder / "all_episodes", suite, views, text)
    settings = new_run(suite, public.vae(tmp_path / "wan"), t5)
    said = run("replay", "import", "--name", suite, "--format", "robomimic", folder / "success_only", *settings)
    assert all(instruction in said for instruction in texts)
    run("replay", "import", "--name", suite, "--format", "cosmos", folder / "all_episodes")
    assert classes(tmp_path, suite) == ["demo"] * 4 + ["failure", "success"]
    video = public.weights(tmp_path / "model-480p-16fps.pt", 5)
    assert "after 2 steps" in run("pretrain", "--name", suite, "--init", video, "--pretrain-steps", "2", *TRAINING)
    refining = ["--refine-steps", "2", "--refine-rollouts", "0", "--planning-steps", "2"]
    assert "after 2 steps" in run("refine", "--name", suite, *refining, *TRAINING)
    for checkpoint in ("base", "refined", "planning"):
        run("export", "--name", suite, "--checkpoint", checkpoint, "--to", tmp_path / f"{checkpoint}.pt")
        trained, before = read_weights(tmp_path / f"{checkpoint}.pt"), read_weights(video)
        assert trained.keys() == before.keys() and not same(trained, before)
    assert set(read_text_embeddings(tmp_path / "base_t5_embeddings.safetensors")) == set(texts)
    assert len(read_statistics(tmp_path / "base_dataset_statistics.json").actions_low) == 7
    policy = load_policy(tmp_path / "base.pt", suite=suite, tokenizer=tmp_path / "wan", settings=SETTINGS)
    assert policy.get_action({**{f"{camera}_image": np.zeros((256, 256, 3), np.uint8) for camera in policy.spec.cameras},
                              "proprio": np.zeros(9)}, text).actions.shape == (16 if suite == "libero" else 32, 7)


SETTINGS = {name.replace("-", "_"): int(value) for name, value in public.WIDTH.items()}


@pytest.mark.slow
def test_aloha_is_trained_on_videos_and_deployed_with_a_planning_checkpoint(run, tmp_path):
    """ALOHA.md: `scripts.train` on the preprocessed data; `deploy` with a policy and a planning model."""
    folder = tmp_path / "ALOHA-Cosmos-Policy" / "preprocessed"
    public.aloha(folder / "fold_shirt" / "train")
    t5 = public.embeddings(folder / "t5_embeddings.pkl", ["fold shirt"])
    settings = new_run("aloha", public.vae(tmp_path / "wan"), t5)
    run("replay", "import", "--name", "aloha", "--format", "aloha", folder, "--instruction", "fold shirt", *settings)
    video = public.weights(tmp_path / "model-480p-16fps.pt", 5)
    run("pretrain", "--name", "aloha", "--init", video, "--pretrain-steps", "2", *TRAINING)
    run("export", "--name", "aloha", "--checkpoint", "base", "--to", tmp_path / "policy" / "aloha.pt")
    judge = release(tmp_path / "planning", "aloha", ["fold shirt"], seed=7)
    run("import", "--name", "aloha", "--as", "planning", "--weights", judge["weights"], "--statistics", judge["statistics"])
    folder = tmp_path / "runs" / "aloha" / "checkpoints"
    assert read_description(folder / "planning")[2]["stage"] == "import"
    frame = np.zeros((480, 640, 3), np.uint8)
    observation = {"primary_image": frame, "left_wrist_image": frame, "right_wrist_image": frame, "proprio": np.zeros(14),
                   "task_description": "fold shirt"}
    own = load_policy(folder / "base", planning=folder / "planning", candidates=2).get_action(observation)
    files = load_policy(tmp_path / "policy" / "aloha.pt", suite="aloha", tokenizer=tmp_path / "wan", candidates=2,
                        planning=judge["weights"], settings=SETTINGS).get_action(observation)
    assert own.actions.shape == (50, 14) and np.array_equal(own.actions, files.actions) and own.value == files.value
    assert load_checkpoint(folder / "base")[0].spec.chunk == 50
