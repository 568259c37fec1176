"""Runs ``reach_cases.py`` in a process of its own: its driver joins another cluster than the one that the other tests share."""

import os
import subprocess
import sys

from tests.conftest import ROOT, environment


def test_nodes_that_do_not_reach_the_run_are_named():
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-ra", "tests/reach_cases.py"], cwd=ROOT, env=environment(), text=True,
                          capture_output=True, timeout=400)
    assert done.returncode == os.EX_OK, done.stdout[-8000:] + done.stderr[-2000:]
