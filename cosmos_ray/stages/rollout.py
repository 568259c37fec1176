"""Episodes of the base policy: successes and failures, with returns, into the replay store."""

from __future__ import annotations

from cosmos_ray.run import Run
from cosmos_ray.stages.acting import rollout_ticket, start_fleet


def rollout(run: Run) -> dict:
    """Act with checkpoint ``base`` until the store holds ``config.rollouts`` of the run's rollouts."""
    config, store = run.config, run.folder.store()
    wanted = [rollout_ticket(run, i) for i in range(config.rollouts)]
    tickets = [t for t in wanted if t.key.name not in store]
    done, abandoned = config.rollouts - len(tickets), 0
    if tickets:
        cpus = run.cpu_share(config.rollout.workers + config.inference.actors)
        pool = run.pool(run.folder.checkpoint("base"), cpus)
        try:
            fleet = start_fleet(run, pool, cpus)
            try:
                fleet.submit(tickets)
                progress, wins = run.progress("rollout", config.rollouts, done, "episodes"), 0
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
