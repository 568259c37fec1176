"""What other people's HDF5 files say wrongly, on purpose or not, and which observation belongs to which state."""

import json

import h5py
import numpy as np
import pytest
import robosuite

from cosmos_ray.replay import ReplayStore
from cosmos_ray.replay.exchange.cosmos_hdf5 import export_rollouts, read_rollouts
from cosmos_ray.replay.exchange.importing import import_episodes
from cosmos_ray.replay.exchange.lerobot import export_lerobot
from cosmos_ray.replay.exchange.robomimic import read_demonstrations
from cosmos_ray.replay.format.codec import encode_jpeg
from tests.test_replay_episode import make_episode

STEPS = 8


def picture(t, size=16):
    return np.roll(np.linspace(0, 255, size * size * 3).reshape(size, size, 3), 5 * t, 0).astype(np.uint8)


def write_demo(path, seed=0, steps=STEPS, **datasets):
    """A robomimic file of one demonstration; ``datasets`` are added to it."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift"})
        demo = data.create_group("demo_0")
        obs = demo.create_group("obs")
        for name, width in (("robot0_gripper_qpos", 2), ("robot0_eef_pos", 3), ("robot0_eef_quat", 4)):
            obs[name] = rng.normal(size=(steps, width))
        obs["agentview_image"] = np.stack([picture(t) for t in range(steps)])
        demo["actions"], demo["states"] = rng.normal(size=(steps, 7)), rng.normal(size=(steps, 20))
        for name, values in datasets.items():
            demo[name] = values


def write_rollout(path, success=True, seed=0):
    with h5py.File(path, "w") as file:
        for view in ("primary", "wrist"):
            column = file.create_dataset(f"{view}_images_jpeg", (STEPS,), dtype=h5py.vlen_dtype(np.uint8))
            for t in range(STEPS):
                column[t] = np.frombuffer(encode_jpeg(picture(t)), np.uint8)
        file["proprio"], file["actions"] = np.ones((STEPS, 9)), np.full((STEPS, 7), seed)
        file.attrs["task_description"] = "do it"
        if success is not None:
            file.attrs["success"] = success


@pytest.fixture(scope="module")
def recorded():
    """Simulator states before each action of a real episode, and joint angles seen before and after it."""
    env = robosuite.make("Lift", robots="Panda", has_renderer=False, has_offscreen_renderer=False, use_camera_obs=False, ignore_done=True)
    env.reset()
    rng, states, before, after = np.random.default_rng(0), [], [], []
    seen = env._get_observations(force_update=True)
    for _ in range(STEPS):
        states.append(env.sim.get_state().flatten())
        before.append(seen["robot0_joint_pos"])
        seen = env.step(rng.uniform(-1, 1, env.action_dim))[0]
        after.append(seen["robot0_joint_pos"])
    return np.array(states), np.array(before), np.array(after)


@pytest.mark.parametrize("name", ["joint_states", "robot0_joint_pos"])
def test_observations_recorded_after_the_action_are_put_to_the_state_they_show(tmp_path, recorded, name):
    states, _, after = recorded
    path = tmp_path / "task_demo.hdf5"
    write_demo(path, **{f"obs/{name}": after, "rewards": np.eye(STEPS)[-1]})
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = states
        actions = file["data/demo_0/actions"][:].astype(np.float32)
    store = ReplayStore(tmp_path / "store")
    assert not import_episodes(read_demonstrations, path, store).skipped
    episode = store.read(store.keys()[0])
    # Observation i shows what action i led to, so between observations i and i + 1 lies action i + 1.
    assert np.array_equal(episode.actions, actions[1:]) and len(episode.frames) == STEPS
    assert np.array_equal(episode.states[:-1], states[1:]) and np.isnan(episode.states[-1]).all()
    assert episode.info["unrecorded_states"] == [STEPS - 1] and episode.rewards.tolist() == [0] * (STEPS - 2) + [1]


def test_observations_recorded_before_the_action_stay_where_they_are(tmp_path, recorded):
    states, before, _ = recorded
    path = tmp_path / "task_demo.hdf5"
    write_demo(path, **{"obs/joint_states": before})
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/states"]
        file["data/demo_0/states"] = states
        actions = file["data/demo_0/actions"][:].astype(np.float32)
    store = ReplayStore(tmp_path / "store")
    import_episodes(read_demonstrations, path, store)
    episode = store.read(store.keys()[0])
    assert np.array_equal(episode.actions, actions) and np.array_equal(episode.states[:-1], states)
    assert "unrecorded_states" not in episode.info


@pytest.mark.parametrize("rewards, dones, success", [
    (np.zeros(STEPS), np.eye(STEPS)[-1], False),  # robomimic's done at the end of every trajectory
    (np.eye(STEPS)[-1], np.zeros(STEPS), True),
    (np.full(STEPS, 0.4), np.eye(STEPS)[-1], False),  # shaped: it came near
    (np.linspace(0, 1, STEPS), None, True),
    (None, np.eye(STEPS)[-1], True), (None, np.zeros(STEPS), False), (None, None, True),
])  # fmt: skip
def test_success_is_what_the_reward_says_and_only_then_the_done(tmp_path, rewards, dones, success):
    path = tmp_path / "demo.hdf5"
    write_demo(path, **{name: values for name, values in (("rewards", rewards), ("dones", dones)) if values is not None})
    store = ReplayStore(tmp_path / "store")
    import_episodes(read_demonstrations, path, store)
    assert [s.success for s in store.summaries()] == [success]


def test_files_of_one_name_and_task_do_not_shadow_each_other(tmp_path):
    store = ReplayStore(tmp_path / "store")
    for seed, folder in enumerate(("ph", "mh")):
        (tmp_path / folder).mkdir()
        write_demo(tmp_path / folder / "image.hdf5", seed)
        write_rollout(tmp_path / folder / "episode_data--suite=s--task=1--ep=2--success=True--x.hdf5", seed=seed)
        assert import_episodes(read_demonstrations, tmp_path / folder / "image.hdf5", store).known == 0
    rollouts = ReplayStore(tmp_path / "rollouts")
    done = import_episodes(read_rollouts, [tmp_path / "ph", tmp_path / "mh"], rollouts)
    # The demonstrations' own files are in these folders too, and are no rollouts.
    assert (done.episodes, done.known, len(done.skipped)) == (2, 0, 2) and len(store) == len(rollouts) == 2


@pytest.mark.parametrize("said, named, outcome", [
    (True, "True", True), (False, "False", False), (None, "True", True), (None, "False", False), (True, "", True),
    (True, "False", "says otherwise"), (None, "", "does not say"), (7, "True", "neither true"), (np.ones(3), "True", "neither"),
])  # fmt: skip
def test_a_rollouts_success_is_in_its_name_or_inside_and_may_not_differ(tmp_path, said, named, outcome):
    path = tmp_path / ("episode_data--suite=s--ep=0" + (f"--success={named}" if named else "") + "--x.hdf5")
    write_rollout(path, said)
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_rollouts, path, store)
    if isinstance(outcome, bool):
        assert [s.success for s in store.summaries()] == [outcome]
    else:
        assert done.episodes == 0 and outcome in done.skipped[0][1] and "\n" not in done.skipped[0][1]


def spoil(file, how, other):
    demo = file["data/demo_0"]
    if how in ("wide picture", "many pictures"):
        del demo["obs/agentview_image"]
        shape, chunk = ((STEPS, 2**20, 2**20, 3), (1, 64, 64, 3)) if how == "wide picture" else ((2**40, 16, 16, 3), (1, 16, 16, 3))
        demo["obs"].create_dataset("agentview_image", shape, "u1", chunks=chunk)
        return
    del demo["states"]
    if how == "external storage":
        demo.create_dataset("states", (STEPS, 4), "f8", external=[(str(other), 0, STEPS * 4 * 8)])
    elif how == "virtual":
        layout = h5py.VirtualLayout((STEPS, 20), "f8")
        layout[:] = h5py.VirtualSource(str(other), "s", shape=(STEPS, 20))
        demo.create_virtual_dataset("states", layout)
    elif how == "soft link":
        file["away"] = h5py.ExternalLink(str(other), "/")
        demo["states"] = h5py.SoftLink("/away/s")
    elif how == "circle":
        demo["states"] = h5py.SoftLink("/data/demo_0/states")


@pytest.mark.parametrize("how, message", [
    ("wide picture", "pictures of up to"), ("many pictures", f"{2**40} rows, there are {STEPS} actions"),
    ("external storage", "leads to another file"), ("virtual", "leads to another file"), ("soft link", "is a link to /away/s"),
    ("circle", "is a link"),
])  # fmt: skip
def test_shapes_without_data_and_other_peoples_files_are_refused(tmp_path, how, message):
    other = tmp_path / "private.h5"
    with h5py.File(other, "w") as file:
        file["s"] = np.full((STEPS, 20), 7.0)
    path = tmp_path / "demo.hdf5"
    write_demo(path)
    with h5py.File(path, "r+") as file:
        file.copy("data/demo_0", "data/demo_1")
        spoil(file, how, other)
    store = ReplayStore(tmp_path / "store")
    done = import_episodes(read_demonstrations, path, store)
    assert done.episodes == 1 and [which for which, _ in done.skipped] == ["demo_0"] and message in done.skipped[0][1]


def test_exports_name_what_the_other_format_cannot_hold(tmp_path):
    store = ReplayStore(tmp_path / "store")
    store.commit(make_episode(0, size=32, task="a/b " + "c" * 300))
    one, two = make_episode(1, size=32), make_episode(2, size=32)
    one.cameras, one.frames = ("agentview",), {t: images[1:] for t, images in one.frames.items()}
    two.frames[4] = make_episode(2, size=64).frames[4]
    store.commit(one)
    store.commit(two)
    done = export_rollouts(store, store.summaries(), tmp_path / "hdf5", suite="libero_goal")
    assert done.episodes == 2 and "needs a third-person and a wrist camera" in done.skipped[0][1]
    assert all(path.name.startswith("episode_data--suite=libero_goal--") for path in (tmp_path / "hdf5").iterdir())
    done = export_lerobot(store, store.summaries(), tmp_path / "lerobot")
    assert done.episodes == 1 and sorted(why[:14] for _, why in done.skipped) == ["its pictures a", "its pictures, "]
