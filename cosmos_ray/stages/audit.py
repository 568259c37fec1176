"""What planning could win for a checkpoint, and which learned part stands in the way.

Every answer is appended to a file of its own as it comes, under a digest of everything that decides it: an interrupted audit goes on
where it stopped, and a changed policy or planner begins a new file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cosmos_ray.errors import ConfigError
from cosmos_ray.oracle.actor import OracleActor
from cosmos_ray.oracle.judge import ARMS
from cosmos_ray.oracle.shares import shares
from cosmos_ray.remote import own_error
from cosmos_ray.replay.files.durable import append_line
from cosmos_ray.report.audit_page import write_audit_page
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import planning_network
from cosmos_ray.stages.evaluate import check_held_out, settings_digest

TOGETHER = 3  #: episodes that share their batches, so that the last tasks of an arm are not long


def audit(run: Run, checkpoint: str | None = None, probes: int = 24) -> dict[str, Any]:
    """Play every arm on the held-out initial states and judge candidates along ``probes`` episodes; see :func:`shares`.

    Writes ``audit_<checkpoint>.json`` and ``audit_<checkpoint>.html``.
    """
    config = run.config
    if config.planner.candidates < 2:
        raise ConfigError("planner.candidates = 1 leaves nothing to choose: an audit needs at least 2")
    if probes < 0:
        raise ConfigError(f"--probes {probes} must be at least 0")
    checkpoint = checkpoint or _newest(run)
    path = run.folder.checkpoint(checkpoint)
    if not (path / "policy.json").exists():
        raise ConfigError(f"there is no policy {checkpoint!r} in {path.parent}: run `pretrain` (base) or `refine` (refined) first")
    check_held_out(run, run.folder.store())
    judge = planning_network(run) if checkpoint == "refined" else None
    answers = _Answers(run.folder.path / "audit" / f"{checkpoint}-{settings_digest(run, path, config.planner, judge)}.jsonl")
    todo = [("play", arm, i) for arm in ARMS for i in range(config.eval_episodes)]
    todo += [("probe", "", i) for i in range(min(probes, config.eval_episodes))]
    _play(run, str(path), str(judge or ""), answers, [task for task in todo if task not in answers.known])
    asked = set(todo)
    result = shares([row for task, rows in answers.known.items() if task in asked and task[0] == "play" for row in rows],
                    [row for task, rows in answers.known.items() if task in asked and task[0] == "probe" for row in rows])
    result |= {"task": config.sim.task, "checkpoint": checkpoint, "candidates": config.planner.candidates, "gamma": config.replay.gamma}
    run.folder.write_json(f"audit_{checkpoint}.json", result)
    page = run.folder.path / f"audit_{checkpoint}.html"
    write_audit_page(result, page)
    return {**result, "page": str(page)}


class _Answers:
    """What was answered, by (kind, arm, index), in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[tuple[str, str, int], list[dict]] = {}
        path.parent.mkdir(exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if row["kind"] == "play" or all("parts" in probe for probe in row["rows"]):  # probes of older versions are asked again
                    self.known[row["kind"], row["arm"], row["index"]] = row["rows"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # torn by a crash: asked again

    def add(self, task: tuple[str, str, int], rows: list[dict]) -> None:
        append_line(self.path, json.dumps({"kind": task[0], "arm": task[1], "index": task[2], "rows": rows}))
        self.known[task] = rows


def _play(run: Run, checkpoint: str, critic: str, answers: _Answers, todo: list[tuple[str, str, int]]) -> None:
    """Have actors work through ``todo``, a few episodes of one arm at a time."""
    if not todo:
        return
    queue = [group[i : i + TOGETHER] for group in _alike(todo) for i in range(0, len(group), TOGETHER)]
    count = min(len(queue), max(run.config.rollout.workers, 1))
    options = {"num_cpus": run.cpu_share(count), "num_gpus": run.config.inference.gpus,
               "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(run.config.inference.threads)}}}
    actors = [OracleActor.options(**options).remote(run.config, checkpoint, critic) for _ in range(count)]
    progress, done, pending = run.progress("audit", len(todo), unit="episodes"), 0, {}
    try:
        while queue or pending:
            for actor in actors:
                if queue and actor not in (a for a, _ in pending.values()):
                    kind, arm, _ = (tasks := queue.pop(0))[0]
                    indices = [index for _, _, index in tasks]
                    call = actor.play.remote(arm, indices) if kind == "play" else actor.probe.remote(indices)
                    pending[call] = actor, tasks
            ready, _ = ray.wait(list(pending), timeout=1.0)
            for call in ready:
                _, tasks = pending.pop(call)
                try:
                    rows = ray.get(call)
                except RayTaskError as error:
                    raise own_error(error) from error
                for task in tasks:
                    answers.add(task, [row for row in rows if row["index"] == task[2]])
                done += len(tasks)
                progress.update(done, tasks[0][1] or "probes")
        progress.finish(done, "")
    finally:
        for actor in actors:
            ray.kill(actor)


def _alike(todo: list[tuple[str, str, int]]) -> list[list[tuple[str, str, int]]]:
    groups: dict[tuple[str, str], list] = {}
    for task in todo:
        groups.setdefault(task[:2], []).append(task)
    return list(groups.values())


def _newest(run: Run) -> str:
    return next((name for name in ("refined", "base") if (run.folder.checkpoint(name) / "policy.json").exists()), "base")
