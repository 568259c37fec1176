"""Counts from the store and ``metrics.jsonl``: episodes per class, success by policy version, training curves, stage times, deaths."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

from cosmos_ray.evidence import wilson
from cosmos_ray.folder import RunFolder
from cosmos_ray.quarantine import Quarantine
from cosmos_ray.replay.format.episode import EpisodeClass, EpisodeSummary
from cosmos_ray.replay.store import ReplayStore

CURVES = ("loss", "action", "future", "value", "grad_norm", "lr")
MAX_POINTS = 400  #: kept of a training curve

CLASSES: dict[EpisodeClass, str] = {
    "demo": "demonstrations of the scripted expert",
    "success": "rollouts that succeeded",
    "failure": "rollouts that failed, failed demonstrations included",
    "evaluation": "held-out evaluation, never trained on",
    "invalid": "simulation broke or a demonstration failed, never trained on",
}


def store_contents(store: ReplayStore) -> dict:
    """Episodes, control steps, rendered steps and megabytes per class of :data:`CLASSES`, and the number of quarantined files."""
    table: dict[EpisodeClass, dict] = {
        name: {"class": name, "what": what, "episodes": 0, "steps": 0, "frames": 0, "mb": 0.0} for name, what in CLASSES.items()}
    for summary in store.summaries():
        row = table[summary.episode_class]
        row["episodes"] += 1
        row["steps"] += summary.length
        row["frames"] += len(summary.frame_steps)
        row["mb"] += summary.size / 1e6
    rows = [row for row in table.values() if row["episodes"]]
    total = {key: sum(row[key] for row in rows) for key in ("episodes", "steps", "frames", "mb")}
    return {"classes": rows, "total": total, "quarantined": len(store.quarantine.entries())}


def by_version(rollouts: list[EpisodeSummary]) -> list[dict]:
    """Success of rollouts by the policy version that began them: {version, successes, episodes, low, high}, ascending."""
    groups: dict[int, list[bool]] = {}
    for summary in rollouts:
        if not summary.invalid:
            groups.setdefault(summary.policy_version, []).append(summary.success)
    rows = []
    for version, wins in sorted(groups.items()):
        rows.append({"version": version, **_counted(wins)})
    return rows


def by_task(arms: list[dict], rollouts: list[EpisodeSummary], values: dict[str, dict]) -> list[dict]:
    """Success and value by task, where the arms were evaluated on several: {task, arms, rollouts, value}.

    ``arms`` are {arm: {successes, episodes, low, high, rate}}, ``rollouts`` the same of the run's rollouts, None where there are none,
    and ``value`` is a row of ``values`` (:func:`cosmos_ray.report.diagnostics.values_by_task`) or None.
    """
    tasks = dict.fromkeys(task for arm in arms for task in arm.get("tasks", {}))
    played = {task: [s.success for s in rollouts if s.task == task and not s.invalid] for task in tasks}
    return [{"task": task, "arms": {arm["name"]: arm["tasks"][task] for arm in arms if task in arm.get("tasks", {})},
             "rollouts": _counted(played[task]) if played[task] else None, "value": values.get(task)} for task in tasks]


def by_round(folder: RunFolder, rollouts: list[EpisodeSummary]) -> list[dict]:
    """Success by round of refinement, ascending, 0 for the base policy: {round, version, arms, rollouts}.

    ``arms`` are {arm: {successes, episodes, low, high}}, as `evaluate` counted the round's networks last. ``rollouts``, in the same form,
    are those that the round collected; None where it collected none. Rounds that were left by going back are not among them.
    """
    evaluated: dict[int, dict[str, dict]] = {}
    begun: dict[int, int] = {}
    base_version = None
    for row in folder.metrics("round", "from_round", "evaluate_round"):
        if row.get("base_version", base_version) != base_version:
            base_version, evaluated, begun = row["base_version"], {}, {}
        if row["stage"] == "round":
            begun[row["round"]] = row["attempt"]
        elif row["stage"] == "evaluate_round":
            evaluated.setdefault(row["round"], {})[row["arm"]] = row
        else:
            evaluated, begun = ({n: known for n, known in table.items() if n <= row["round"]} for table in (evaluated, begun))
    played: dict[int, list[bool]] = {}
    for summary in rollouts:
        if not summary.invalid:
            played.setdefault(summary.key.attempt, []).append(summary.success)
    # A run from before rounds were logged: attempts are policy versions, which ascend with the rounds.
    numbers = {attempt: number for number, attempt in begun.items()} or {attempt: i for i, attempt in enumerate(sorted(played), 1)}
    collected = {number: _counted(played[attempt]) for attempt, number in {0: 1, **numbers}.items() if attempt in played}
    rows = []
    for number in sorted({*evaluated, *collected}):
        arms = {arm: {key: row[key] for key in ("successes", "episodes", "low", "high")} for arm, row in evaluated.get(number, {}).items()}
        version = next((row["version"] for row in evaluated.get(number, {}).values()), None)
        rows.append({"round": number, "version": version, "arms": arms, "rollouts": collected.get(number)})
    return rows


def _counted(outcomes: list[bool]) -> dict:
    low, high = wilson(sum(outcomes), len(outcomes))
    return {"successes": sum(outcomes), "episodes": len(outcomes), "low": low, "high": high}


def training_curves(folder: RunFolder) -> dict[str, dict[str, list]]:
    """``{"pretrain": {"step": [...], "loss": [...], ...}, "refine": ...}``, stages without rows left out.

    A resume goes back to the learner's last state; what was logged of later steps counts no more. The steps of a round count on from the
    round before. Curves with more than MAX_POINTS rows are thinned.
    """
    curves = {}
    for stage in ("pretrain", "planning", "refine"):
        rounds: dict[int, dict[int, dict]] = {}
        for row in folder.metrics(stage, "resume", "from_round"):
            if row.get("what", stage) != stage:
                continue
            number, step = row.get("round", 1), _number(row.get("step"))
            for later in [n for n in rounds if n > number]:
                del rounds[later]  # of another base policy, or left by going back
            if row["stage"] == "resume":
                rounds[number] = {s: kept for s, kept in rounds.get(number, {}).items() if step is None or s <= step}
            elif row["stage"] == stage and step is not None:
                rounds.setdefault(number, {})[row["step"]] = row
        rows, before = [], 0
        for _, by_step in sorted((number, logged) for number, logged in rounds.items() if logged):
            rows += [{**by_step[step], "step": before + step} for step in sorted(by_step)]
            before += max(by_step)
        stride = -(-len(rows) // MAX_POINTS) or 1
        rows = rows[::-1][::stride][::-1]  # the last step stays
        if rows:
            curves[stage] = {"step": [row["step"] for row in rows],
                             **{key: [_number(row.get(key)) for row in rows] for key in CURVES if any(key in row for row in rows)}}
    return curves


def stage_times(folder: RunFolder) -> list[dict]:
    """Minutes and peak memory (MB) per stage, in the order of their first run. Sessions of an interrupted demo add up."""
    stages: dict[str, dict] = {}
    for row in folder.metrics("demo"):
        seconds, memory = _number(row.get("seconds")), _number(row.get("peak_memory_mb"))
        if seconds is None or "name" not in row:
            continue
        stage = stages.setdefault(str(row["name"]), {"name": str(row["name"]), "minutes": 0.0, "peak_memory_mb": None})
        stage["minutes"] += seconds / 60
        stage["peak_memory_mb"] = max(filter(None, (memory, stage["peak_memory_mb"])), default=None)
    return list(stages.values())


def stage_results(folder: RunFolder) -> dict[str, dict]:
    """The last result row of ``collect``, ``rollout`` and ``refine_result``, without its time stamp."""
    out = {}
    for stage in ("collect", "rollout", "refine_result"):
        rows = folder.metrics(stage)
        if rows:
            out[stage] = {k: v for k, v in rows[-1].items() if k not in ("stage", "time")}
    return out


def supervision(folder: RunFolder) -> dict:
    """What died and what was waited for, oldest first, and the quarantined initial states:

    {"deaths": [{time, who, why, then}], "waits": [{time, who, on, seconds}], "quarantined": [{name, task, seed, reason}]}. ``time`` is
    text, in UTC, of the death and of the end of the wait.
    """
    rows = {kind: [{"time": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row["time"])), **{name: row.get(name) for name in names}}
                   for row in folder.metrics(kind) if _number(row.get("time")) is not None]
            for kind, names in (("death", ("who", "why", "then")), ("wait", ("who", "on", "seconds")))}
    return {"deaths": rows["death"], "waits": rows["wait"], "quarantined": [asdict(entry) for entry in Quarantine(folder).entries]}


def plain(value: Any) -> Any:
    """Nested data for strict JSON: NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None
