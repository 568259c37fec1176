"""Reads what the project's files import, from their syntax trees: nothing is run, and imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = ("cosmos_ray", "jobs", "tests")


@dataclass(frozen=True)
class Import:
    """One imported module or name."""

    file: str  #: relative to the repository
    line: int
    target: str  #: dotted: "cosmos_ray.replay.store.ReplayStore", "numpy"
    local: bool  #: inside a function or a method

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def files(tree: str) -> list[Path]:
    """Every Python file below a folder of the repository."""
    return sorted((ROOT / tree).rglob("*.py"))


@cache
def imports(tree: str) -> tuple[Import, ...]:
    """Every import of every file below ``tree``: those for type checkers and those inside functions as well."""
    return tuple(found for path in files(tree) for found in read(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))


def read(file: str, text: str) -> Iterator[Import]:
    """The imports of one file's ``text``; ``file`` is its path in the repository."""
    package = list(Path(file).parts[:-1])

    def walk(node: ast.AST, local: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(file, node.lineno, alias.name, local) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(file, node.lineno, f"{module}.{alias.name}", local) for alias in node.names)
        inside = local or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(text), False)
