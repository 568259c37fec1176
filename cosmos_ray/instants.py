"""Instants of a run that somebody outside may watch, or hold a process at. Nothing happens unless ``$COSMOS_RAY_INSTANTS`` names a folder.

A process that passes an instant adds a line "seconds pid name" to the file ``passed`` there. If the folder holds a file with the name of
the instant, one process takes the file (it becomes ``NAME.PID``) and stops itself until it gets SIGCONT. `jobs/chaos/loop.py` kills
processes at such instants.
"""

from __future__ import annotations

import os
import signal
import time

VARIABLE = "COSMOS_RAY_INSTANTS"


def passes(name: str) -> None:
    """This process is in the middle of ``name``: "chunk" of control steps, "answer" to a batch of requests, "commit" of an episode,
    training "step", "checkpoint" of the learner, "publish" of the learner's weights, "push" into an inference actor."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    with open(os.path.join(folder, "passed"), "a") as file:
        file.write(f"{time.time():.3f} {os.getpid()} {name}\n")  # one write: lines of several processes do not mix
    try:
        os.rename(os.path.join(folder, name), os.path.join(folder, f"{name}.{os.getpid()}"))
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGSTOP)
