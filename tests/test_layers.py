"""Imports go down the layers that docs/architecture.md draws. The list there is the only one: this test reads the drawing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from tests.imports import ROOT, Import, files, imports, read

#: Besides the rooms of the drawing: what `from cosmos_ray.replay import ...` imports, which only rooms above replay may do.
FACE = "replay.__init__"


@cache
def layers() -> tuple[tuple[str, ...], ...]:
    """The rooms of each layer, from the top of the drawing to its bottom.

    A line of the drawing is rooms with commas between them, two spaces or more, and what they are.
    """
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawings = re.findall(r"^```layers\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(drawings) == 1, "docs/architecture.md has one block of ```layers"
    return tuple(tuple(re.split(r"\s{2,}", line, maxsplit=1)[0].split(", ")) for line in drawings[0].splitlines())


@cache
def depths() -> dict[str, int]:
    """Line of each room in the drawing, 0 at the top. The face of replay is on the line of replay's topmost room."""
    lines = {room: i for i, rooms in enumerate(layers()) for room in rooms}
    return {**lines, FACE: min(line for room, line in lines.items() if room.split(".")[0] == "replay")}


def room_of(target: str) -> str | None:
    """The room of a dotted module or of a name in one: `cosmos_ray.replay.format.schema` is in replay.format.

    None for the package itself, which only has its version.
    """
    parts = target.split(".")[1:]
    if not parts or not (ROOT / "cosmos_ray" / parts[0]).is_dir() and not (ROOT / "cosmos_ray" / f"{parts[0]}.py").is_file():
        return None
    if parts[0] == "replay" and (len(parts) == 1 or not _is_module(parts[:2])):
        return FACE
    return next((room for n in (2, 1) if (room := ".".join(parts[:n])) in depths()), parts[0])


def _is_module(parts: list[str]) -> bool:
    path = ROOT / "cosmos_ray" / "/".join(parts)
    return parts[-1] != "__init__" and (path.is_dir() or path.with_suffix(".py").is_file())


def module_of(file: str) -> str:
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def upward(found: Iterable[Import]) -> list[str]:
    """Imports of the package within itself that go up the drawing. A module that the drawing lacks is another test's matter."""
    out = []
    for one in found:
        source, target = room_of(module_of(one.file)), room_of(one.target) if one.target.split(".")[0] == "cosmos_ray" else None
        if source in depths() and target in depths() and depths()[source] > depths()[target]:
            out.append(f"{one}: {target} is above {source}")
    return out


def test_every_module_is_in_the_drawing_and_every_room_of_it_exists():
    listed = [room for layer in layers() for room in layer]
    assert len(listed) == len(set(listed))
    found = {room for path in files("cosmos_ray") if (room := room_of(module_of(str(path.relative_to(ROOT)))))} - {FACE}
    assert found - set(listed) == set(), "these are in no layer of docs/architecture.md"
    assert set(listed) - found == set(), "docs/architecture.md draws these, and there are none"


def test_no_import_goes_up():
    """Type-only imports and those inside functions count."""
    up = upward(imports("cosmos_ray"))
    assert not up, "imports against docs/architecture.md:\n" + "\n".join(up)


def test_an_import_that_goes_up_is_found_wherever_it_stands():
    text = """
from typing import TYPE_CHECKING
from cosmos_ray import errors, run
from cosmos_ray.replay import ReplayStore
if TYPE_CHECKING:
    from cosmos_ray.stages.refine import refine
def f():
    import cosmos_ray.report.build
"""
    up = "cosmos_ray/{}:{} imports cosmos_ray.{}: {} is above {}"
    assert upward(read("cosmos_ray/planning/x.py", text)) == [
        up.format("planning/x.py", 3, "run", "run", "planning"),
        up.format("planning/x.py", 6, "stages.refine.refine", "stages", "planning"),
        up.format("planning/x.py", 8, "report.build", "report", "planning")]
    assert upward(read("cosmos_ray/replay/format/x.py", "from cosmos_ray.replay import ReplayStore\nfrom ..store import ReplayStore")) == [
        up.format("replay/format/x.py", 1, "replay.ReplayStore", FACE, "replay.format"),
        up.format("replay/format/x.py", 2, "replay.store.ReplayStore", "replay", "replay.format")]
    assert upward(read("cosmos_ray/stages/x.py", text)) == []


def test_the_package_needs_neither_jobs_nor_tests():
    assert [str(found) for found in imports("cosmos_ray") if found.target.split(".")[0] in ("jobs", "tests")] == []
    assert [str(found) for found in imports("jobs") if found.target.split(".")[0] == "tests"] == []


def test_the_tests_that_the_page_names_exist():
    named = set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")))
    assert len(named) > 10 and sorted(named - {path.name for path in files("tests")}) == []
