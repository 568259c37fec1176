"""Scripted demonstrations, in parallel workers, into the replay store."""

from __future__ import annotations

from collections import Counter

from cosmos_ray.asks import workers_ask
from cosmos_ray.errors import SimulationError
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.rollout.actor import DemonstratorActor
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.demonstrator import failure_key
from cosmos_ray.rollout.fleet import Fleet
from cosmos_ray.rollout.ticket import demonstrations
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed
from cosmos_ray.sim.experts import check_expert


def collect(run: Run) -> dict:
    """Record demonstrations until the store holds ``config.demos`` successes, of each task its share. Continues where an earlier call
    stopped."""
    config, store = run.config, run.folder.store()
    held, lacking = demonstrations(store, config.sim.names, config.demos)
    have = started = held
    tried = failed = 0
    if not any(lacking.values()):
        return {"demonstrations": have, "new": 0, "failed": 0}
    for sim in config.sim.each():
        check_expert(sim)
    progress = run.progress("collect", config.demos, have, "demos")
    ask = workers_ask(config, min(config.rollout.workers, sum(lacking.values())), "demonstrators")
    run.placement.reserve(ask)
    crew = run.placement.crew(ask, lambda i, options: DemonstratorActor.options(**options).remote(config, str(run.folder.replay)))
    fleet = Fleet(crew, RayCalls(), ask.count, capacity=2, name_of=lambda key: (key.name, failure_key(key).name),
                  deadline_s=config.rollout.deadline_s, supervisor=run.supervisor, who="demonstrator", kind_of=lambda key: key.task)
    index, submitted = Counter[str](), list[EpisodeKey]()
    task_of: dict[str, str] = {}  #: by the names that a submitted demonstration may end under
    under_way = Counter[str]()
    try:
        while any(lacking.values()):
            given_up = Counter(task_of[name] for name in fleet.quarantined)
            for task, lack in lacking.items():
                while under_way[task] - given_up[task] < min(fleet.capacity, lack):
                    key = EpisodeKey(run.folder.identity.key, task, "demo", state_seed("demo", config.seed, index[task]))
                    index[task] += 1
                    if key.name not in store and failure_key(key).name not in store and key not in run.quarantine:
                        submitted.append(key)
                        task_of |= {key.name: task, failure_key(key).name: task}
                        under_way[task] += 1
                        fleet.submit([key])
            for done in fleet.poll(timeout=1.0):
                task = task_of[done.name]
                under_way[task] -= 1
                lacking[task] -= done.success
                tried, have, failed = tried + 1, have + done.success, failed + (not done.success)
            run.quarantine.take(fleet.quarantined, submitted)
            if tried >= 30 and failed > 0.9 * tried:
                raise SimulationError(f"the scripted expert failed {failed} of {tried} episodes of {config.sim.title}: is sim.horizon too "
                                      "short, or sim.placement too wide?")
            progress.update(have, f"{failed} failed")
    finally:
        fleet.close()
        run.placement.leave(ask)
    progress.finish(have, f"{failed} failed")
    result = {"demonstrations": have, "new": have - started, "failed": failed, "workers_replaced": fleet.replaced}
    run.tracker.log("collect", **result)
    return result
