"""From files to a policy: the run that `replay import` makes, and what works with it, as a newcomer types it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from cosmos_ray.commands.cli import main
from cosmos_ray.config import RunConfig, SimConfig
from cosmos_ray.config.stored import stored_config
from cosmos_ray.errors import ConfigError
from cosmos_ray.folder import RunFolder
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.sampling.demonstrated import demonstrated
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.sim.demonstration import CLEAN, demonstrate
from cosmos_ray.sim.environment import Environment
from tests import test_command_line
from tests.conftest import ROOT, environment
from tests.test_replay_episode import make_episode
from tests.test_replay_exchange import write_libero

handlers = test_command_line.handlers  # the fixture that puts the signal handler back

CASES = Path(__file__).parent / "data" / "cases"
SAID = "pick up the cube"


@pytest.fixture(scope="module")
def lift(tmp_path_factory) -> Path:
    """Three demonstrations of Lift from the real simulator, in robomimic's format, with the environment that recorded them."""
    env = Environment(SimConfig(actions="pose", image_size=32, instruction=SAID))
    path = tmp_path_factory.mktemp("files") / "lift.hdf5"
    arguments = {"robots": ["Panda"], "control_freq": 20, "controller_configs": {"type": "OSC_POSE"}, "camera_heights": 32}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "env_version": "1.4.1", "type": 1, "env_kwargs": arguments})
        for number in range(3):
            done = demonstrate(env, number, CLEAN)
            assert done.success
            demo, steps = data.create_group(f"demo_{number}"), done.length
            obs = demo.create_group("obs")
            frames, proprio = np.stack([done.frames[t] for t in range(steps)]), np.stack(done.proprio[:steps])
            for index, camera in enumerate(env.cameras):
                obs[f"{camera}_image"] = frames[:, index]
            obs["robot0_gripper_qpos"], obs["robot0_eef_pos"], obs["robot0_eef_quat"] = np.split(proprio, (2, 5), axis=1)
            demo["actions"], demo["states"] = np.stack(done.actions), np.stack(done.states[:steps])
            demo["rewards"] = demo["dones"] = np.eye(steps)[-1]
    env.close()
    return path


def importing(root: Path, *paths: Path, format: str = "robomimic", name: str = "lift", flags=()) -> list[str]:
    return ["replay", "import", *map(str, paths), "--format", format, "--root", str(root), "--name", name, "--quiet", *flags]


def settings_of(root: Path, name: str = "lift") -> RunConfig:
    config = stored_config(RunConfig(root=str(root), name=name))
    assert config is not None
    return config


def line_of(capfd, arguments: list[str], code: int = 2) -> str:
    """The one line on stderr of a command that is refused."""
    capfd.readouterr()
    assert main(arguments) == code
    out, err = capfd.readouterr()
    assert out == "" and len(err.splitlines()) == 1, err
    return err


def run(root: Path, command: str, *flags: str, name: str = "lift", code: int = 0) -> str:
    """A command in a process of its own, for the Ray that it starts; its standard output, its standard error where it is refused."""
    done = subprocess.run([sys.executable, "-m", "cosmos_ray", command, "--root", str(root), "--name", name, *flags], cwd=ROOT,
                          env=environment(), capture_output=True, text=True, timeout=1100)
    assert done.returncode == code, f"{command} exited with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stderr if code else done.stdout


# ---------------------------------------------------------------- the run that an import makes


def test_an_import_makes_the_run_with_the_simulation_that_the_file_names(lift, tmp_path, capfd):
    assert main(importing(tmp_path, lift, flags=["--instruction", SAID, "--pretrain-steps", "7"])) == 0
    out = capfd.readouterr().out
    assert f"simulation of run lift: Lift with Panda under OSC_POSE, told '{SAID}'" in out and "name no controller" not in out
    assert "--sim.quality full" in out
    config = settings_of(tmp_path)
    assert (config.sim.task, config.sim.actions, config.sim.control_freq, config.sim.image_size) == ("Lift", "pose", 20, 32)
    assert config.sim.cameras == ("robot0_eye_in_hand", "agentview") and config.sim.instruction == SAID
    assert config.pretrain_steps == 7 and config.model.image_size == 64
    stored = (tmp_path / "lift" / "config.json").read_bytes()
    assert main(importing(tmp_path, lift, flags=["--instruction", SAID, "--pretrain-steps", "7"])) == 0  # again: the same run
    assert "3 of them were there before" in capfd.readouterr().out
    assert (tmp_path / "lift" / "config.json").read_bytes() == stored and len(ReplayStore(tmp_path / "lift" / "replay").refresh()) == 3


def test_a_controller_that_the_files_do_not_name_is_said(lift, tmp_path, capfd):
    silent = tmp_path / "silent.hdf5"
    shutil.copy(lift, silent)
    with h5py.File(silent, "a") as file:
        file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "env_kwargs": {"robots": ["Panda"], "control_freq": 20}})
    assert main(importing(tmp_path, silent, flags=["--instruction", SAID])) == 0
    assert "the files name no controller: OSC_POSE with actions of pose is taken" in capfd.readouterr().out


@pytest.mark.parametrize("format, back, flags", [("lerobot", "lerobot", ["--frames", "image"]), ("cosmos-demos", "robomimic", [])])
def test_what_we_export_names_its_simulation(tmp_path, capfd, format, back, flags):
    """Three numbers and the gripper, of another arm than the default: both are known again."""
    env = Environment(SimConfig(robots=("Sawyer",), image_size=32))
    store = ReplayStore(tmp_path / "store")
    trajectory = demonstrate(env, 0, CLEAN)
    key = EpisodeKey("other", "Lift", "demo", 0)
    store.commit(Episode.from_trajectory(trajectory, key, policy_version=-1, info={"fingerprint": env.fingerprint, "control_freq": 20}))
    env.close()
    out = tmp_path / "out"
    assert trajectory.success
    assert main(["replay", "export", "--store", str(store.root), "--format", format, *flags, "--to", str(out), "--quiet"]) == 0
    paths = [out] if back == "lerobot" else list(out.rglob("*.hdf5"))
    assert main(importing(tmp_path, *paths, format=back)) == 0
    sim = settings_of(tmp_path).sim
    assert (sim.task, sim.robots, sim.actions, sim.cameras) == ("Lift", ("Sawyer",), "position", ("robot0_eye_in_hand", "agentview"))


def test_two_imports_come_together_in_one_run(tmp_path):
    for number, name in enumerate(("open_the_drawer_demo", "close_the_drawer_demo")):
        write_libero(tmp_path / f"{name}.hdf5", demos=number + 1)
        assert main(importing(tmp_path, tmp_path / f"{name}.hdf5", flags=["--instruction", name.replace("_", " ")])) == 0
    store = ReplayStore(tmp_path / "lift" / "replay")
    store.update()
    known = demonstrated(store)
    assert known.instructions == {"open the drawer demo": 1, "close the drawer demo": 2} and len({s.task for s in store.summaries()}) == 2
    assert settings_of(tmp_path).sim.task == ""  # LIBERO's tasks are none of robosuite's


def test_a_run_without_a_simulation_says_what_would_give_one(tmp_path, capfd):
    write_libero(tmp_path / "open_the_drawer_demo.hdf5")
    assert main(importing(tmp_path, tmp_path / "open_the_drawer_demo.hdf5")) == 0
    assert "has no simulation: `pretrain` and `export` work" in capfd.readouterr().out
    for command in ("rollout", "evaluate", "plan", "audit", "refine", "collect", "demo"):
        assert "run 'lift' has no simulation" in line_of(capfd, [command, "--root", str(tmp_path), "--name", "lift"])
    line = line_of(capfd, ["collect", "--root", str(tmp_path), "--name", "new", "--model.suite", "aloha"])
    assert "run 'new' has no simulation, for neither its settings nor its demonstrations name a robosuite task that fits" in line
    where = ["--root", str(tmp_path), "--name", "lift", "--sim.task"]
    line = line_of(capfd, ["rollout", *where, "Lift", "--sim.actions", "pose"])
    assert "there is no base policy in" in line and "run `pretrain` first" in line
    assert settings_of(tmp_path).sim.horizon == 96  # that of Lift
    line = line_of(capfd, ["rollout", *where, "Wipe"])
    assert "the demonstrations of 7 numbers per action and 9 numbers of proprioception cannot be used in a simulation of 6 numbers" in line
    assert settings_of(tmp_path).sim.task == "Lift"  # what is refused is not kept


def test_a_run_that_recorded_something_keeps_its_simulation(tmp_path):
    config = RunConfig(root=str(tmp_path), name="run", demos=1, sim=SimConfig(image_size=32))
    RunFolder(config).close()
    run(tmp_path, "collect", "--demos", "1", "--rollout.workers", "1", name="run")
    assert main(["pretrain", "--root", str(tmp_path), "--name", "run", "--sim.placement", "0.1"]) == 2


@pytest.mark.parametrize("flags, complaint", [
    (["--sim.task", "Wipe"], "the demonstrations of 7 numbers per action .* cannot be used in a simulation of 6 numbers per action"),
    (["--model.suite", "aloha"], "suite 'aloha' sees the cameras left_wrist, right_wrist, primary, .* have robot0_eye_in_hand, agentview"),
    (["--model.chunk", "200"], "model.chunk = 200 actions of 7 numbers do not fit"),
    (["--model.preset", "huge"], "model.preset = 'huge' is not one of"),
    (["--sim.tusk", "Lift"], "unknown flag --sim.tusk; did you mean --sim.task?"),
    (["--recipe", "nothing"], "nothing"),
    (["--key", "action=actions"], "--key is of --format lerobot alone, and the files are read as --format robomimic: leave it out"),
])  # fmt: skip
def test_what_does_not_go_with_the_files_is_refused_before_there_is_a_run(lift, tmp_path, capfd, flags, complaint):
    assert re.search(complaint, line_of(capfd, importing(tmp_path / "runs", lift, flags=flags)))
    assert not list((tmp_path / "runs").glob("*"))


def test_a_file_that_cannot_be_read_leaves_no_run(tmp_path, capfd):
    (tmp_path / "broken.hdf5").write_bytes(b"no file")
    assert "cannot be read as HDF5" in line_of(capfd, importing(tmp_path / "runs", tmp_path / "broken.hdf5"))
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("where", ["--store", "--replay.store"])
def test_an_import_of_nothing_leaves_no_store(lift, tmp_path, where):
    new = ["--store"] if where == "--store" else ["--root", str(tmp_path / "runs"), "--name", "lift", "--replay.store"]
    command = ["replay", "import", str(lift), "--format", "robomimic", "--quiet", *new, str(tmp_path / "new")]
    assert main([*command, "--cameras", "nowhere"]) == 2 and not list(tmp_path.glob("*"))
    assert main(command) == 0 and len(ReplayStore(tmp_path / "new").refresh()) == 3  # the same place serves afterwards


def test_an_import_that_fails_leaves_another_s_new_run_alone(lift, tmp_path, monkeypatch):
    """Both begin before there is a run; the other has opened its store, and commits after this one has failed."""
    def fail(*_: object) -> None:
        others.append(ReplayStore(tmp_path / "lift" / "replay"))
        raise ConfigError("no")

    others: list[ReplayStore] = []
    monkeypatch.setattr("cosmos_ray.commands.data_run.check_chunk", fail)
    assert main(importing(tmp_path, lift)) == 2
    assert others[0].commit(make_episode()) and len(ReplayStore(tmp_path / "lift" / "replay", create=False).refresh()) == 1


def test_a_robot_that_the_simulation_does_not_have_leaves_the_run_without_one(lift, tmp_path, capfd):
    """The file's environment is known, and its cameras are not."""
    assert main(importing(tmp_path, lift, flags=["--rename-camera", "agentview=over_there"])) == 0
    out = capfd.readouterr().out
    assert "the files name the robosuite task Lift, and it is not simulated here: " in out and "over_there" in out
    assert settings_of(tmp_path).sim.task == ""


def test_cameras_of_another_name_are_named_on_both_sides(lift, tmp_path, capfd):
    """Two cameras each: by number alone they would fit, with a third-person picture where the wrist camera's belongs."""
    cameras = ["--rename-camera", "robot0_eye_in_hand=image", "agentview=image2"]
    line = line_of(capfd, importing(tmp_path, lift, flags=[*cameras, "--sim.task", "Lift", "--sim.actions", "pose"]))
    assert "cameras image, image2" in line and "cameras robot0_eye_in_hand, agentview" in line


def test_collect_without_an_expert_refuses_before_there_is_a_run(tmp_path, capfd):
    line = line_of(capfd, ["collect", "--root", str(tmp_path), "--name", "new", "--sim.task", "Wipe"])
    assert "no scripted expert" in line and not list(tmp_path.glob("*"))


# ---------------------------------------------------------------- on to a policy


def test_from_a_file_to_a_policy_that_acts(lift, tmp_path):
    small = ["--learner.batch-size", "4", "--rollout.workers", "1", "--rollout.envs-per-worker", "1"]
    assert main(importing(tmp_path, lift, flags=["--instruction", SAID])) == 0
    assert "base policy after 4 steps" in run(tmp_path, "pretrain", "--pretrain-steps", "4", *small)
    spec = read_description(tmp_path / "lift" / "checkpoints" / "base")[0]
    assert (spec.cameras, spec.action_dim, spec.proprio_dim, spec.control_freq) == (("robot0_eye_in_hand", "agentview"), 7, 9, 20)
    assert "1 rollouts" in run(tmp_path, "rollout", "--rollouts", "1", *small)
    assert "base" in run(tmp_path, "evaluate", "--eval-episodes", "1", *small)
    store = ReplayStore(tmp_path / "lift" / "replay")
    acted = [store.view(s.name) for s in store.refresh() if s.source != "demo"]
    assert len(acted) == 2 and all(view.instruction == SAID and view.cameras == spec.cameras for view in acted)
    assert "wrote" in run(tmp_path, "export", "--to", str(tmp_path / "policy.pt"))
    run(tmp_path, "report")
    assert "Lift" in (tmp_path / "lift" / "report.html").read_text()


def test_a_dataset_without_a_simulation_trains_exports_and_reports(tmp_path, handlers, capfd):
    data = next((CASES / "lerobot_camera_names").glob("*"))
    assert main(importing(tmp_path, data, format="lerobot")) == 0
    where = ["--root", str(tmp_path), "--name", "lift"]
    assert "there is no base policy" in line_of(capfd, ["refine", *where, "--refine-rollouts", "0"])
    run(tmp_path, "pretrain", "--pretrain-steps", "2", "--learner.batch-size", "4")
    spec = read_description(tmp_path / "lift" / "checkpoints" / "base")[0]
    assert (spec.cameras, spec.action_dim, spec.proprio_dim) == (("image", "image2"), 7, 8)
    assert "wrote" in run(tmp_path, "export", "--to", str(tmp_path / "policy.pt"))
    run(tmp_path, "report")
    assert json.loads((tmp_path / "lift" / "report.json").read_text())["arms"] == []
    assert "no simulation" in (tmp_path / "lift" / "report.html").read_text()
