"""A policy on every task of a suite: every task, initial state and noise seed once, as papers report it.

Episodes are in the store under keys that name the arm, a digest of everything that decides the outcome, the noise seed, the task and the
initial state. So the same command continues, another run starts from the same states, and results are counted from the store.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_ray.config import SimConfig, check
from cosmos_ray.config.libero import LIBERO_SUITES, PUBLISHED_STATES
from cosmos_ray.config.settings import SETTINGS
from cosmos_ray.errors import ConfigError, StoreError
from cosmos_ray.evidence import paired_with_interval
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.report.benchmark_page import write_benchmark_page
from cosmos_ray.report.episode_strip import save_episode
from cosmos_ray.report.settings_table import versions
from cosmos_ray.rollout.ticket import EpisodeTicket, evaluation_noise_seed
from cosmos_ray.run import Run
from cosmos_ray.seeds import mix_seed, state_seed
from cosmos_ray.sim import tasks
from cosmos_ray.stages.acting import newest
from cosmos_ray.stages.evaluate import Arm, arms, counted, play, refuse_seen

TRIALS = 50  #: initial states of each task, as published evaluations have them
SEEDS = (195, 196, 197)  #: noise seeds of the published evaluations
STATES_OF = 0  #: the seed of a run whose held-out initial states every run starts from here, so that two runs can be paired
VIDEO_STRIDE = 2  #: control steps between two frames of a video


@dataclass(frozen=True)
class Benchmark:
    """What is played."""

    suite: str
    tasks: tuple[str, ...] = ()  #: as ``sim.tasks``: empty is all
    trials: int = TRIALS
    seeds: tuple[int, ...] = SEEDS

    def check(self) -> None:
        """ConfigError for numbers that make no benchmark."""
        if self.trials < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"--trials {self.trials} and --seeds {','.join(map(str, self.seeds))}: give at least 1 trial, and seeds that "
                              "differ and are not negative")
        if self.suite in LIBERO_SUITES and self.trials > PUBLISHED_STATES:
            raise ConfigError(f"--trials {self.trials} is more than the {PUBLISHED_STATES} initial states that LIBERO publishes of a task")

    @property
    def states(self) -> list[int]:
        """Seeds of the initial states, which all tasks share."""
        return [state_seed("eval", STATES_OF, trial) for trial in range(self.trials)]


def benchmark(run: Run, asked: Benchmark, only: Sequence[str] = (), rounds: Sequence[int] = (), against: str | None = None,
              video: bool = False) -> dict[str, Any]:
    """Run what the store lacks, then count; written to ``suite_<suite>.json`` and, for readers, ``suite_<suite>.html``.

    ``only`` and ``rounds`` choose arms as for `evaluate`; by default the newest policy plays alone. Arms are paired with the first one,
    and the first one with that of the run ``against`` on the same states and noise. ``video`` writes ``videos/<suite>/<episode>.mp4``.

    ConfigError when the suite, the numbers or the runs do not go together.
    """
    asked.check()
    run = run.simulating(simulation(run, asked))
    for sim in run.config.sim.each():
        tasks.validate(sim)
    check(run.config)
    other = _other(run, against, asked) if against else None
    store, played = run.folder.store(), arms(run, only or [newest(run)], rounds)
    refuse_seen(store, set(asked.states))
    stride = VIDEO_STRIDE if video else 0
    todo = {arm: [ticket for ticket in _tickets(run, arm, asked, stride) if ticket.key.name not in store] for arm in played}
    if new := play(run, todo):
        store.refresh()
    out = results(run, store, asked, played)
    if other is not None:
        out["against"] = {"run": against, **_paired_runs(out, other)}
    file, page = f"suite_{asked.suite}.json", run.folder.results / f"suite_{asked.suite}.html"
    run.folder.write_json(file, out)
    write_benchmark_page(out, page)
    run.tracker.log("evaluate_suite", suite=asked.suite, **{f"{name}_successes": arm["successes"] for name, arm in out["arms"].items()})
    videos = run.folder.results / "videos" / asked.suite
    if video:
        _videos(run, store, [ticket for arm in played for ticket in _tickets(run, arm, asked)], videos)
    return {**out, "new": new, "page": str(page), "file": str(run.folder.path / file), "videos": str(videos)}


def simulation(run: Run, asked: Benchmark) -> SimConfig:
    """The suite as the run simulates it: its cameras, and its pictures and actions unless the run has no simulation. Every task has its
    own number of steps, unless the run is of this suite and gives another."""
    sim = run.config.sim
    kept = {item.name: getattr(sim, item.name) for item in dataclasses.fields(sim) if not SETTINGS[f"sim.{item.name}"].follows}
    if sim.names:
        kept |= {name: getattr(sim, name) for name in ("image_size", "actions", "quality", "mesh_cell")}
    return SimConfig(**{**kept, "task": "", "suite": asked.suite, "tasks": asked.tasks,
                        "horizon": sim.horizon if sim.suite == asked.suite else 0})


def _tickets(run: Run, arm: Arm, asked: Benchmark, frame_stride: int = 0) -> list[EpisodeTicket]:
    """Every noise seed, task and initial state, without quarantined states. Noise depends on both seeds alone: all arms draw the same."""
    out = []
    for noise in asked.seeds:
        for task in run.config.sim.names:
            for seed in asked.states:
                key = EpisodeKey(f"{arm.run_keys[task]}:seed {noise}", task, "eval", seed)
                if key not in run.quarantine:
                    out.append(EpisodeTicket(key, noise_seed=mix_seed(evaluation_noise_seed(seed), noise), acting=arm.acting,
                                             frame_stride=frame_stride, arm=arm.name))
    return out


def results(run: Run, store: ReplayStore, asked: Benchmark, played: Sequence[Arm]) -> dict[str, Any]:
    """Counts over all, by task and by noise seed of each arm, from the store, and what is needed to repeat them.

    ``outcomes`` of an arm are {"task, seed of the state, seed of the noise": 0 or 1}. StoreError when episodes are missing.
    """
    known = {s.name: s for s in store.summaries()}
    table: dict[str, dict] = {}
    fingerprints: dict[str, dict[str, str]] = {}
    for arm in played:
        tickets = _tickets(run, arm, asked)
        if missing := [t.key.name for t in tickets if t.key.name not in known]:
            raise StoreError(f"{len(missing)} of {len(tickets)} episodes of arm {arm.name!r} are not in the store, {missing[0]} first: run "
                             "the same command again")
        won = {(t.key.task, t.key.seed, int(t.key.run.rpartition(" ")[2])): known[t.key.name].success for t in tickets}
        if not won:
            raise StoreError(f"every initial state is quarantined: {run.quarantine.path} says why; delete a line to have its state tried "
                             "again")
        for ticket in tickets:
            if ticket.key.task not in fingerprints:
                fingerprints[ticket.key.task] = store.view(ticket.key.name).header["info"].get("fingerprint") or {}
        table[arm.name] = {
            **counted(list(won.values())), "policy_version": arm.acting.version, "checkpoint": str(arm.checkpoint),
            "planner": dataclasses.asdict(arm.acting.planner) if arm.acting.planner else None,
            **({"reproducible": False} if arm.acting.planner and arm.acting.planner.deadline_ms else {}),
            "invalid": sum(bool(known[t.key.name].invalid) for t in tickets), "digests": dict(arm.run_keys),
            "tasks": {sim.task: {**counted(of_task), "instruction": sim.instruction} for sim in run.config.sim.each()
                      if (of_task := [success for (task, _, _), success in won.items() if task == sim.task])},
            "seeds": {noise: counted([success for (_, _, seed), success in won.items() if seed == noise]) for noise in asked.seeds},
            "outcomes": {", ".join(map(str, key)): int(success) for key, success in won.items()}}
    first, *others = table
    left_out = [dataclasses.asdict(entry) for entry in run.quarantine.entries
                if entry.task in run.config.sim.names and entry.seed in asked.states]
    shared = set.intersection(*(set(fingerprint.items()) for fingerprint in fingerprints.values()))
    return {"suite": asked.suite, "run": run.config.name, "tasks": list(run.config.sim.names), "trials": asked.trials,
            "noise_seeds": list(asked.seeds), "states": asked.states, "arms": table,
            "pairs": [{"arm": name, "against": first, **_paired(table[name], table[first])} for name in others],
            "quarantined": left_out, "simulation": dataclasses.asdict(run.config.sim),
            "command": " ".join(["python -m cosmos_ray", *sys.argv[1:]]), "versions": versions(),
            "fingerprint": dict(sorted(shared)), "sampler": dataclasses.asdict(run.config.inference)}


def _paired(arm: dict, other: dict) -> dict[str, float]:
    """Two arms on what both played: the same task, state and noise."""
    both = [key for key in arm["outcomes"] if key in other["outcomes"]]
    return {"pairs": len(both), **paired_with_interval(*([row["outcomes"][key] for key in both] for row in (arm, other)))}


def _other(run: Run, name: str, asked: Benchmark) -> dict[str, Any]:
    """What run ``name`` beside this one reached on the suite. ConfigError when there is none, or when it played something else."""
    file = run.folder.path.parent / name / f"suite_{asked.suite}.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        same = {"tasks": list(run.config.sim.names), "trials": asked.trials, "noise_seeds": list(asked.seeds)}
        theirs = {what: found[what] for what in same}
    except FileNotFoundError as error:
        raise ConfigError(f"--against {name}: there is no {file}; run `evaluate --name {name} --suite {asked.suite}` first") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: run `evaluate --name {name} --suite {asked.suite}` again") from error
    for what, value in same.items():
        if theirs[what] != value:
            raise ConfigError(f"--against {name}: it was evaluated with {what} = {theirs[what]}, and this is {value}: evaluate both alike")
    return found


def _paired_runs(ours: dict, theirs: dict) -> dict[str, Any]:
    """The first arms of two runs, and what the other one reached."""
    name, other = next(iter(ours["arms"])), next(iter(theirs["arms"]))
    counts = {key: theirs["arms"][other][key] for key in ("successes", "episodes", "rate", "low", "high")}
    return {"arm": name, "other": other, "counts": counts, **_paired(ours["arms"][name], theirs["arms"][other])}


def _videos(run: Run, store: ReplayStore, tickets: Sequence[EpisodeTicket], folder: Path) -> None:
    """An mp4 in ``folder`` of every episode that has none yet. One that was played without --video has the frames of its chunks' ends."""
    folder.mkdir(parents=True, exist_ok=True)
    show = run.counter("video", "episodes")
    for number, ticket in enumerate(tickets):
        path = folder / f"{ticket.key.name}.mp4"
        if not path.exists():
            save_episode(store.read(ticket.key.name), path)
        show(number + 1, len(tickets))
