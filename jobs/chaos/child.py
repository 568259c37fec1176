"""A forked child: all imports are done, it starts within milliseconds, and it reports by whole lines on a pipe."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable


class Child:
    """``work(say)`` running in a forked process; ``say(text)`` writes one line in one write to a pipe without a buffer.

    An exception in ``work`` is sent as a line ``error <json>`` and the exit status is 1. Only for a parent that has no threads
    of its own. ``log`` is a file for whatever the child or a native library prints.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], None], log: str) -> None:
        self.lines: list[str] = []  # whole ones; what a killed child had half written is no line
        self.status: int | None = None  # as of os.waitstatus_to_exitcode
        self._rest = b""
        self.pipe, writing = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            os.set_blocking(self.pipe, False)
            return
        os.close(self.pipe)
        code = 1
        try:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(target, 1)
            os.dup2(target, 2)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

            def say(text: str) -> None:
                os.write(writing, text.encode() + b"\n")

            try:
                work(say)
                code = 0
            except BaseException:
                say("error " + json.dumps(traceback.format_exc()[-4000:]))
        finally:
            sys.stderr.flush()
            os._exit(code)

    def read(self) -> list[str]:
        """The lines that have arrived since the last call."""
        chunks = [self._rest]
        while True:
            try:
                chunk = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                break
            chunks.append(chunk)
        *lines, self._rest = b"".join(chunks).split(b"\n")
        fresh = [line.decode() for line in lines]
        self.lines += fresh
        return fresh

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._close(status)
        return self.status is not None

    def kill(self) -> bool:
        """SIGKILL; True if that is what ended it, False if it had ended before."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._close(os.waitpid(self.pid, 0)[1])
        return self.status == -signal.SIGKILL

    def error(self) -> str:
        """The traceback it sent, or how it ended."""
        sent = [json.loads(line[6:]) for line in self.lines if line.startswith("error ")]
        return sent[0] if sent else f"ended with status {self.status}"

    def _close(self, status: int) -> None:
        self.status = os.waitstatus_to_exitcode(status)
        self.read()
        os.close(self.pipe)
