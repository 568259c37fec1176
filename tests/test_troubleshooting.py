"""docs/troubleshooting.md quotes messages that the program really prints."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.imports import ROOT, files

PAGE = ROOT / "docs" / "troubleshooting.md"
VARIABLE = "…"  #: stands on the page for what differs from case to case


def quoted() -> list[str]:
    """The messages of the page: what stands in backticks in the first cell of each row."""
    cells = re.findall(r"^\| (.*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]


@cache
def printed() -> tuple[str, ...]:
    """Every text in the package but docstrings, with its parts joined and a mark for what is put in; and the set-up script's lines."""
    texts = (ROOT / "cluster" / "setup.sh").read_text(encoding="utf-8").splitlines()
    for path in [*files("cosmos_ray"), ROOT / "jobs" / "submit.py"]:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        documentation = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in documentation:
                continue
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else VARIABLE for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return tuple(texts)


def test_the_page_quotes_messages():
    assert len(quoted()) >= 30


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_that_the_program_prints(message):
    pattern = re.compile(".*".join(map(re.escape, map(str.strip, message.split(VARIABLE)))))
    assert any(map(pattern.search, printed())), f"no text of the program has these words: change the page, or the message: {message}"
