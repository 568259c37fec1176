"""What a running command is at, in a small file of the run's folder that is written anew every two seconds. ``why`` reads the file.

A thread of its own writes it, so that it also tells of a command whose main thread stands still.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import psutil

from cosmos_ray.errors import CosmosRayError
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.supervision import Supervisor

logger = logging.getLogger(__name__)

PULSE_S = 2.0
FRAMES = 12  #: of the main thread's stack, the innermost ones


def pulse_file(folder: Path) -> Path:
    """Where the run in ``folder`` keeps its pulse while a command works on it."""
    return folder / ".pulse.json"


class Pulse:
    """Writes ``file`` until :meth:`close`, which removes the file: one that is there without its process belongs to a command that died."""

    def __init__(self, file: Path, supervisor: Supervisor, cluster: str = "", every_s: float = PULSE_S):
        self._file, self._supervisor, self._cluster, self._every = file, supervisor, cluster, every_s
        self._main, self._ended = threading.main_thread().ident, threading.Event()
        me = psutil.Process()
        command = " ".join(["cosmos_ray", *sys.argv[1:]])
        self._me = {"pid": me.pid, "host": socket.gethostname(), "began": me.create_time(), "command": command[:400]}
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._thread.start()

    def now(self) -> dict[str, Any]:
        """What is written: who, when, where the main thread is, what the supervisor knows."""
        frame = sys._current_frames().get(self._main or 0)
        stack = [f"{entry.name} ({_short(entry.filename)}:{entry.lineno})" for entry in traceback.extract_stack(frame)[-FRAMES:]]
        return {**self._me, "time": time.time(), "every_s": self._every, "cluster": self._cluster, "stack": stack[::-1],
                **self._supervisor.state()}

    def _beat(self) -> None:
        failed = False
        while True:
            try:
                replace(json.dumps(self.now()).encode(), self._file)
                failed = False
            except (OSError, CosmosRayError, RuntimeError) as error:  # a full disk; a table that changed while it was read
                if not failed:
                    logger.debug("the pulse of %s was not written: %s", self._file.parent, error)
                failed = True
            if self._ended.wait(self._every):
                return

    def close(self) -> None:
        """The command ends as it should."""
        self._ended.set()
        self._thread.join()
        self._file.unlink(missing_ok=True)


def read_pulse(folder: Path) -> dict[str, Any] | None:
    """The last pulse of the run in ``folder``; None where no command works on it, or its file cannot be read."""
    try:
        found = json.loads(pulse_file(folder).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def lives(pulse: dict[str, Any]) -> bool | None:
    """Whether the process of a pulse is there; None where it is on another machine."""
    if pulse["host"] != socket.gethostname():
        return None
    try:
        return abs(psutil.Process(pulse["pid"]).create_time() - pulse["began"]) < 1.0
    except psutil.NoSuchProcess:
        return False


def _short(file: str) -> str:
    return os.sep.join(Path(file).parts[-2:])
