"""What every stage that acts in the simulator shares: the pool and its workers, the tickets of rollouts, the planning network."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cosmos_ray.asks import more_actors_ask, pool_ask, workers_ask
from cosmos_ray.config.acting import JUDGED
from cosmos_ray.errors import ConfigError
from cosmos_ray.inference.pool import InferencePool
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.places import Ask
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.rollout.actor import RolloutActor
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.fleet import Fleet, run_tickets
from cosmos_ray.rollout.ticket import EpisodeTicket, Finished, rollout_noise_seed, task_and_state
from cosmos_ray.rounds import Rounds
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed

IMPORTED_PLANNING = "planning_initial"  #: checkpoint of an imported planning network, which stays when `refine` trains `planning` from it


@contextlib.contextmanager
def acting_fleet(run: Run, checkpoint: Path, *beside: Ask) -> Iterator[tuple[InferencePool, Fleet]]:
    """An inference pool that serves ``checkpoint``, and the rollout workers that query the pool; both stop at the end.

    Processes ``beside`` them will share the cluster. ConfigError when the policy does not fit the simulation.
    """
    config = run.config
    actors, workers = pool_ask(config), workers_ask(config, config.rollout.workers)
    run.placement.reserve(actors, *beside, workers)
    pool = run.pool(checkpoint)
    try:
        one_thread = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
        crew = run.placement.crew(workers, lambda i, options: RolloutActor.options(**options, **one_thread).remote(
            config, str(run.folder.replay), pool.actors, i))
        fleet = Fleet(crew, RayCalls(), config.rollout.workers, config.rollout.envs_per_worker, lambda ticket: (ticket.key.name,),
                      config.rollout.deadline_s, run.supervisor, kind_of=lambda ticket: ticket.key.task)
        try:
            pool.start()  # while the workers start, too
            yield pool, fleet
        finally:
            fleet.close()
    finally:
        pool.close()
        for ask in (actors, more_actors_ask(config), workers):
            run.placement.leave(ask)


def run_episodes(run: Run, pool: InferencePool, fleet: Fleet, tickets: list[EpisodeTicket],
                 show: Callable[[int, int], None]) -> tuple[int, int]:
    """Run ``tickets`` to their end while the pool is looked after; returns how many ran and how many succeeded.

    ``show`` gets both counts, once a second or more often.
    """
    ran = wins = 0

    def take(finished: list[Finished]) -> None:
        nonlocal ran, wins
        ran, wins = ran + len(finished), wins + sum(episode.success for episode in finished)
        run.quarantine.take(fleet.quarantined, (ticket.key for ticket in tickets))
        pool.poll()
        show(ran, wins)

    while not pool.holders:  # a request for what no actor holds yet would only be refused
        pool.poll()
        time.sleep(0.05)
    run_tickets(fleet, tickets, take)
    return ran, wins


def newest(run: Run) -> str:
    """Name of the checkpoint that acts where none is named: the refined policy, or the base policy while there is none."""
    return "refined" if run.folder.has_policy("refined") else "base"


def asked_policy(run: Run, checkpoint: str | None, number: int | None) -> tuple[str, Path]:
    """Name and folder of the checkpoint that a command asks for, by name and by round: by default the newest policy. ConfigError for a
    round that is not kept, and for one with a checkpoint that no round trains."""
    if number is None:
        return (name := checkpoint or newest(run)), run.folder.checkpoint(name)
    name, networks = checkpoint or "refined", Rounds(run.folder).networks(number)
    if name not in networks:
        raise ConfigError(f"round {number} has no checkpoint {name!r}, it has {' and '.join(networks)}: leave --checkpoint or --round out")
    return name, networks[name]


def planning_network(run: Run, policy: str = "refined", number: int | None = None) -> Path | None:
    """The checkpoint of the network that plans for checkpoint ``policy`` ("base" or "refined"); None where the policy plans for itself.

    A trained planning network plans for the refined policy if the settings ask for one and both were trained from the same base policy. In
    a run with an imported planning network, that network plans for both policies, until further training from the present base policy
    replaces it. ``number`` asks for the networks of a round, which the run keeps. The path is absolute.
    """
    folder = run.folder
    networks = {name: folder.checkpoint(name) for name in (policy, "planning") if folder.has_policy(name)}
    if number is not None:
        networks = Rounds(folder).networks(number)
    if policy not in networks:
        return None
    has_imported = folder.has_policy(IMPORTED_PLANNING)
    if has_imported or policy == "refined" and run.config.planning_steps:
        _, version, info = read_description(networks[policy])
        base = version if policy == "base" else info.get("base_version")
        if "planning" in networks and read_description(networks["planning"])[2].get("base_version") == base:
            return networks["planning"].resolve()
    return folder.checkpoint(IMPORTED_PLANNING).resolve() if has_imported else None


def planning_checkpoint(run: Run, policy: str, number: int | None = None) -> str:
    """:func:`planning_network` as requests name it; "" too where the planner's rank asks no planning network."""
    return str(planning_network(run, policy, number) or "") if run.config.planner.rank_by in JUDGED else ""


def rollout_ticket(run: Run, index: int, attempt: int = 0) -> EpisodeTicket:
    """The run's rollout episode number ``index``; ``attempt`` tells policies apart that meet the same initial state."""
    config = run.config
    task, state = task_and_state(config.sim.names, index)
    seed = state_seed("rollout", config.seed, state)
    key = EpisodeKey(run.folder.identity.key, task, "rollout", seed, attempt)
    return EpisodeTicket(key, noise_seed=rollout_noise_seed(seed), action_noise=config.rollout.action_noise,
                         chunk_noise=config.rollout.chunk_noise, horizon=config.rollout.horizon,
                         frame_stride=config.replay.rollout_frame_stride, arm="rollout")
