"""Episodes of a policy: successes and failures, with returns, into the replay store."""

from __future__ import annotations

from pathlib import Path

from cosmos_ray.rollout.ticket import EpisodeTicket
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import rollout_ticket, start_fleet


def rollout(run: Run) -> dict:
    """Act with checkpoint ``base`` until the store holds ``config.rollouts`` of the run's rollouts."""
    return act(run, "rollout", run.folder.checkpoint("base"), [rollout_ticket(run, i) for i in range(run.config.rollouts)])


def act(run: Run, what: str, checkpoint: Path, wanted: list[EpisodeTicket]) -> dict:
    """Act with ``checkpoint`` until the store holds all episodes that are ``wanted``; ``what`` names the progress line."""
    store = run.folder.store()
    tickets = [t for t in wanted if t.key.name not in store]
    total, done, abandoned = len(wanted), len(wanted) - len(tickets), 0
    if tickets:
        cpus = run.cpu_share(run.config.rollout.workers + run.config.inference.actors)
        pool = run.pool(checkpoint, cpus)
        try:
            if tickets[0].planner:
                pool.load(checkpoint, tickets[0].version, tickets[0].judge)
            fleet = start_fleet(run, pool, cpus)
            try:
                fleet.submit(tickets)
                progress, wins = run.progress(what, total, done, "episodes"), 0
                ran = 0
                while fleet.outstanding:
                    for episode in fleet.poll(timeout=1.0):
                        ran, wins = ran + 1, wins + episode.success
                    pool.repair()
                    progress.update(done + ran, f"{wins}/{ran} succeeded")
                progress.finish(done + ran, f"{wins}/{ran} succeeded")
                abandoned = len(fleet.abandoned)
            finally:
                fleet.close()
        finally:
            pool.close()
        store.refresh()
    names = {t.key.name for t in wanted}
    have = [s for s in store.summaries() if s.name in names]
    result = {"episodes": len(have), "new": len(tickets), "successes": sum(s.success for s in have), "abandoned": abandoned}
    if tickets:
        run.tracker.log("rollout", **result)
    return result
