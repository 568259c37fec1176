"""cluster/setup.sh and a virtual environment that it cannot use. No package is fetched: pip has no index."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def set_up(venv: Path, **variables: str) -> str:
    """What the script says, which ends when pip finds no package at the latest."""
    done = subprocess.run(["bash", ROOT / "cluster" / "setup.sh", venv], env={**os.environ, "PIP_NO_INDEX": "1", **variables},
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    return done.stderr


def interpreter(folder: Path, version: str) -> Path:
    """Something that says that it is a Python of ``version``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python").write_text(f"#!/bin/sh\necho {version}\n")
    (folder / "python").chmod(0o755)
    return folder / "python"


@pytest.mark.parametrize("version, named", [("3.10", "of Python 3.10"), ("3.13", "of Python 3.13"), ("", "of a Python that is gone")])
def test_a_venv_of_another_python_is_set_up_anew_and_that_is_said(version, named, tmp_path):
    venv = tmp_path / "venv"
    interpreter(venv / "bin", version)
    (venv / "pyvenv.cfg").write_text("")
    (venv / "old").write_text("")
    said = set_up(venv)
    assert f"setup: {venv} is {named}, not of Python 3.11 or 3.12: setting it up anew" in said
    assert not (venv / "old").exists()


def test_a_folder_that_is_no_venv_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    assert f"{tmp_path / 'work'} exists and is no virtual environment: move it away" in set_up(tmp_path / "work")
    assert (tmp_path / "work" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("version", ["3.10", "3.13", "3.1", "2.7"])
def test_a_python_that_was_chosen_and_does_not_fit_is_refused(version, tmp_path):
    said = set_up(tmp_path / "venv", PYTHON=str(interpreter(tmp_path / "other", version)))
    assert f"is Python {version}: set it to Python 3.11 or 3.12" in said and not (tmp_path / "venv").exists()


def test_the_tests_run_on_a_python_that_the_package_takes():
    assert sys.version_info[:2] in ((3, 11), (3, 12))
    assert 'requires-python = ">=3.11,<3.13"' in (ROOT / "pyproject.toml").read_text()
