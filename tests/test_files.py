"""Limits that keep the project readable: short files, a short README, types without exceptions."""

from __future__ import annotations

import re
import tomllib

from tests.imports import ROOT, TREES, files

LINES = 400
README_LINES = 110


PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}" for name in ("architecture.md", "model.md", "replay.md", "running.md")))
PATH = re.compile(r"(?<![\w/.-])((?:cosmos_ray|jobs|tests|cluster|docs)/[\w./*-]*[\w*/])")


def length(path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long():
    paths = [*(path for tree in TREES for path in files(tree)), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    long = {str(path.relative_to(ROOT)): lines for path in paths if (lines := length(path)) > LINES}
    assert not long, f"split by subject what has more than {LINES} lines: {long}"


def test_the_readme_is_short():
    assert length(ROOT / "README.md") <= README_LINES


def test_the_pages_name_files_that_exist():
    """Paths from the repository's root, with or without a star; and what a page links to."""
    missing = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        missing += [f"{page}: {path}" for path in PATH.findall(text) if not list(ROOT.glob(path.rstrip("/")))]
        links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
        missing += [f"{page}: {link}" for link in links if not (ROOT / page).parent.joinpath(link).exists()]
    assert not missing, "\n".join(missing)


def test_types_are_checked_without_exceptions():
    """`make lint` checks these packages: nothing in them is left out by a comment."""
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["packages"]
    assert {"cosmos_ray." + room for room in ("model", "planning", "replay", "rollout", "inference", "learner")} <= set(checked)
    ignored = [f"{path.relative_to(ROOT)}:{number}" for package in checked for path in files(package.replace(".", "/"))
               for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1) if "type: ignore" in line]
    assert not ignored, f"say the type instead of ignoring it: {ignored}"
