"""Episodes of a policy: successes and failures, with returns, into the replay store."""

from __future__ import annotations

from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import planning_network, rollout_ticket, round_indices, start_fleet


def rollout(run: Run, number: int = 1) -> dict:
    """Act until the store holds the ``config.rollouts`` rollouts of round ``number``: with checkpoint ``base`` in the first, with
    ``refined`` as the round before left it in later ones, which may plan."""
    store, checkpoint = run.folder.store(), run.folder.checkpoint("base" if number == 1 else "refined")
    version, judge, planner = None, None, None
    if number > 1 and run.config.rollout.planned:
        version, judge, planner = read_description(checkpoint)[1], planning_network(run), run.config.planner
    wanted = [rollout_ticket(run, i, planner, version, judge) for i in round_indices(run, number)[0]]
    tickets = [t for t in wanted if t.key.name not in store]
    total, done, abandoned = len(wanted), len(wanted) - len(tickets), 0
    if tickets:
        cpus = run.cpu_share(run.config.rollout.workers + run.config.inference.actors)
        pool = run.pool(checkpoint, cpus)
        try:
            if planner:
                pool.load(checkpoint, version, judge or "")
            fleet = start_fleet(run, pool, cpus)
            try:
                fleet.submit(tickets)
                progress, wins = run.progress(run.of_round("rollout", number), total, done, "episodes"), 0
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
        run.tracker.log("rollout", round=number, **result)
    return result
