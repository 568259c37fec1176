"""A real Ray cluster on this machine: a head and a second node, each started by `ray start` and killed with all that runs on it."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S = 180.0  #: for `ray start`, on a busy machine
MEMORY = 150 << 20  #: bytes of a node's object store


def environment(**more: str) -> dict[str, str]:
    """Variables for a process of the cluster or of a command on it, without those of a Ray around us."""
    return {**{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "PYTEST_CURRENT_TEST")},
            "OMP_NUM_THREADS": "1", **more}


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def family(process: psutil.Process) -> list[psutil.Process]:
    """``process`` and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL, all at once."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class Node:
    """One `ray start --block` and its raylet."""

    def __init__(self, arguments: list[str], log: Path, variables: dict[str, str]):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [*RAY, "start", "--block", "--disable-usage-stats", f"--object-store-memory={MEMORY}", *arguments],
                env=variables, stdout=file, stderr=file)

    def wait(self) -> Node:
        """Wait until the node has joined."""
        end = time.monotonic() + START_S
        while "Ray runtime started" not in (text := self.log.read_text()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"`ray start` did not start a node: {text[-2000:]}")
            time.sleep(0.1)
        return self

    @property
    def raylet(self) -> psutil.Process:
        return next(p for p in self.processes() if p.name() == "raylet")

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the node."""
        return family(psutil.Process(self.process.pid)) if self.process.poll() is None else []

    def kill(self) -> None:
        """End the node and all that runs on it, at once."""
        kill(self.processes())
        self.process.wait()


class TwoNodes:
    """The cluster; use it with ``with``.

    Args:
        folder: gets the logs.
        cpus: of each node.
        redis: host:port of a Redis that keeps what the cluster knows, so that another head goes on from there.
        dashboard: port at which the head takes jobs; 0 for a head that takes none.
        variables: for every process of the cluster.
    """

    def __init__(self, folder: Path, cpus: int = 2, redis: str = "", dashboard: int = 0, **variables: str):
        self.folder, self.cpus, self.redis, self.port, self._number = folder, cpus, redis, free_port(), 0
        self.dashboard = dashboard
        self.temporary = Path(f"/tmp/chaos{os.getpid()}")  # short: Ray's sockets lie below it
        token = folder / "token"  # of our own: else `ray start` writes one into the user's home
        self.variables = environment(RAY_TMPDIR=str(self.temporary), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token), **variables)
        self.head: Node | None = None
        self.second: Node | None = None
        self._gcs: list[subprocess.Popen] = []  #: control stores that replaced the head's own
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text(secrets.token_hex(32))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> TwoNodes:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def start(self) -> None:
        try:
            self.start_head()
            self.add_second()
        except BaseException:
            self.close()
            raise

    def start_head(self) -> None:
        # Another head would start on another machine, where nothing says that the cluster runs already.
        (self.temporary / "ray_current_cluster").unlink(missing_ok=True)
        variables = {"RAY_REDIS_ADDRESS": self.redis} if self.redis else {}
        dashboard = ["--include-dashboard=true", f"--dashboard-port={self.dashboard}"] if self.dashboard else ["--include-dashboard=false"]
        self.head = self._node(["--head", f"--port={self.port}", *dashboard, f"--temp-dir={self.temporary}"], variables).wait()

    def add_second(self) -> None:
        """Have a second node join."""
        self.second = self._node([f"--address={self.address}"]).wait()

    def nodes(self) -> list[Node]:
        return [node for node in (self.head, self.second) if node is not None]

    def kill_head(self) -> None:
        """End the head and all that runs on it, at once."""
        self.head.kill()
        for process in self._gcs:
            process.kill()
            process.wait()

    def kill_second_raylet(self) -> list[psutil.Process]:
        """SIGKILL the raylet of the second node, nothing else; returns what ran under it. `ray start` then ends the rest of the node."""
        under = self.second.raylet.children(recursive=True)
        self.second.raylet.send_signal(signal.SIGKILL)
        return under

    def restart_gcs(self) -> None:
        """SIGKILL the cluster's control store and start it again as it was. It knows the cluster only with ``redis``."""
        # `ray start` would end the head when one of its processes dies.
        self.head.process.send_signal(signal.SIGSTOP)
        own = [p for p in self.head.processes() if p.name() == "gcs_server" and p.status() != psutil.STATUS_ZOMBIE]
        store = own[0] if own else psutil.Process(self._gcs[-1].pid)  # it was restarted before
        arguments, variables = store.cmdline(), store.environ()
        store.kill()
        with open(self.folder / "gcs.log", "a") as file:
            self._gcs.append(subprocess.Popen(arguments, env=variables, stdout=file, stderr=file))

    def kill(self) -> None:
        """End both nodes and all that runs on them, at once."""
        kill([process for node in self.nodes() for process in node.processes()])
        for process in (*(node.process for node in self.nodes()), *self._gcs):
            process.kill()
            process.wait()
        self.head = self.second = None

    def _node(self, arguments: list[str], variables: dict[str, str] | None = None) -> Node:
        self._number += 1
        return Node([f"--num-cpus={self.cpus}", "--num-gpus=0", f"--dashboard-agent-listen-port={free_port()}", *arguments],
                    self.folder / f"node{self._number}.log", {**self.variables, **(variables or {})})
