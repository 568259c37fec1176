"""One line of progress: what, how far, how fast, time left."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO


def clock(seconds: float) -> str:
    """Seconds as ``m:ss``."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def say(text: str, quiet: bool = False) -> None:
    """A line of its own among progress lines; nothing when ``quiet``."""
    if not quiet:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class Progress:
    """A progress line: redrawn on a terminal, repeated every ``every`` seconds elsewhere.

    ``quiet`` writes nothing (for use as a library, and in tests).
    """

    def __init__(self, what: str, total: int, done: int = 0, unit: str = "", stream: TextIO | None = None, every: float = 15.0,
                 quiet: bool = False):
        self.what, self.total, self.unit, self.every, self.quiet = what, max(1, total), unit, every, quiet
        self.stream = stream or sys.stderr
        self._start, self._began_at = done, time.monotonic()
        self._done, self._note = done, ""
        self._written = 0.0
        self._live = self.stream.isatty()

    def update(self, done: int, note: str = "") -> None:
        """Show that ``done`` of the ``total`` units are done."""
        now, self._done, self._note = time.monotonic(), done, note
        if self.quiet or now - self._written < (0.2 if self._live else self.every):
            return
        self._written = now
        self._write(self._line(done, note), end="" if self._live else "\n")

    def state(self) -> dict[str, Any]:
        """{what, done, total, unit, note, seconds, left_s} so far; ``left_s`` is None while the rate is not known."""
        seconds, here = time.monotonic() - self._began_at, self._done - self._start
        left = (self.total - self._done) * seconds / here if here > 0 else None
        return {"what": self.what, "done": self._done, "total": self.total, "unit": self.unit, "note": self._note,
                "seconds": round(seconds, 1), "left_s": None if left is None else round(left, 1)}

    def finish(self, done: int, note: str = "") -> None:
        """Write the last line, with the time that the work took."""
        self._done, self._note = done, note
        if not self.quiet:
            took = time.monotonic() - self._began_at
            self._write(f"{self.what:<9} {done}/{self.total} {self.unit}  {note}  took {clock(took)}", end="\n")

    def _line(self, done: int, note: str) -> str:
        elapsed = time.monotonic() - self._began_at
        rate = (done - self._start) / elapsed if elapsed > 0 else 0.0
        left = clock((self.total - done) / rate) if rate > 0 else "?"
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.0f}/min"
        return f"{self.what:<9} {done}/{self.total} {self.unit}  {100 * done // self.total:3d} %  {speed}  left {left}  {note}"

    def _write(self, line: str, end: str) -> None:
        self.stream.write(f"\r\x1b[2K{line}{end}" if self._live else f"{line}{end}")
        self.stream.flush()
