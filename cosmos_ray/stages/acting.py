"""What every stage that acts in the simulator shares: the worker fleet and the tickets of policy episodes."""

from __future__ import annotations

from cosmos_ray.fleet import Fleet
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.replay.episode import EpisodeKey
from cosmos_ray.rollout.actor import RolloutActor
from cosmos_ray.rollout.ticket import EpisodeTicket, state_seed
from cosmos_ray.run import Run
from cosmos_ray.seeds import mix_seed


def start_fleet(run: Run, pool: InferencePool, cpus: float) -> Fleet:
    """Rollout workers that query ``pool``."""
    config = run.config
    options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return Fleet(lambda i: RolloutActor.options(**options).remote(config, str(run.folder.replay), pool.actors, i),
                 config.rollout.workers, config.rollout.envs_per_worker, lambda ticket: (ticket.key.name,), config.rollout.deadline_s)


def rollout_ticket(run: Run, index: int) -> EpisodeTicket:
    """The run's rollout episode number ``index``."""
    config = run.config
    seed = state_seed("rollout", config.seed, index)
    key = EpisodeKey(config.name, config.sim.task, "rollout", seed)
    return EpisodeTicket(key, noise_seed=mix_seed(seed, 11), action_noise=config.rollout.action_noise,
                         chunk_noise=config.rollout.chunk_noise, horizon=config.rollout.horizon,
                         frame_stride=config.replay.rollout_frame_stride, arm="rollout")


def round_tickets(run: Run, number: int) -> tuple[list[EpisodeTicket], list[EpisodeTicket]]:
    """Rollouts of round ``number`` (from 1) of refinement: those before its training, and those beside it."""
    before, beside = run.config.rollouts, run.config.refine_rollouts
    first = (number - 1) * (before + beside)
    tickets = [rollout_ticket(run, first + i) for i in range(before + beside)]
    return tickets[:before], tickets[before:]
