"""Gymnasium both ways: our simulations as its environments, and its environments as our simulations, through a whole loop."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np
import psutil
import pytest

from cosmos_ray.config import PlannerConfig, RolloutConfig, RunConfig, SimConfig
from cosmos_ray.errors import ConfigError, SimulationError, StoreError
from cosmos_ray.inference.core import load_core
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActReply
from cosmos_ray.model.checkpoint import copy_checkpoint, load_checkpoint
from cosmos_ray.oracle.branch import Simulator
from cosmos_ray.replay.format.episode import Episode, EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.demonstrator import DemonstratorCore
from cosmos_ray.rollout.ticket import EpisodeTicket, SimulatorDied
from cosmos_ray.run import open_run
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.child import Limits, SimulatorChild
from cosmos_ray.sim.demonstration import demonstrate
from cosmos_ray.sim.experts import check_expert
from cosmos_ray.sim.gym.foreign import GymSimulation
from cosmos_ray.sim.make import make, validate
from cosmos_ray.sim.resimulate import config_from_fingerprint, resimulate
from cosmos_ray.sim.simulation import start
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.sim.state_render import StateRenderer
from cosmos_ray.stages.plan import plan_episode
from cosmos_ray.stages.training import make_initial_policy
from cosmos_ray.use import Use
from tests.test_robot_loop import finite_gradients

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'cosmos-ray[gym]', or make setup-dev")
pytest.importorskip("gymnasium_robotics", reason="make setup-dev installs gymnasium-robotics")

REACH = "gym:gymnasium_robotics:FetchReach-v4"
PICK = "gym:gymnasium_robotics:FetchPickAndPlace-v4"
SIM = SimConfig(task=REACH, expert="tests.fetch_expert:reach", horizon=16, image_size=32, third_cameras=("external_camera_0",))
CLOUD = "gym:tests.cloud_env:tests/Cloud-v0"


def chunk(length: int, d: int = 4) -> np.ndarray:
    return np.random.default_rng(5).uniform(-1, 1, (length, d)).astype(np.float32)


@pytest.fixture(scope="module")
def pick():
    env = make(SimConfig(task=PICK, image_size=32))
    yield env
    env.close()


def test_our_simulation_passes_the_checker_of_gymnasium():
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make("cosmos_ray.sim.gym:cosmos_ray/Lift-v0", image_size=32, horizon=30, render_mode="rgb_array")
    check_env(env.unwrapped)
    env.close()


def test_our_simulation_in_gymnasium_is_the_one_of_rollouts():
    env = gymnasium.make("cosmos_ray.sim.gym:cosmos_ray/Lift-v0", image_size=32, horizon=3)
    ours = make(SimConfig(image_size=32, horizon=3))
    observed, info = env.reset(seed=11)
    ours.reset(11)
    assert np.array_equal(observed["agentview"], ours.render()[1]) and info["seed"] == 11
    for action in chunk(3):
        observed, reward, terminated, truncated, info = env.step(action)
        ours.step(action)
        assert np.array_equal(observed["proprio"], ours.proprio()) and (reward, terminated, info["is_success"]) == (0.0, False, False)
    assert truncated and np.array_equal(observed["robot0_eye_in_hand"], ours.render()[0])
    env.close()
    ours.close()


def test_an_episode_is_the_same_wherever_it_is_drawn(pick):
    """Fetch reads poses that its own drawing renews, so that an episode which is drawn would go on differently from one that is not."""
    actions = chunk(12)
    often, seldom = start(pick, 7), None
    pick.execute(actions, often, tuple(range(1, 13)))
    other = make(pick.config)
    seldom = start(other, 7)
    other.execute(actions, seldom)
    assert all(map(np.array_equal, often.states, seldom.states)) and np.array_equal(often.frames[12], seldom.frames[12])
    other.restore(often.states[5])
    other.step(actions[5])
    assert np.array_equal(other.state(), often.states[6]) and np.array_equal(other.proprio(), often.proprio[6])
    assert np.array_equal(pick.render_state(often.states[4]), often.frames[4]) and np.array_equal(pick.state(), often.states[12])
    other.close()


def test_cameras_and_limits_are_those_of_the_environment(pick):
    assert (pick.action_dim, pick.proprio_dim, pick.control_freq, pick.restorable) == (4, 31, 25, True)
    with pytest.raises(ConfigError, match="has no camera 'agentview'.*render, head_camera_rgb, gripper_camera_rgb"):
        make(SimConfig(task=PICK, third_cameras=("agentview",)))
    trajectory = start(pick, 3)
    pick.execute(np.zeros((60, 4)), trajectory)
    assert trajectory.length == 50 and trajectory.timed_out  # sim.horizon is 200, the environment's own limit 50
    with pytest.raises(SimulationError, match="is over after 50 steps"):
        pick.step(np.zeros(4))


@pytest.mark.parametrize(("settings", "said"), [
    ({"task": "gym:Nothing-v4"}, "name the module that registers the environment too: gym:MODULE:Nothing-v4"),
    ({"task": REACH.replace("v4", "v9")}, r"It provides versioned environments: \[ `v1`, `v4` \]$"),
    ({"task": "gym:no_such_module:Some-v0"}, "module no_such_module cannot be imported"),
    ({"task": REACH, "controller": "JOINT_POSITION"}, "sim.controller is of robosuite"),
    ({"task": REACH, "placement": 0.1}, "sim.placement is of robosuite"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(settings, said):
    with pytest.raises(ConfigError, match=said):
        config = SimConfig(**settings)
        config.check()
        validate(config)


def test_discrete_actions_are_refused():
    with pytest.raises(ConfigError, match="a policy of this package gives a vector of real numbers"):
        make(SimConfig(task="gym:CartPole-v1"))


def test_a_seed_that_decides_nothing_is_refused():
    with pytest.raises(ConfigError, match="begins or goes on differently from the same seed"):
        make(SimConfig(task="gym:tests.cloud_env:tests/Dice-v0", third_cameras=("sky",)))


def test_the_whole_loop_runs_with_a_gymnasium_task(tmp_path):
    """Demonstrations of an expert of the user, training, a rollout, its repetition, a planned episode."""
    config = RunConfig(root=str(tmp_path), name="fetch", sim=SIM, planner=PlannerConfig(candidates=2, value_samples=1),
                       rollout=RolloutConfig(execute=8))
    with open_run(config, Use(needs_ray=False), quiet=True) as run:
        store = run.folder.store()
        worker = DemonstratorCore(Simulators([make(SIM)]), store)
        done = [worker.record(EpisodeKey("f", SIM.task, "demo", state_seed("demo", 0, index))) for index in range(2)]
        assert all(d.success for d in done)
        worker.simulators.close()
        make_initial_policy(run)
        initial = run.folder.checkpoint("initial")
        client = LocalClient(load_core(initial, config.inference, "cpu"))
        finite_gradients(run, load_checkpoint(initial)[0])
        core = RolloutCore(Simulators([make(SIM)]), store, client, steps=1)
        key = EpisodeKey("f", SIM.task, "rollout", state_seed("rollout", 0, 0))
        while not (finished := core.advance([EpisodeTicket(key, noise_seed=1, chunk_noise=0.3)], 1.0)):
            pass
        core.close()
        assert finished[0].length and not finished[0].invalid
        assert resimulate(store.read(key.name)).identical
        assert StateRenderer()(store.read(key.name), [0])
        copy_checkpoint(initial, run.folder.checkpoint("refined"))
        assert plan_episode(run).imagined[0].shape == (1, 64, 64, 3)


def test_actions_may_be_a_dictionary_and_texts_are_not_felt():
    plain, told = (make(SimConfig(task=f"gym:tests.cloud_env:tests/{name}-v0", third_cameras=("sky",))) for name in ("Cloud", "Told"))
    assert (told.action_dim, told.proprio_dim) == (plain.action_dim, plain.proprio_dim) == (2, 2)
    for env in (plain, told):
        env.reset(3)
        env.step(np.array([0.5, -1.0]))
    assert np.array_equal(plain.proprio(), told.proprio()) and np.array_equal(plain.render(), told.render())


def test_robocasa():
    pytest.importorskip("robocasa", reason="RoboCasa is on no package index and needs 10 GB of assets: docs/environments.md has the steps")
    env = make(SimConfig(task="gym:robocasa.wrappers.gym_wrapper:robocasa/PickPlaceCounterToCabinet", horizon=10,
                         wrist_cameras=("video.robot0_eye_in_hand",),
                         third_cameras=("video.robot0_agentview_left", "video.robot0_agentview_right")))  # fmt: skip
    trajectory = start(env, 0)
    env.execute(np.zeros((2, env.action_dim)), trajectory)
    assert trajectory.length == 2 and env.action_dim == 12 and trajectory.frames[2].shape == (3, 64, 64, 3)


def test_an_environment_without_a_state_says_so(tmp_path):
    config = SimConfig(task=CLOUD, third_cameras=("sky",), image_size=16, horizon=20)
    env = make(config)
    assert not env.restorable and env.state_dim == 3 and env.proprio_dim == 2
    with pytest.raises(SimulationError, match="begin its episode again by its seed"):
        env.restore(env.state())
    with pytest.raises(ConfigError, match="has no state that can be restored: `evaluate` works"):
        Simulator(env)
    trajectory = start(env, 4)
    env.execute(chunk(6, 2), trajectory)
    episode = Episode.from_trajectory(trajectory, EpisodeKey("c", CLOUD, "rollout", 4), policy_version=0,
                                      info={"fingerprint": env.fingerprint, "horizon": 20})
    again = resimulate(episode)
    assert again.identical and "proprioception: the environment has no state that can be restored, so it began again" in again.text()
    with pytest.raises(StoreError, match="has none that can be restored"):
        StateRenderer()(episode, [0])
    env.close()


def test_an_episode_without_a_state_begins_again_when_its_simulator_is_killed(tmp_path):
    config = SimConfig(task=CLOUD, third_cameras=("sky",), image_size=16, horizon=20)
    env = make(config)
    whole = start(env, 4)
    env.execute(chunk(20, 2), whole)
    child = SimulatorChild(config, 1, Limits())

    class Script:
        """Answers with the next actions of one chunk, and kills the child once, between two orders."""

        killed = False

        def submit(self, request):
            if request.proprio[0, 0] != whole.proprio[0][0] and not self.killed:
                self.killed = True
                os.kill(child.pid, signal.SIGKILL)
                while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)
            return request

        def result(self, request):
            step = next(i for i, p in enumerate(whole.proprio) if np.array_equal(p, request.proprio[0]))
            actions = chunk(20, 2)[None, step : step + 5]
            return ActReply(actions, np.zeros(1), np.zeros((1, 1)), np.zeros(1, int), 0, actions[:, None])

    client, store = Script(), ReplayStore(tmp_path)
    core = RolloutCore(child, store, client, steps=1)
    tickets, finished = [EpisodeTicket(EpisodeKey("c", CLOUD, "rollout", 4), noise_seed=1)], []
    while not finished or isinstance(finished[-1], SimulatorDied):
        finished += core.advance(tickets, 1.0)
        tickets = []
    assert not finished[-1].broken
    core.close()
    stored = store.read(store.keys()[0])
    assert client.killed and stored.length == whole.length and np.array_equal(stored.proprio, np.array(whole.proprio))
    env.close()


def test_a_file_does_not_decide_what_is_imported():
    made = GymSimulation(SimConfig(task=PICK, image_size=32))
    assert config_from_fingerprint(made.fingerprint).task == PICK
    made.close()
    with pytest.raises(ConfigError, match="name its run"):
        config_from_fingerprint({**made.fingerprint, "task": "gym:antigravity:Some-v0"})
    assert "antigravity" not in sys.modules


def test_an_expert_of_your_own_must_last_and_must_be_there():
    env = make(SimConfig(task=REACH, expert="tests.fetch_expert:soon_over", image_size=16))
    with pytest.raises(ConfigError, match="ended at step 1"):
        demonstrate(env, 1)
    env.close()
    for name, said in (("nowhere:f", "No module named"), ("tests.fetch_expert:f", "no function 'f'"), ("reach", "give MODULE:FUNCTION")):
        with pytest.raises(ConfigError, match=said):
            check_expert(SimConfig(task=REACH, expert=name))
    with pytest.raises(ConfigError, match="name an expert of your own"):
        check_expert(SimConfig(task=REACH))
