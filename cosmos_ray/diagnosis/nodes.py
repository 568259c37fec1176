"""Has every node of a Ray cluster look at itself, at the others, and at the folder of the runs."""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosmos_ray.diagnosis.checks import Finding, look
from cosmos_ray.remote import first_line
from cosmos_ray.supervision import Supervisor
from cosmos_ray.uri import is_uri

ANSWER_S = 180.0  #: for a node to start a process and to do its checks; a picture alone may take a minute
CLOCK_S = 2.0  #: that clocks may differ: a lease on a run in a bucket lives for thirty seconds
KNOCK_S = 5.0  #: for a connection to another node


class Examiner:
    """What one node does. :data:`ExaminerActor` is its shell."""

    def __init__(self) -> None:
        self._ear: socket.socket | None = None

    def look(self, root: str) -> list[Finding]:
        return look(root)

    def clock(self) -> float:
        return time.time()

    def listen(self) -> int:
        """A port of this node that others can try to reach."""
        self._ear = socket.create_server(("", 0))
        return self._ear.getsockname()[1]

    def knock(self, doors: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Those (address, port) that cannot be reached from here."""
        closed = []
        for address, port in doors:
            try:
                socket.create_connection((address, port), timeout=KNOCK_S).close()
            except OSError:
                closed.append((address, port))
        return closed

    def finds(self, file: str, text: str) -> bool:
        """Whether this node sees the ``file`` that another one wrote."""
        try:
            return Path(file).read_text() == text
        except OSError:
            return False


ExaminerActor: Any = ray.remote(num_cpus=0, max_restarts=0)(Examiner)


@dataclass(frozen=True)
class _Node:
    name: str
    address: str
    actor: ActorHandle


def examine(root: str, supervisor: Supervisor) -> dict[str, list[Finding]]:
    """The findings of every living node, by its name; the first is this process's own. Ray must be connected."""
    own = ray.get_runtime_context().get_node_id()
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != own)
    nodes = [_Node(f"node {node['NodeManagerAddress']} ({node['NodeID'][:6]})", node["NodeManagerAddress"],
                   ExaminerActor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote())
             for node in alive]
    try:
        found = {node.name: said if isinstance(said, list) else [_silent(said)] for node, said in _ask(nodes, "look", supervisor, root)}
        there = [node for node in nodes if not found[node.name][0].check == "answer"]
        for findings in (_clocks(there), _doors(there, supervisor), _shared(there, root, supervisor)):
            for name, finding in findings.items():
                found[name].append(finding)
        return found
    finally:
        for node in nodes:
            ray.kill(node.actor)


def _ask(nodes: Sequence[_Node], method: str, supervisor: Supervisor, *arguments: Any) -> list[tuple[_Node, Any]]:
    """What every node answers, or why it did not: an exception."""
    calls = {getattr(node.actor, method).remote(*arguments): node for node in nodes}
    answers: dict[str, Any] = {}
    until, left = time.monotonic() + ANSWER_S, list(calls)
    while left and time.monotonic() < until:
        done, left = ray.wait(left, timeout=1.0)
        for call in done:
            try:
                answers[calls[call].name] = ray.get(call)
            except RayError as error:
                answers[calls[call].name] = error
        if left:
            supervisor.waits("doctor", f"{calls[left[0]].name} to look")
    supervisor.goes_on("doctor")
    late = TimeoutError(f"no answer within {ANSWER_S:g} s")
    return [(node, answers.get(node.name, late)) for node in nodes]


def _silent(error: BaseException) -> Finding:
    return Finding("answer", False, first_line(error), "see what keeps the node busy (`ray status`, its raylet.err), or take it out of the "
                                                       "cluster")


def _clocks(nodes: Sequence[_Node]) -> dict[str, Finding]:
    """How far each node's clock is from this process's."""
    found = {}
    for node in nodes:
        before = time.time()
        try:
            off = ray.get(node.actor.clock.remote(), timeout=KNOCK_S * 2) - (before + time.time()) / 2
        except (RayError, TimeoutError) as error:
            found[node.name] = Finding("clock", False, first_line(error), "run `doctor` again")
            continue
        good = abs(off) <= CLOCK_S
        found[node.name] = Finding("clock", good, f"{off:+.1f} s from the first node's", "" if good else "set it by NTP (chrony, say)")
    return found


def _doors(nodes: Sequence[_Node], supervisor: Supervisor) -> dict[str, Finding]:
    """Whether each node reaches a free port of every other one, as learner ranks and Ray's workers must."""
    if len(nodes) < 2:
        return {}
    ports = {node.name: port for node, port in _ask(nodes, "listen", supervisor) if isinstance(port, int)}
    doors = [(node.address, ports[node.name]) for node in nodes if node.name in ports]
    found = {}
    for node, closed in _ask(nodes, "knock", supervisor, doors):
        if isinstance(closed, BaseException):
            found[node.name] = _silent(closed)
            continue
        there = ", ".join(f"{address}:{port}" for address, port in closed[:3])
        todo = "let the nodes reach each other on all ports (firewall, security group, network policy)"
        found[node.name] = Finding("ports", not closed, f"cannot reach {there}" if closed else f"reaches {len(doors)} nodes",
                                   todo if closed else "")
    return found


def _shared(nodes: Sequence[_Node], root: str, supervisor: Supervisor) -> dict[str, Finding]:
    """Whether every node sees what this process writes into the folder of the runs."""
    if is_uri(root) or len(nodes) < 2:
        return {}
    file, text = Path(root).expanduser().absolute() / f".doctor-{secrets.token_hex(6)}", secrets.token_hex(8)
    try:
        file.write_text(text)
    except OSError:
        return {}  # said already
    try:
        seen = {node.name: answer is True for node, answer in _ask(nodes, "finds", supervisor, str(file), text)}
        todo = "mount the same storage there, or give a bucket as --root (s3://, gs://)"
        return {name: Finding("shared runs", good, f"{'sees' if good else 'does not see'} what the first node writes", "" if good else todo)
                for name, good in seen.items()}
    finally:
        file.unlink(missing_ok=True)
