"""Base policy and refined policy, alone and with best-of-N planning, on the same held-out initial states.

The store holds every evaluation episode (source "eval", never trained on) under a key that names the run, the arm and a digest of
everything that decides the outcome. So a second evaluation runs only what is missing. Results are always counted from the store.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from cosmos_ray.config import SimConfig
from cosmos_ray.config.acting import JUDGED
from cosmos_ray.config.libero import check_published
from cosmos_ray.errors import ConfigError, SimulationError, StoreError
from cosmos_ray.evidence import paired, wilson
from cosmos_ray.identity import evaluation_digest
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.progress import Progress
from cosmos_ray.replay.format.episode import EpisodeKey
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.rollout.ticket import EpisodeTicket, evaluation_noise_seed, task_and_state
from cosmos_ray.rounds import Rounds
from cosmos_ray.run import Run
from cosmos_ray.seeds import state_seed
from cosmos_ray.stages.acting import IMPORTED_PLANNING, acting_fleet, asked_policy, planning_checkpoint, run_episodes


@dataclass(frozen=True)
class Arm:
    """One policy, with or without planning."""

    name: str
    checkpoint: Path
    acting: ActingPolicy
    run_keys: Mapping[str, str] = field(hash=False)  #: by task, the ``run`` part of its episode keys: identity of the run, arm and digest
    kind: str  #: its name without the round, one of :data:`ARMS`
    round: int  #: that trained its policy, 0 for the base policy


#: Checkpoint of each arm, and which network plans: "" for none, "itself", or the run's "planning" network if it has one.
ARMS = {"base": ("base", ""), "base + planning": ("base", "itself"), "base + planning checkpoint": ("base", "planning"),
        "refined": ("refined", ""), "refined + planning": ("refined", "itself"), "refined + planning checkpoint": ("refined", "planning")}

#: Arms of a run without an imported planning network, where the run's own planning network has no arm beside the refined policy's.
USUAL = {"base": ARMS["base"], "refined": ARMS["refined"], "refined + planning": ("refined", "planning")}


def known_arms(run: Run) -> dict[str, tuple[str, str]]:
    """The arms that ``run`` can have, as in :data:`ARMS`. A rank that asks no planning network has no arm that is judged by one."""
    if not run.folder.has_policy(IMPORTED_PLANNING):
        return {"base": USUAL["base"], "base + planning": ARMS["base + planning"], **USUAL}
    judged = run.config.planner.rank_by in JUDGED
    return {name: arm for name, arm in ARMS.items() if judged or arm[1] != "planning"}


def arms(run: Run, only: Sequence[str] = (), rounds: Sequence[int] = ()) -> list[Arm]:
    """The arms there are checkpoints for, of ``only`` or all; the refined ones are of the newest round, or of each of ``rounds``.

    ConfigError when there is none, no arm of such a name, or no such round. The key of an arm does not name its round, so an episode of
    a round is the same one that was played when the round was the newest.
    """
    known = known_arms(run)
    asked = only or (known if run.folder.has_policy(IMPORTED_PLANNING) else USUAL)
    if unknown := [name for name in asked if name not in known]:
        raise ConfigError(f"run {run.config.name!r} has no arm {unknown[0]!r}: its arms are {', '.join(known)}")
    groups: list[tuple[str, int | None]] = [("base", None), *(("refined", number) for number in rounds or (None,))]
    out = [_arm(run, name, policy, known[name][1], number) for policy, number in groups for name in known
           if name in asked and known[name][0] == policy and (number is not None or run.folder.has_policy(policy))]
    if not out:
        raise ConfigError(f"there is no policy to evaluate in {run.folder.path / 'checkpoints'}: run `pretrain` first")
    return out


def _arm(run: Run, kind: str, policy: str, plans: str, number: int | None) -> Arm:
    """Arm ``kind`` of the newest checkpoint ``policy``, or of that of round ``number``."""
    path = asked_policy(run, policy, number)[1]
    judge = planning_checkpoint(run, policy, number) if plans == "planning" else ""
    _, version, info = read_description(path)
    acting = ActingPolicy(version, run.config.planner if plans else None, judge)
    keys = {sim.task: f"{run.folder.identity.key}:{kind}:{settings_digest(run, path, acting, sim)}" for sim in run.config.sim.each()}
    name = kind if number is None else f"{kind}, round {number}"
    return Arm(name, path, acting, keys, kind, 0 if policy == "base" else number or info.get("round", 1))


def ticket(run: Run, arm: Arm, index: int, attempt: int = 0) -> EpisodeTicket:
    """Evaluation episode ``index`` of an arm. Its noise depends on the initial state alone, so all arms draw the same."""
    task, seed = held_out(run, index)
    key = EpisodeKey(arm.run_keys[task], task, "eval", seed, attempt)
    return EpisodeTicket(key, noise_seed=evaluation_noise_seed(seed), acting=arm.acting, arm=arm.name)


def held_out(run: Run, index: int) -> tuple[str, int]:
    """Task and seed of held-out initial state ``index``."""
    task, state = task_and_state(run.config.sim.names, index)
    return task, state_seed("eval", run.config.seed, state)


def states(run: Run) -> list[int]:
    """Numbers of the held-out initial states that all arms begin in: of ``config.eval_episodes``, without the quarantined ones."""
    out = {(entry.task, entry.seed) for entry in run.quarantine.entries}
    return [i for i in range(run.config.eval_episodes) if held_out(run, i) not in out]


def evaluate(run: Run, only: Sequence[str] = (), rounds: Sequence[int] = ()) -> dict:
    """Run what the store lacks of every arm, then count from the store; see :func:`results`. Written to ``evaluation.json``, unless it
    is of ``only`` some arms or of other ``rounds`` than the newest. Every arm's count is also a row "evaluate_round" of the metrics."""
    config, store = run.config, run.folder.store()
    check_held_out(run, store)
    todo = {}
    for arm in arms(run, only, rounds):
        tickets = [ticket(run, arm, i) for i in states(run)]
        tickets += [ticket(run, arm, i, attempt=1) for i in states(run) if i < config.repeat]
        todo[arm] = [t for t in tickets if t.key.name not in store]
    total = play(run, todo)
    if total:
        store.refresh()
    out = results(run, store, only, rounds)
    if config.repeat:
        out["verified"] = compare_repeats(run, store, only, rounds)
    if not only and not rounds:
        run.folder.write_json("evaluation.json", out)
    run.tracker.log("evaluate", **{f"{name}_successes": arm["successes"] for name, arm in out["arms"].items()})
    _log_rounds(run, list(todo), out["arms"])
    return {**out, "new": total}


def play(run: Run, todo: Mapping[Arm, list[EpisodeTicket]]) -> int:
    """Run the tickets of every arm, but those of quarantined states, to their end; returns how many there were to run."""
    if not (total := sum(map(len, todo.values()))):
        return 0
    for judge in {arm.acting.planning_checkpoint for arm in todo} - {""}:
        run.check_policy(judge)
    with acting_fleet(run, next(iter(todo)).checkpoint) as (pool, fleet):
        progress, done = run.progress("evaluate", total, unit="episodes"), 0
        for arm, tickets in todo.items():
            pool.load(arm.checkpoint, arm.acting)
            pool.settle()  # which may take longer than a worker waits for an answer
            show = partial(_show, progress, done, arm.name)
            kept = [t for t in tickets if t.key not in run.quarantine]  # an arm before may have broken one
            done += run_episodes(run, pool, fleet, kept, show)[0]
        progress.finish(done, "")
    return total


def _log_rounds(run: Run, played: list[Arm], table: dict) -> None:
    """A row of the metrics for every arm, by which the report tells the rounds apart; then delete what ``keep_rounds`` does not keep."""
    if not run.folder.has_policy("base"):
        return
    base_version = read_description(run.folder.checkpoint("base"))[1]
    for arm in played:
        row = table[arm.name]
        run.tracker.log("evaluate_round", round=arm.round, arm=arm.kind, version=arm.acting.version, base_version=base_version,
                        **{name: row[name] for name in ("successes", "episodes", "low", "high")})
    Rounds(run.folder).forget(run.config.keep_rounds, base_version)


def _show(progress: Progress, done: int, arm: str, ran: int, wins: int) -> None:
    progress.update(done + ran, f"{arm}: {wins}/{ran} succeeded")


def results(run: Run, store: ReplayStore, only: Sequence[str] = (), rounds: Sequence[int] = ()) -> dict:
    """Counts per arm, read from the store: {"arms": {name: {successes, episodes, low, high, ...}}, "seeds": [...], ...}.

    StoreError when episodes are missing (evaluate again). SimulationError when all initial states are quarantined.
    """
    config, indices = run.config, states(run)
    if not indices:
        raise SimulationError(f"all {config.eval_episodes} held-out initial states are quarantined: {run.quarantine.path} says why; delete "
                              "a line to have its state tried again")
    known = {s.name: s for s in store.summaries()}
    table = {}
    for arm in arms(run, only, rounds):
        names = [ticket(run, arm, i).key.name for i in indices]
        missing = [n for n in names if n not in known]
        if missing:
            raise StoreError(f"{len(missing)} of {len(names)} evaluation episodes of arm {arm.name!r} are not in the store, "
                             f"{missing[0]} first: run `evaluate` again")
        outcomes = [known[n].success for n in names]
        planner = arm.acting.planner
        lengths = [known[n].length for n in names if known[n].success]
        table[arm.name] = {**counted(outcomes), "mean_steps_of_successes": float(np.mean(lengths)) if lengths else None,
                           "policy_version": arm.acting.version, "round": arm.round,
                           "planner": dataclasses.asdict(planner) if planner else None,
                           **({"reproducible": False} if planner and planner.deadline_ms else {}),  # choices depend on the clock
                           "invalid": sum(bool(known[n].invalid) for n in names), "outcomes": [int(o) for o in outcomes],
                           "episode_names": names}
        if config.sim.suite:
            table[arm.name]["tasks"] = {task: counted([known[n].success for n in names if known[n].task == task])
                                        for task in dict.fromkeys(known[n].task for n in names)}
    chosen = [held_out(run, i) for i in range(config.eval_episodes)]
    out = {"task": config.sim.title, "seeds": [chosen[i][1] for i in indices], "arms": table, "pairs": _pairs(table)}
    left_out = {(entry.task, entry.seed): entry.reason for entry in run.quarantine.entries if (entry.task, entry.seed) in chosen}
    rows = [{"seed": seed, "reason": reason, **({"task": task} if config.sim.suite else {})} for (task, seed), reason in left_out.items()]
    return {**out, "quarantined": rows} if left_out else out


def counted(outcomes: Sequence[bool]) -> dict:
    """{successes, episodes, rate, low, high} of episodes that succeeded or not."""
    low, high = wilson(sum(outcomes), len(outcomes))
    return {"successes": sum(outcomes), "episodes": len(outcomes), "rate": sum(outcomes) / len(outcomes), "low": low, "high": high}


def compare_repeats(run: Run, store: ReplayStore, only: Sequence[str] = (), rounds: Sequence[int] = ()) -> dict:
    """Compare repeated episodes with the first ones, state by state: {"repeated": n, "identical": m, "different": [names]}."""
    different, repeated = [], 0
    for arm in arms(run, only, rounds):
        for i in [i for i in states(run) if i < run.config.repeat]:
            first, second = (store.read(ticket(run, arm, i, attempt).key.name) for attempt in (0, 1))
            repeated += 1
            if not (np.array_equal(first.states, second.states) and np.array_equal(first.actions, second.actions)):
                different.append(first.key.name)
    return {"repeated": repeated, "identical": repeated - len(different), "different": different}


def _pairs(table: dict) -> list[dict]:
    """Each later arm against the first, on the same initial states: discordant counts and the exact McNemar p-value."""
    first, *others = table
    return [{"arm": other, "against": first, **paired(table[other]["outcomes"], table[first]["outcomes"])} for other in others]


def settings_digest(run: Run, checkpoint: Path, acting: ActingPolicy, sim: SimConfig) -> str:
    """:func:`evaluation_digest` of the policy ``checkpoint`` with the planner and the planning network of ``acting`` in a simulation."""
    planning, config = acting.planning_checkpoint, dataclasses.replace(run.config, sim=sim)
    return evaluation_digest(run.folder.identity, config, acting.planner, _hash(checkpoint), _hash(Path(planning)) if planning else "")


def _hash(checkpoint: Path) -> str:
    file = checkpoint / "model.safetensors"
    return _hash_file(file, file.stat().st_mtime_ns)


@functools.lru_cache
def _hash_file(file: Path, changed: int) -> str:
    """SHA-256 of a file, computed once per change."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_held_out(run: Run, store: ReplayStore) -> None:
    """:func:`refuse_seen` for the run's held-out initial states, of which LIBERO publishes so many."""
    for i in range(run.config.eval_episodes):
        check_published(*task_and_state(run.config.sim.names, i))
    refuse_seen(store, {held_out(run, i)[1] for i in range(run.config.eval_episodes)})


def refuse_seen(store: ReplayStore, seeds: Set[int]) -> None:
    """StoreError when anything in the store was collected from one of the initial states ``seeds``."""
    seen = {s.key.seed for s in store.summaries() if s.episode_class != "evaluation"}
    if seeds & seen:
        raise StoreError(f"initial state {min(seeds & seen)} is held out for evaluation but the store has a training episode of it: "
                         "evaluate with another --seed, or remove that episode")
