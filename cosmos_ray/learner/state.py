"""Resumable learner state on disk: which numbers it holds by name, whether it is whole, and which one is the newest.

A state is a folder ``step_XXXXXXXX``. Each rank writes the slices that it optimises as float32 safetensors, under the names of their
parameters, so any number of ranks with any ZeRO stage reads what it needs. The description is written last, with the size and CRC-32 of
every file: a folder whose description does not verify is no state. Nothing in a state is a pickle.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from cosmos_ray.errors import CheckpointError
from cosmos_ray.replay.files.durable import replace
from cosmos_ray.replay.format.checksum import crc32

DESCRIPTION = "state.json"
WEIGHT, AVERAGE = "weight", "average"
MOMENTS = ("exp_avg", "exp_avg_sq")  #: of AdamW
BLOCK = 1 << 24  #: bytes that are read at once to verify a file


class Piece(NamedTuple):
    """Consecutive numbers of a parameter."""

    kind: str  #: :data:`WEIGHT`, :data:`AVERAGE` or one of :data:`MOMENTS`
    name: str  #: of the parameter
    start: int  #: of the first number in the flattened parameter
    numbers: torch.Tensor  #: (n,) float32


class TornState(Exception):
    """A state that is not whole; the text says what is wrong with which file."""


def write_file(data: Iterable[bytes | memoryview], file: Path) -> dict[str, int]:
    """Write ``data`` durably; returns the file's ``bytes`` and ``crc32``."""
    size = checksum = 0
    with open(file, "wb") as opened:
        for block in data:
            opened.write(block)
            size, checksum = size + memoryview(block).nbytes, crc32(block, checksum)
        opened.flush()
        os.fsync(opened.fileno())
    return {"bytes": size, "crc32": checksum}


def write_pieces(pieces: list[Piece], file: Path) -> dict[str, int]:
    """Write ``pieces`` as safetensors, one at a time in memory; returns the file's ``bytes`` and ``crc32``."""
    header, end = {}, 0
    for piece in pieces:
        begin, end = end, end + 4 * piece.numbers.numel()
        header[f"{piece.kind}:{piece.name}:{piece.start}"] = {"dtype": "F32", "shape": [piece.numbers.numel()],
                                                              "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = (piece.numbers.detach().cpu().numpy().view(np.uint8).data for piece in pieces)
    return write_file(chain([struct.pack("<Q", len(text)) + text], numbers), file)


def describe(folder: Path, values: dict[str, Any], files: dict[str, dict[str, int]]) -> None:
    """Make ``folder`` a state: write its description, of ``values`` and of the ``files`` by name, whole or not at all."""
    content = {**values, "files": files}
    replace(json.dumps({"state": content, "crc32": _digest(content)}, indent=1).encode(), folder / DESCRIPTION)


def newest_whole(folder: Path) -> tuple[str | None, list[str]]:
    """The name of the newest whole state in ``folder``, None where there is none yet; and a line for each newer one that is not whole.

    CheckpointError when states are there and all of them are damaged, or when an earlier version of cosmos_ray wrote them.
    """
    torn, notes = False, []
    for state in sorted(folder.glob("step_*"), reverse=True):
        if not (state / DESCRIPTION).exists():
            notes.append(f"{state.name} was not finished")
            continue
        try:
            LearnerState(state).verify()
            return state.name, notes
        except TornState as error:
            torn = True
            notes.append(f"{state.name} is damaged ({error})")
    if (folder / "latest").exists():
        raise CheckpointError(f"learner state in {folder} was written by an earlier version of cosmos_ray: finish this stage with that "
                              f"version, or delete {folder} to begin this stage anew, the rest of the run stays")
    if torn:
        raise CheckpointError(f"no learner state in {folder} is whole: {'; '.join(notes)}; delete {folder} to begin this stage anew, the "
                              "rest of the run stays")
    return None, notes


class LearnerState:
    """A state that is read. TornState where its description cannot be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            record = json.loads((folder / DESCRIPTION).read_text())
            self.values: dict[str, Any] = record["state"]
            whole = _digest(self.values) == record["crc32"]
            self.files: dict[str, dict[str, int]] = self.values["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TornState(f"{DESCRIPTION} cannot be read: {_reason(error)}") from error
        if not whole:
            raise TornState(f"{DESCRIPTION} does not match its checksum")
        self._places: dict[tuple[str, str], list[tuple[int, str, str]]] | None = None  #: kind, name -> start, file, key
        self._open: dict[str, Any] = {}

    def verify(self) -> None:
        """Read every file once; TornState names the first that is missing, cut short or changed."""
        for name, known in self.files.items():
            size = checksum = 0
            try:
                with open(self.folder / name, "rb") as opened:
                    while block := opened.read(BLOCK):
                        size, checksum = size + len(block), crc32(block, checksum)
            except OSError as error:
                raise TornState(f"{name} cannot be read: {_reason(error)}") from error
            if size != known["bytes"]:
                raise TornState(f"{name} has {size} of {known['bytes']} bytes")
            if checksum != known["crc32"]:
                raise TornState(f"{name} does not match its checksum")

    def read(self, kind: str, name: str, start: int, count: int) -> torch.Tensor:
        """(count,) float32 numbers of parameter ``name`` from ``start`` on. KeyError when the state does not have all of them."""
        out = torch.empty(count)
        missing = count
        for begin, file, key in self._index().get((kind, name), []):
            piece = self._open[file].get_slice(key)
            first, last = max(start, begin), min(start + count, begin + piece.get_shape()[0])
            if first < last:
                out[first - start : last - start] = piece[first - begin : last - begin]
                missing -= last - first
        if missing:
            raise KeyError(f"{missing} of {count} numbers of {kind} {name}")
        return out

    def has(self, kind: str) -> bool:
        """Whether there is anything of ``kind``."""
        return any(known == kind for known, _ in self._index())

    def text(self, name: str) -> dict[str, Any] | None:
        """The JSON file ``name``; None if the state has none."""
        return json.loads((self.folder / name).read_text()) if name in self.files else None

    def _index(self) -> dict[tuple[str, str], list[tuple[int, str, str]]]:
        if self._places is None:
            self._places = {}
            for file in (name for name in self.files if name.endswith(".safetensors")):
                try:
                    self._open[file] = safe_open(self.folder / file, "pt")
                except SafetensorError as error:
                    raise TornState(f"{file} is no safetensors file: {error}") from error
                for key in self._open[file].keys():
                    kind, name, start = key.split(":")
                    self._places.setdefault((kind, name), []).append((int(start), file, key))
        return self._places


def _digest(values: dict[str, Any]) -> int:
    return crc32(json.dumps(values, sort_keys=True).encode())


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
