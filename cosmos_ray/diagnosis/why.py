"""Who waits on whom in a running command, as text: from the pulse that the command leaves, and from the stacks of its processes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from cosmos_ray.diagnosis.pulse import PULSE_S
from cosmos_ray.diagnosis.stacks import Doing
from cosmos_ray.progress import clock

LATE = 5  #: pulses that may be missing


def explain(run: str, pulse: Mapping[str, Any], lives: bool | None, doing: Mapping[str, Sequence[Doing]], now: float | None = None) -> str:
    """The whole text.

    Args:
        pulse: of :func:`read_pulse`.
        lives: of :func:`lives`.
        doing: node -> its processes.
        now: seconds of ``time.time``.
    """
    now = time.time() if now is None else now
    age, views = max(0.0, now - pulse["time"]), pulse.get("views", {})
    who = f"process {pulse['pid']} on {pulse['host']}"
    lines = [f"{run}: `{pulse['command']}`, {who}, {clock(now - pulse['began'])} since its start"]
    if lives is False:
        lines.append(f"  the process has ended without a word, {clock(age)} after its last sign or sooner (killed, or out of memory: see "
                     "`dmesg`): the same command continues")
    elif age > LATE * pulse.get("every_s", PULSE_S):
        lines.append(f"  no sign for {clock(age)}: " + ("the process is stopped, or its disk is full or does not answer" if lives else
                                                        "its machine is gone, or does not write to the shared folder any more"))
    for row in views.get("progress", ()):
        far = f"{row['what']} {row['done']}/{row['total']} {row['unit']}, {clock(row['seconds'])} so far"
        lines.append(f"  at {far}; {row['note']}".rstrip("; "))
    lines += _section("waits", [f"{row['who']} for {row['on']}, {row['seconds']:.0f} s" for row in
                                sorted(pulse.get("waiting", ()), key=lambda row: -row["seconds"])], "nobody has waited for long")
    for what, rows in views.items():
        if what != "progress":
            lines += _section(what, [row_text(row) for row in rows], "none")
    oldest = [(row["oldest_s"], row["oldest"], row["who"]) for rows in views.values() for row in rows if row.get("oldest")]
    if oldest:
        seconds, name, holder = max(oldest)
        lines += _section("oldest ticket", [f"{name}, with {holder} for {seconds:.0f} s"], "")
    if pulse.get("deaths"):
        lines += _section("deaths, the last ones", [f"{row['who']} ({row['why']}), {clock(now - row['time'])} ago: {row['then']}"
                                                    for row in pulse["deaths"]], "")
    lines += _section("the command itself", [" < ".join(pulse.get("stack", ())[:4])], "")
    for node, processes in doing.items():
        lines += _section(f"processes on {node}", [f"{one.name} (pid {one.pid}), {one.cpu:.0f} % CPU, {one.memory_mb:.0f} MB: "
                                                   + " < ".join(one.stack[:4]) for one in processes], "none is seen")
    return "\n".join(lines)


def _section(title: str, rows: Sequence[str], none: str) -> list[str]:
    return [title, *(f"  {row}" for row in rows or [none])] if rows or none else []


def row_text(row: Mapping[str, Any]) -> str:
    """One row of a view of workers, inference actors or the learner, as a line."""
    if "tickets" in row:  # of a fleet
        asked = "" if row["asked_s"] is None else f", asked {row['asked_s']:.0f} s ago"
        waits = f"; waits for {row['waits_for']}" if row["waits_for"] else ""
        return f"{row['who']} on {row['where']}: {row['tickets']} tickets{asked}{waits}"
    if "computing" in row:  # of the pool
        behind = f", should hold {row['wanted']}" if row["wanted"] not in (None, row["version"]) else ""
        taking = "" if row["taking_s"] is None else f", takes it since {row['taking_s']:.0f} s"
        lost = ", its process is gone" if row["lost"] else ""
        return (f"{row['who']}: policy version {row['version']}{behind}{taking}, answered {row['answered_s']:.0f} s ago{lost}; "
                f"{row['computing']} rows computed, {row['waiting']} wait")
    return f"{row['who']}: step {row['step']}, {row['does']}, for {row['since_s']:.0f} s" + (
        f"; started again {row['restarts']} times" if row["restarts"] else "")
