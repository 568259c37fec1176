"""One planned episode in detail: what was imagined, what happened, and the score of every candidate."""

from __future__ import annotations

import numpy as np
import torch

from cosmos_ray.config import RunConfig
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.core import load_core
from cosmos_ray.inference.local import LocalClient
from cosmos_ray.inference.messages import ActingPolicy, ActReply, ActRequest
from cosmos_ray.report.trace import EpisodeTrace
from cosmos_ray.rollout.ticket import decision_noise_seed, evaluation_noise_seed
from cosmos_ray.run import Run
from cosmos_ray.sim.make import make
from cosmos_ray.sim.simulation import start
from cosmos_ray.stages.acting import asked_policy, planning_checkpoint
from cosmos_ray.stages.evaluate import held_out


def plan_episode(run: Run, checkpoint: str | None = None, number: int | None = None) -> EpisodeTrace:
    """Run held-out episode ``config.plan_seed`` of a policy with best-of-N in this process, and keep every decision.

    ``checkpoint`` is "refined" or "base", by default the newest; ``number`` asks for the policy of a round. The planning network of the
    run, or of the round, plans for it, if there is one. The episode has the noise and the thread count of `evaluate`, so it equals the
    episode that `evaluate` stored for the policy's last planning arm.
    """
    config, (checkpoint, path) = run.config, asked_policy(run, checkpoint, number)
    if not (path / "policy.json").exists():
        raise ConfigError(f"there is no {checkpoint} policy to plan with: run `{'pretrain' if checkpoint == 'base' else 'refine'}` first")
    judge = planning_checkpoint(run, checkpoint, number)
    for network in filter(None, (path, judge)):
        run.check_policy(network)
    torch.set_num_threads(config.inference.threads)
    client = LocalClient(load_core(path, config.inference, "cuda" if config.inference.gpus else "cpu", judge))
    task, seed = held_out(run, config.plan_seed)
    env = make(next(sim for sim in config.sim.each() if sim.task == task))
    trajectory = start(env, seed)
    trace = EpisodeTrace(env.task, seed, env.cameras, config.planner.candidates)
    try:
        while not trajectory.done:
            reply = _decide(client, config, trajectory, decision_noise_seed(evaluation_noise_seed(seed), trajectory.length))
            trace.steps.append(trajectory.length)
            trace.observed.append(trajectory.frames[trajectory.length])
            env.execute(np.clip(reply.actions[0][: config.rollout.execute], -1, 1), trajectory)
            trace.imagined.append(reply.futures[0])
            trace.happened.append(trajectory.frames[trajectory.length])
            trace.scores.append(reply.scores[0].tolist())
            trace.chosen.append(int(reply.chosen[0]))
            trace.values.append(float(reply.values[0]))
    finally:
        env.close()
    trace.success, trace.length = trajectory.success, trajectory.length
    return trace


def _decide(client: LocalClient, config: RunConfig, trajectory, seed: int) -> ActReply:
    request = ActRequest(trajectory.frames[trajectory.length][None], trajectory.proprio[-1][None], (trajectory.instruction,),
                         np.array([seed]), config.inference.steps, ActingPolicy(planner=config.planner), decode_futures=True)
    return client.result(client.submit(request))
