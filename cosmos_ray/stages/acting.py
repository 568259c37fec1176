"""What every stage that acts in the simulator shares: the worker fleet, the tickets of rollouts, and who judges candidates."""

from __future__ import annotations

from pathlib import Path

from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.rollout.actor import RolloutActor
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import EpisodeTicket, state_seed
from cosmos_ray.run import Run
from cosmos_ray.seeds import mix_seed


def start_fleet(run: Run, pool: InferencePool, cpus: float) -> Fleet:
    """Rollout workers that query ``pool``."""
    config = run.config
    options = {"num_cpus": cpus, "scheduling_strategy": "SPREAD", "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return Fleet(lambda i: RolloutActor.options(**options).remote(config, str(run.folder.replay), pool.actors, i),
                 config.rollout.workers, config.rollout.envs_per_worker, lambda ticket: (ticket.key.name,), config.rollout.deadline_s)


def planning_network(run: Run, suffix: str = "") -> Path | None:
    """Where the checkpoint of the network that only plans is, resolved, if the settings have one and it began from the same base as the
    refined policy; with ``suffix`` "_before", of those that the present round began from."""
    paths = [run.folder.checkpoint(name + suffix) for name in ("planning", "refined")]
    if not run.config.planning_steps or not all((path / "policy.json").exists() for path in paths):
        return None
    planning, refined = (read_description(path)[2].get("base_version") for path in paths)
    return paths[0].resolve() if planning == refined else None


def rollout_ticket(run: Run, index: int, attempt: int = 0) -> EpisodeTicket:
    """The run's rollout episode number ``index``; ``attempt`` tells policies apart that meet the same initial state."""
    config = run.config
    seed = state_seed("rollout", config.seed, index)
    key = EpisodeKey(config.name, config.sim.task, "rollout", seed, attempt)
    return EpisodeTicket(key, noise_seed=mix_seed(seed, 11), action_noise=config.rollout.action_noise,
                         chunk_noise=config.rollout.chunk_noise, horizon=config.rollout.horizon,
                         frame_stride=config.replay.rollout_frame_stride, arm="rollout")
