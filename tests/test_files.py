"""Limits that keep the code readable: short files, and types without exceptions."""

from __future__ import annotations

import tomllib

from tests.imports import ROOT, TREES, files

LINES = 400


def length(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long():
    paths = [*(path for tree in TREES for path in files(tree)), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    long = {str(path.relative_to(ROOT)): lines for path in paths if (lines := length(path)) > LINES}
    assert not long, f"split by subject what has more than {LINES} lines: {long}"


def test_types_are_checked_without_exceptions():
    """`make lint` checks these packages: nothing in them is left out by a comment."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert {"cosmos_ray." + room for room in ("model", "planning", "replay", "rollout", "inference", "learner")} <= set(checked)
    ignored = [f"{path.relative_to(ROOT)}:{number}" for package in checked for path in files(package.replace(".", "/"))
               for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1) if "type: ignore" in line]
    assert not ignored, f"say the type instead of ignoring it: {ignored}"
