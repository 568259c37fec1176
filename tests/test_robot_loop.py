"""Robots of other sizes than a Panda's through every part of the loop, in this process: random demonstrations, a policy of their sizes,
training steps, explored and planned rollouts, a repeated episode, the planned episode and its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cosmos_ray.config import PlannerConfig, RolloutConfig, RunConfig, SimConfig
from cosmos_ray.inference.core import load_core
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.learner.mixture import BatchSource, Mixture
from cosmos_ray.model.checkpoint import copy_checkpoint, load_checkpoint
from cosmos_ray.model.objective import Objective
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.sampling.sampler import WindowSampler
from cosmos_ray.report.episode_strip import save_episode
from cosmos_ray.report.filmstrip import save_filmstrip
from cosmos_ray.rollout.core import RolloutCore
from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.run import Run, open_run
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.environment import Environment
from cosmos_ray.sim.resimulate import resimulate
from cosmos_ray.sim.simulators import Simulators
from cosmos_ray.stages.plan import plan_episode
from cosmos_ray.stages.training import make_initial_policy
from cosmos_ray.use import Use
from tests.test_misfit import demonstrate

PLANNER = PlannerConfig(candidates=3, value_samples=1, spread=0.3)
CHUNK = 8

ROBOTS = {
    "joints of a UR5e": (SimConfig(robots=("UR5e",), controller="JOINT_POSITION", horizon=20), (7, 13)),
    "Wipe": (SimConfig(task="Wipe", horizon=20), (6, 7)),
    "Baxter": (SimConfig(task="TwoArmLift", robots=("Baxter",), horizon=20,
                         wrist_cameras=("robot0_right_eye_in_hand", "robot0_left_eye_in_hand")), (14, 18)),
    "PandaDexRH": (SimConfig(robots=("PandaDexRH",), actions="pose", horizon=20), (12, 19)),
    "two arms without grippers": (SimConfig(task="TwoArmPegInHole", robots=("Panda", "UR5e"), horizon=20), (12, 14)),
    "torques": (SimConfig(controller="JOINT_TORQUE", horizon=20), (8, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", [name if name == "Baxter" else pytest.param(name, marks=pytest.mark.slow) for name in ROBOTS])
def test_the_whole_loop_fits_the_robot(tmp_path, name):
    sim, sizes = ROBOTS[name]
    config = RunConfig(root=str(tmp_path), name="robot", sim=sim, planner=PLANNER, rollout=RolloutConfig(execute=CHUNK))
    with open_run(config, Use(needs_ray=False), quiet=True) as run:
        demonstrate(run, sim)
        make_initial_policy(run)
        initial = run.folder.checkpoint("initial")
        policy = load_checkpoint(initial)[0]
        assert (policy.spec.action_dim, policy.spec.proprio_dim) == sizes
        finite_gradients(run, policy)
        rolled_out(run, sim)
        copy_checkpoint(initial, run.folder.checkpoint("refined"))
        trace = plan_episode(run)
        assert len(trace.steps) == 3 and trace.imagined[0].shape == trace.happened[0].shape == (len(sim.cameras), 64, 64, 3)
        save_filmstrip(trace, tmp_path / "plan.png")


def finite_gradients(run: Run, policy) -> None:
    """Training batches of the store have the policy's sizes, and a loss with gradients that are finite."""
    sampler = WindowSampler(run.folder.store(), chunk=CHUNK, gamma=0.98, seed=0)
    batch = BatchSource(sampler, Mixture.base(run.config.learner, run.config.replay), 8).draw()
    loss, _ = Objective(policy.train()).loss(batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.net.parameters() if p.grad is not None)


def rolled_out(run: Run, sim: SimConfig) -> None:
    """An explored rollout and a planned one, stored, drawn and repeated bit for bit."""
    seed, store = state_seed("rollout", 0, 0), run.folder.store()
    client = LocalClient(load_core(run.folder.checkpoint("initial"), run.config.inference, "cpu"))
    core = RolloutCore(Simulators([Environment(sim)]), store, client, steps=1)
    explored, planned = (EpisodeKey("r", sim.task, "rollout", seed, attempt) for attempt in (0, 1))
    finished, tickets = [], [EpisodeTicket(explored, noise_seed=1, chunk_noise=0.3, action_noise=0.1),
                             EpisodeTicket(planned, noise_seed=1, acting=ActingPolicy(planner=PLANNER))]  # fmt: skip
    while len(finished) < 2:
        finished += core.advance(tickets, 1.0)
        tickets = []
    core.close()
    episode = store.read(explored.name)
    assert not episode.invalid and np.isfinite(episode.proprio).all() and len(episode.actions) == 20
    again = resimulate(episode)
    assert again.identical, again
    for ending in ("png", "mp4"):
        save_episode(store.read(planned.name), run.folder.path / f"episode.{ending}")
