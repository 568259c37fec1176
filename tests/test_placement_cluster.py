"""Runs on a cluster of two real nodes: each has its share, waits are said, and labels are kept."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosmos_ray.learner.engine import free_port
from tests.conftest import ROOT, environment

PATIENCE_S = 240.0  #: for what takes seconds on a quiet machine

#: A driver that takes what it is told to take, says what it has, and holds that until its input ends.
DRIVER = """
    import json, sys, time
    import ray
    from cosmos_ray.places import Ask
    from cosmos_ray.placement import Placement, cluster_nodes
    from cosmos_ray.supervision import Supervisor

    @ray.remote
    class Process:
        def node(self):
            return ray.get_runtime_context().get_node_id()

    ray.init(address=sys.argv[1], log_to_driver=False)
    placement, held = Placement(Supervisor()), []

    def take(line):
        if line["kind"] == "nodes":
            return [node.id for node in cluster_nodes()]
        if line["kind"] == "all":  # whole nodes, whoever else there is
            for node in cluster_nodes():
                held.append(Process.options(num_cpus=node.cpus, label_selector={"ray.io/node-id": node.id}).remote())
        ask = Ask(line["who"], line["count"], selector=line.get("labels", {}), together=line["kind"] == "gang", least=line["count"])
        if line["kind"] == "crew":
            crew = placement.crew(ask, lambda index, options: Process.options(**options).remote())
            for index in range(ask.count):
                while (process := crew.start(index)) is None:
                    time.sleep(0.5)
                held.append(process)
        if line["kind"] == "pool":
            held.extend(Process.options(**options).remote() for options in placement.options(ask))
        if line["kind"] == "gang":
            place = placement.gang(ask)
            while (gang := place()) is None:
                time.sleep(0.5)
            held.extend(Process.options(**options).remote() for options in gang.options)
        return ray.get([process.node.remote() for process in held[-ask.count:]], timeout=200)

    for line in sys.stdin:
        print(json.dumps(take(json.loads(line))), flush=True)
    ray.shutdown()
"""


def eventually(what: str, true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end, f"never came: {what}"
        time.sleep(0.2)


class Program:
    """A child process whose lines are kept as they come."""

    def __init__(self, arguments: list[str], variables: dict[str, str]):
        self.process = subprocess.Popen(arguments, cwd=ROOT, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.lines: list[str] = []
        self.errors: list[str] = []
        for pipe, lines in ((self.process.stdout, self.lines), (self.process.stderr, self.errors)):
            threading.Thread(target=lambda pipe=pipe, lines=lines: lines.extend(iter(pipe.readline, "")), daemon=True).start()

    def said(self, words: str) -> bool:
        return any(words in line for line in [*self.lines, *self.errors])

    def ask(self, **line) -> list[str]:
        """Send a line to a :data:`DRIVER`, and return its answer."""
        have = len(self.lines)
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        eventually(f"an answer to {line}\n{self.errors}", lambda: len(self.lines) > have or self.process.poll() is not None)
        return json.loads(self.lines[have])

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        eventually(f"the end\n{self.errors}", lambda: self.process.poll() is not None)
        return self.process.returncode


class TwoNodes:
    """A cluster of two nodes with two CPUs each; the second has the label zone=a."""

    def __init__(self, folder: Path):
        self.address, self.folder, self.programs = f"127.0.0.1:{free_port()}", folder, []
        (folder / "token").write_text("1" * 64)
        self.variables = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--num-cpus=2", "--disable-usage-stats", "--block"]
        head = ["--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={folder / 'r'}"]
        self.nodes = [subprocess.Popen([*ray, *more], env=self.variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                      for more in (head, [f"--address={self.address}", "--labels=zone=a"])]

    def answers(self) -> bool:
        """Whether the head node listens."""
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", int(self.address.split(":")[1])), timeout=1).close()
            return True
        return False

    def start(self, *arguments: str) -> Program:
        self.programs.append(Program([sys.executable, *arguments], self.variables))
        return self.programs[-1]

    def driver(self) -> Program:
        return self.start("-c", textwrap.dedent(DRIVER), self.address)

    def collect(self, root: Path, name: str) -> Program:
        return self.start("-m", "cosmos_ray", "collect", "--root", str(root), "--name", name, "--address", self.address,
                          "--sim.task", "Lift", "--demos", "4", "--rollout.workers", "3")


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="p"))  # a short path, for Ray's sockets
    nodes = TwoNodes(folder)
    try:
        eventually("a head node", nodes.answers)
        first = nodes.driver()
        eventually("two nodes", lambda: len(first.ask(kind="nodes")) == 2)
        first.process.stdin.close()
        first.end()
        yield nodes
    finally:
        for process in [*(program.process for program in nodes.programs), *nodes.nodes[::-1]]:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_of_three_workers_none_is_left_out_and_labels_are_kept(cluster):
    driver = cluster.driver()
    workers = driver.ask(kind="crew", who="workers", count=3)
    assert len(workers) == 3 and len(set(workers)) == 2
    labelled = driver.ask(kind="crew", who="labelled", count=2, labels={"zone": "a"})
    assert len(labelled) == 2 and len(set(labelled)) == 1
    assert set(driver.ask(kind="pool", who="pool", count=1, labels={"zone": "a"})) == set(labelled)
    assert set(driver.ask(kind="gang", who="ranks", count=2, labels={"zone": "a"})) == set(labelled)
    second = cluster.driver()
    assert len(second.ask(kind="crew", who="workers", count=3)) == 3, "the first run left room"
    for program in (driver, second):
        program.process.stdin.close()
        assert program.end() == 0


def test_a_run_on_a_full_cluster_says_so_can_be_interrupted_and_goes_on_and_two_runs_at_once_come_to_an_end(cluster, tmp_path):
    holder = cluster.driver()
    assert len(set(holder.ask(kind="all", who="holder", count=2))) == 2
    runs = [cluster.collect(tmp_path, name) for name in ("left", "patient")]
    for run in runs:
        eventually(f"a wait that is said {run.errors}", lambda run=run: run.said("waiting for a place for 3 of 3"))
        assert run.said("with 0 of 2 CPUs free"), run.errors
    runs[0].process.send_signal(signal.SIGINT)
    assert runs[0].end() == 130, runs[0].errors
    holder.process.stdin.close()
    runs[0] = cluster.collect(tmp_path, "left")
    for run in runs:
        assert run.end() == 0, run.errors
        assert run.said("4 demonstrations in"), run.lines


def test_labels_that_no_node_has_are_refused_before_a_run_begins(cluster, tmp_path):
    done = cluster.start("-m", "cosmos_ray", "collect", "--root", str(tmp_path), "--name", "new", "--address", cluster.address,
                         "--rollout.nodes", "zone=b")
    assert done.end() == 2 and done.said("rollout.nodes = 'zone=b' fits none of the cluster's 2 nodes, they have zone=a"), done.errors
    assert not (tmp_path / "new").exists(), "a run would keep the setting"
