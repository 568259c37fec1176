"""The pages for readers: a short README, and no path, link or command that does not exist."""

from __future__ import annotations

import re
import shlex

import pytest

from cosmos_ray.commands import cli
from tests.imports import ROOT

README_LINES = 110
PAGES = ("README.md", "CONTRIBUTING.md", "cluster/README.md",
         *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
PATH = re.compile(r"(?<![\w/.-])((?:cosmos_ray|jobs|tests|cluster|docs)/[\w./*-]*[\w*/])")  # from the repository's root, with stars or not
GYM_ID = re.compile(r"cosmos_ray/[\w-]+-v\d+")  # no path: what gymnasium calls one of our environments
OLD = ("docs/results/log.md",)  # a log may name what is gone


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """What links can name: the headings of a page, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(read("README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", [page for page in PAGES if page not in OLD])
def test_paths_exist(page):
    missing = [path for path in PATH.findall(read(page)) if not list(ROOT.glob(path.rstrip("/"))) and not GYM_ID.fullmatch(path)]
    assert not missing, f"{page} names what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    missing = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", read(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            missing.append(link)
    assert not missing, f"{page} links to what is not there: {missing}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    """Every `python -m cosmos_ray ...` that names no placeholder in capitals parses, flags and choices included."""
    text = read(page).replace("\\\n", " ")
    for line in re.findall(r"python -m cosmos_ray ([a-z][^`\n#]*)", text):
        words = shlex.split(line.replace("...", "1,0,0"))
        if not any(re.fullmatch(r"--planner\.FIELD", word) for word in words):
            cli._parse(words)
