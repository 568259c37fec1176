"""The benchmark of pushes at toy size: both figures are written."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT, environment


@pytest.mark.slow
def test_the_benchmark_of_pushes_writes_both_figures(tmp_path):
    sizes = ["--megabytes", "8", "--rounds", "2", "--seconds", "1", "--json", tmp_path / "out.json"]
    done = subprocess.run([sys.executable, "jobs/bench/weights.py", *sizes], cwd=ROOT, env=environment(), capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures.keys() == {"inference_during_push", "push_over_memcpy_8mb"} and all(figure > 0 for figure in figures.values())
