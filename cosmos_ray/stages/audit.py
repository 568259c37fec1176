"""What planning could win for a checkpoint, and which learned part is the bottleneck.

An audit appends every answer to a file as the answer comes. The file's name holds a digest of everything that decides the answers. So an
interrupted audit goes on where it stopped, and a changed policy or planner begins a new file.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Literal

from cosmos_ray.asks import workers_ask
from cosmos_ray.errors import ConfigError, SimulationError
from cosmos_ray.inference.messages import ActingPolicy
from cosmos_ray.model.checkpoint import read_description
from cosmos_ray.oracle.actor import AuditAnswer, AuditTicket, OracleActor
from cosmos_ray.oracle.chooser import ARMS
from cosmos_ray.oracle.shares import shares
from cosmos_ray.replay.files.durable import append_line
from cosmos_ray.report.audit_page import write_audit_page
from cosmos_ray.rollout.calls import RayCalls
from cosmos_ray.rollout.fleet import Fleet, run_tickets
from cosmos_ray.run import Run
from cosmos_ray.stages.acting import asked_policy, planning_network
from cosmos_ray.stages.evaluate import check_held_out, settings_digest, states

TOGETHER = 3  #: episodes of a ticket: they share batches, and yet the last tickets of an arm are not long

_Question = tuple[Literal["play", "probe"], str, int]  #: task, arm and number of the initial state


def audit(run: Run, checkpoint: str | None = None, probes: int = 24, number: int | None = None) -> dict[str, Any]:
    """Play every arm on the held-out initial states and score candidates along ``probes`` episodes; see :func:`shares`.

    ``number`` asks for the policy of a round. Writes ``audit_<checkpoint>.json`` and ``audit_<checkpoint>.html``, or for a round
    ``audit_round_<number>.json`` and ``.html``.
    """
    config = run.config
    if config.planner.candidates < 2:
        raise ConfigError("planner.candidates = 1 leaves nothing to choose: an audit needs at least 2")
    if config.planner.deadline_ms:
        raise ConfigError(f"planner.deadline_ms = {config.planner.deadline_ms:g} makes choices depend on the clock, and an audit compares "
                          "choices: set it to 0")
    if probes < 0:
        raise ConfigError(f"--probes {probes} must be at least 0")
    checkpoint, path = asked_policy(run, checkpoint, number)
    if not (path / "policy.json").exists():
        raise ConfigError(f"there is no policy {checkpoint!r} in {path.parent}: run `pretrain` (base) or `refine` (refined) first")
    check_held_out(run, run.folder.store())
    planning = str(planning_network(run, checkpoint, number) or "")
    for network in filter(None, (path, planning)):
        run.check_policy(network)
    acting = ActingPolicy(read_description(path)[1], config.planner, planning)
    digests = [settings_digest(run, path, acting, sim) for sim in config.sim.each()]
    digest = hashlib.sha256("".join(digests).encode()).hexdigest()[:10] if config.sim.suite else digests[0]
    answers = _Answers(run.folder.path / "audit" / f"{checkpoint}-{digest}.jsonl")
    questions: list[_Question] = [("play", arm, i) for arm in ARMS for i in states(run)]
    questions += [("probe", "", i) for i in states(run)[:probes]]
    _answer(run, str(path), planning, answers, [question for question in questions if question not in answers.known])
    result = shares([row for q in questions if q[0] == "play" for row in answers.known[q]],
                    [row for q in questions if q[0] == "probe" for row in answers.known[q]])
    shown = checkpoint if number is None else f"{checkpoint}, round {number}"
    result |= {"task": config.sim.title, "checkpoint": shown, "candidates": config.planner.candidates, "gamma": config.replay.gamma}
    file = f"audit_{checkpoint}" if number is None else f"audit_round_{number}"
    run.folder.write_json(f"{file}.json", result)
    page = run.folder.path / f"{file}.html"
    write_audit_page(result, page)
    return {**result, "page": str(page)}


class _Answers:
    """Answers by (task, arm, index), in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        self.known: dict[_Question, list[dict]] = {}
        path.parent.mkdir(exist_ok=True)
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
                if row["kind"] == "play" or all("parts" in probe for probe in row["rows"]):  # probes of older versions are asked again
                    self.known[row["kind"], row["arm"], row["index"]] = row["rows"]
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # torn by a crash: asked again

    def add(self, question: _Question, rows: list[dict]) -> None:
        task, arm, index = question
        append_line(self.path, json.dumps({"kind": task, "arm": arm, "index": index, "rows": rows}))
        self.known[question] = rows


def _answer(run: Run, checkpoint: str, planning_checkpoint: str, answers: _Answers, todo: list[_Question]) -> None:
    """Have actors answer ``todo``, a few episodes of one arm at a time."""
    config = run.config
    tickets = _tickets(todo, len(config.sim.names))
    if not tickets:
        return
    ask = workers_ask(config, min(len(tickets), config.rollout.workers), "oracles", config.inference.gpus)
    run.placement.reserve(ask)
    environment = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(config.inference.threads)}}}
    crew = run.placement.crew(ask, lambda _, options: OracleActor.options(**options, **environment).remote(
        config, checkpoint, planning_checkpoint))
    fleet = Fleet(crew, RayCalls(), ask.count, capacity=1, name_of=lambda ticket: (ticket.name,),
                  deadline_s=math.inf,  # how long an oracle's answer takes cannot be told
                  supervisor=run.supervisor, who="oracle", kind_of=lambda ticket: str(ticket.indices[0] % len(config.sim.names)))
    progress, done = run.progress("audit", len(todo), unit="episodes"), 0

    def take(found: list[AuditAnswer]) -> None:
        nonlocal done
        for answer in found:
            ticket = answer.ticket
            for index in ticket.indices:
                answers.add((ticket.task, ticket.arm, index), [row for row in answer.rows if row["index"] == index])
            done += len(ticket.indices)
            progress.update(done, ticket.arm or "probes")

    try:
        run_tickets(fleet, tickets, take)
    finally:
        fleet.close()
        run.placement.leave(ask)
    if fleet.quarantined:
        name, why = next(iter(fleet.quarantined.items()))
        raise SimulationError(f"the audit gave up {len(fleet.quarantined)} of {len(tickets)} tickets, which took down their processes; the "
                              f"first is {name!r}: {why}")
    progress.finish(done, "")


def _tickets(todo: list[_Question], tasks: int) -> list[AuditTicket]:
    """Questions of one kind, arm and task of the simulation together, :data:`TOGETHER` of them to a ticket."""
    groups: dict[tuple, list[int]] = {}
    for task, arm, index in todo:
        groups.setdefault((task, arm, index % tasks), []).append(index)
    return [AuditTicket(task, arm, tuple(indices[i : i + TOGETHER]))
            for (task, arm, _), indices in groups.items() for i in range(0, len(indices), TOGETHER)]
