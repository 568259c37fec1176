"""The instruction of a demonstration, from every place where LIBERO, robomimic, RoboCasa and robosuite files keep one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from cosmos_ray.config.libero import words_of_name
from cosmos_ray.config.tasks import SPECS
from cosmos_ray.errors import StoreError
from cosmos_ray.replay.exchange import hdf5

_PLAIN = ("task_description", "language_instruction", "language", "lang", "instruction", "env_lang")
_TABLES = ("ep_meta", "problem_info", "env_args", "env_info")  # JSON objects as text
_BDDL = ("bddl_file_name", "bddl_file")  # LIBERO: the file that describes the task, named after its instruction
_LONGEST = 1000  # characters


def instruction_of(path: Path, data: h5py.Group, demo: h5py.Group) -> tuple[str, str]:
    """The instruction of ``demo`` of the file ``path`` and where it stands.

    In this order: what the demonstration says of itself; what its file says of all; the name of LIBERO's task description; the instruction
    of a task that this package knows; and the file's name where it ends with ``_demo``, the rule of the public cosmos-policy loader.
    StoreError that asks for ``--instruction`` where none of them says it.
    """
    for node, of in ((demo, "the demonstration's"), (data, "the file's")):
        for text, where in _said(node):
            return text, f"{of} {where}"
    for table in (*_tables(data), {name: hdf5.attribute(data, name) for name in _BDDL}):
        for name in _BDDL:
            if isinstance(table.get(name), str) and (text := words_of_name(table[name].rpartition("/")[2].removesuffix(".bddl"))):
                return text, f"the name in {name}"
    task = environment_of(data)
    if task in SPECS:
        return SPECS[task].instruction, f"the task {task}"
    if path.stem.endswith("_demo") and (text := words_of_name(path.stem.removesuffix("_demo"))):
        return text, "the file's name, as the public loader takes it"
    raise StoreError(f"neither {path.name} nor {demo.name} says what the robot was asked to do: give --instruction TEXT")


def environment_of(data: h5py.Group) -> str:
    """The name of the simulated task, empty where the file has none."""
    named = [table.get("env_name") for table in _tables(data)] + [hdf5.attribute(data, "env")]
    return next((name for name in named if isinstance(name, str) and name), "")


def table_of(node: h5py.Group, name: str) -> dict[str, Any]:
    """The JSON object in the attribute ``name``, empty where there is none."""
    try:
        found = json.loads(hdf5.attribute(node, name, "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _tables(node: h5py.Group) -> list[dict[str, Any]]:
    """The JSON objects of a group, and the ``env_kwargs`` inside them."""
    tables = [table_of(node, name) for name in _TABLES]
    return tables + [table["env_kwargs"] for table in tables if isinstance(table.get("env_kwargs"), dict)]


def _said(node: h5py.Group) -> Iterator[tuple[str, str]]:
    """Texts of a group, in attributes, in JSON attributes and in datasets of one text, and where each stands."""
    for name in _PLAIN:
        if text := _text(hdf5.attribute(node, name)):
            yield text, f"attribute {name}"
    for name in _TABLES:
        table = table_of(node, name)
        inside = table.get("env_kwargs")
        for found in (table, inside if isinstance(inside, dict) else {}):
            for key in _PLAIN:
                if text := _text(found.get(key)):
                    yield text, f'{name}["{key}"]'
    for name in _PLAIN:
        if text := _text(hdf5.text(node, name)):
            yield text, f"dataset {name}"


def _text(value: Any) -> str:
    """One line of text; LIBERO keeps it as a list of pieces, in quotes. Empty for anything else."""
    if isinstance(value, list) and all(isinstance(piece, str) for piece in value):
        value = "".join(value)
    return " ".join(value.split()).strip('"')[:_LONGEST] if isinstance(value, str) else ""
