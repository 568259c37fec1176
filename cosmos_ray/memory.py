"""Memory that ran out, of a GPU or of the machine, as one line that says which setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cosmos_ray.errors import OutOfMemory

#: In the texts with which torch and CUDA libraries report it; torch's own class is a RuntimeError like the others.
MARKS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Run the block; OutOfMemory with ``advice`` when it needs more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error) or "no memory is left"
        if not isinstance(error, MemoryError) and not any(mark in text for mark in MARKS):
            raise
        raise OutOfMemory(f"out of memory ({text.splitlines()[0][:160]}): {advice}") from error
