"""Scripted demonstrations, in parallel workers, into the replay store."""

from __future__ import annotations

from cosmos_ray.asks import workers_ask
from cosmos_ray.errors import SimulationError
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.rollout.actor import DemonstratorActor
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.demonstrator import failure_key
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import state_seed
from cosmos_ray.run import Run
from cosmos_ray.sim.experts import check_expert


def collect(run: Run) -> dict:
    """Record demonstrations until the store holds ``config.demos`` successes. Continues where an earlier call stopped."""
    config, store = run.config, run.folder.store()
    task = config.sim.task
    have = sum(s.episode_class == "demo" and s.task == task for s in store.summaries())
    started, tried, failed = have, 0, 0
    if have >= config.demos:
        return {"demonstrations": have, "new": 0, "failed": 0}
    check_expert(config.sim)
    progress = run.progress("collect", config.demos, have, "demos")
    ask = workers_ask(config, min(config.rollout.workers, config.demos - have), "demonstrators")
    run.placement.reserve(ask)
    crew = run.placement.crew(ask, lambda i, options: DemonstratorActor.options(**options).remote(config, str(run.folder.replay)))
    fleet = Fleet(crew, RayCalls(), ask.count, capacity=2, name_of=lambda key: (key.name, failure_key(key).name),
                  deadline_s=config.rollout.deadline_s, supervisor=run.supervisor, who="demonstrator")
    index, submitted = 0, list[EpisodeKey]()
    try:
        while have < config.demos:
            while fleet.outstanding < min(fleet.capacity, config.demos - have):
                key = EpisodeKey(run.folder.identity.key, task, "demo", state_seed("demo", config.seed, index))
                index += 1
                if key.name not in store and failure_key(key).name not in store and key not in run.quarantine:
                    submitted.append(key)
                    fleet.submit([key])
            for done in fleet.poll(timeout=1.0):
                tried, have, failed = tried + 1, have + done.success, failed + (not done.success)
            run.quarantine.take(fleet.quarantined, submitted)
            if tried >= 30 and failed > 0.9 * tried:
                raise SimulationError(f"the scripted expert failed {failed} of {tried} episodes of {task}: is sim.horizon too short, or "
                                      "sim.placement too wide?")
            progress.update(have, f"{failed} failed")
    finally:
        fleet.close()
        run.placement.leave(ask)
    progress.finish(have, f"{failed} failed")
    result = {"demonstrations": have, "new": have - started, "failed": failed, "workers_replaced": fleet.replaced}
    run.tracker.log("collect", **result)
    return result
