"""Episodes of the base policy: successes and failures, with returns, into the replay store."""

from __future__ import annotations

from cosmos_ray.run import Run
from cosmos_ray.stages.acting import own_rollouts, rollout_ticket, start_fleet


def rollout(run: Run) -> dict:
    """Act with checkpoint ``base`` until the store holds ``config.rollouts`` of the run's rollouts."""
    config, store = run.config, run.folder.store()
    tickets = [t for t in (rollout_ticket(run, i) for i in range(config.rollouts)) if t.key.name not in store]
    done = config.rollouts - len(tickets)
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
            finally:
                fleet.close()
        finally:
            pool.close()
        store.refresh()
    own = own_rollouts(run, store)
    result = {"episodes": len(own), "new": len(tickets), "successes": sum(s.success for s in own)}
    run.tracker.log("rollout", **result)
    return result
