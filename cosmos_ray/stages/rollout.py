"""Episodes of a policy: successes and failures, with returns, into the replay store."""

from __future__ import annotations

from pathlib import Path

from cosmos_ray.errors import ConfigError
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.retention import keep_newest
from cosmos_ray.rollout.ticket import EpisodeTicket, own_rollouts
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import acting_fleet, rollout_ticket, run_episodes


def rollout(run: Run) -> dict:
    """Act with checkpoint ``base`` until the store holds ``config.rollouts`` of the run's rollouts."""
    if not run.folder.has_policy("base"):
        raise ConfigError("there is no base policy to roll out: run `pretrain` first")
    return act(run, "rollout", run.folder.checkpoint("base"), [rollout_ticket(run, i) for i in range(run.config.rollouts)])


def act(run: Run, what: str, checkpoint: Path, wanted: list[EpisodeTicket]) -> dict:
    """Act with ``checkpoint`` until the store holds all ``wanted`` episodes. ``what`` names the progress line."""
    store = run.folder.store()
    wanted = [t for t in wanted if t.key not in run.quarantine]
    tickets = [t for t in wanted if t.key.name not in store]
    total, done, quarantined = len(wanted), len(wanted) - len(tickets), 0
    if tickets:
        with acting_fleet(run, checkpoint) as (pool, fleet):
            if tickets[0].acting.planner:
                pool.load(checkpoint, tickets[0].acting)
                pool.settle()
            progress = run.progress(what, total, done, "episodes")
            ran, wins = run_episodes(run, pool, fleet, tickets,
                                     lambda ran, wins: progress.update(done + ran, f"{wins}/{ran} succeeded"))
            progress.finish(done + ran, f"{wins}/{ran} succeeded")
            quarantined = len(fleet.quarantined)
        store.refresh()
    names = {t.key.name for t in wanted}
    have = [s for s in store.summaries() if s.name in names]
    result = {"episodes": len(have), "new": len(tickets), "successes": sum(s.success for s in have), "quarantined": quarantined}
    if tickets:
        run.tracker.log("rollout", **result)
        forget_old_rollouts(run, store)
    return result


def forget_old_rollouts(run: Run, store: ReplayStore) -> int:
    """Evict the run's rollouts that ``replay.keep_newest`` does not keep, of an up-to-date ``store``; returns how many."""
    replay = run.config.replay
    if not replay.keep_newest:
        return 0
    own = own_rollouts(store, run.folder.identity.key, run.config.sim.names)
    return keep_newest(store, own, replay.keep_newest, replay.keep_failures)
