"""Pickles from outside: an allow-list names everything that may be built; anything else is refused before it can run."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from typing import IO, Any

from cosmos_ray.errors import CheckpointError

#: What a damaged pickle makes ``pickle`` and ``torch.load`` raise, besides their own UnpicklingError.
DAMAGED = (pickle.UnpicklingError, EOFError, ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError,
           TypeError, ValueError, struct.error, zipfile.BadZipFile)


def load(file: IO[bytes], allowed: Mapping[tuple[str, str], Any], where: str) -> Any:
    """Unpickle one object from ``file``.

    Args:
        file: open for reading, at the pickle.
        allowed: {(module, name) as the pickle spells them: what to use for it}.
        where: the file's name for error lines.

    Raises CheckpointError for a pickle that names anything else, and for a damaged one.
    """
    try:
        return _Unpickler(file, allowed, where).load()
    except DAMAGED as error:
        reason = str(error).partition("\n")[0] or "it ends too early"
        raise CheckpointError(f"{where} is no pickle or a damaged one ({reason}): copy it again") from error


_build = pickle._Unpickler.dispatch[pickle.BUILD[0]]


def _checked_build(unpickler: Any) -> None:
    """The BUILD step, which sets attributes; only on objects of allowed types."""
    if not isinstance(unpickler.stack[-2], tuple(kind for kind in unpickler.allowed.values() if isinstance(kind, type))):
        raise pickle.UnpicklingError(f"it sets attributes of a {type(unpickler.stack[-2]).__name__}")
    _build(unpickler)


class _Unpickler(pickle._Unpickler):
    """The unpickler in pure Python. The one in C sets attributes on anything the pickle names, classes and functions included."""

    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _checked_build}

    def __init__(self, file: IO[bytes], allowed: Mapping[tuple[str, str], Any], where: str):
        super().__init__(file)
        self.allowed, self._where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            wanted = repr(f"{module}.{name}")[1:-1]
            raise CheckpointError(f"{self._where} asks for {wanted} while it is unpickled, which could run any code: refused; "
                                  "get a file that holds nothing but tensors, for instance as .safetensors")
        return self.allowed[module, name]
