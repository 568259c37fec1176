"""Torn files and flipped bits: what disks, crashes and half-done copies do, and numbers of Arrow's own format made hostile."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from jobs.chaos.case import Case, fault
from jobs.chaos.episode_file import Regions

HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -8, -(2**63), 10**12, 0)


# ---------------------------------------------------------------- torn files


@fault
def truncate(case: Case) -> None:
    """Cut at a random length."""
    os.truncate(case.path, case.rng.randrange(case.path.stat().st_size))


@fault
def truncate_to_zero(case: Case) -> None:
    """An empty file."""
    os.truncate(case.path, 0)


@fault
def truncate_footer(case: Case) -> None:
    """Cut within the footer, at most a few bytes."""
    os.truncate(case.path, case.path.stat().st_size - case.rng.choice((1, 4, 6, 7, 10, 11, 64, 500)))


@fault
def append_bytes(case: Case) -> None:
    """Bytes after the end."""
    with open(case.path, "ab") as file:
        file.write(case.rng.randbytes(case.rng.choice((1, 8, 1000, 70000))))


@fault
def insert_bytes(case: Case) -> None:
    """Bytes in the middle, so that what follows has moved."""
    data = case.path.read_bytes()
    at = case.rng.randrange(len(data))
    case.path.write_bytes(data[:at] + case.rng.randbytes(case.rng.randint(1, 64)) + data[at:])


@fault
def zero_page(case: Case) -> None:
    """A page of zeros, as a crashed disk leaves it."""
    data = bytearray(case.path.read_bytes())
    at = case.rng.randrange(0, len(data), 4096)
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    case.path.write_bytes(data)


@fault
def other_blocks(case: Case) -> None:
    """One block is a copy of another."""
    data = bytearray(case.path.read_bytes())
    size = case.rng.choice((64, 512, 4096))
    a, b = (case.rng.randrange(max(1, len(data) - size)) for _ in range(2))
    data[a : a + size] = data[b : b + size]
    case.path.write_bytes(data)


# ---------------------------------------------------------------- flipped bits


def flip(case: Case, spans: list[tuple[int, int]], count: int = 1) -> None:
    data = bytearray(case.path.read_bytes())
    spans = [span for span in spans if span[1] > span[0]]
    for _ in range(count if spans else 0):
        data[case.rng.randrange(*case.rng.choice(spans))] ^= 1 << case.rng.randrange(8)
    case.path.write_bytes(data)


def flips(name: str, about: str, spans: Callable[[Regions], list[tuple[int, int]]]) -> None:
    def work(case: Case) -> None:
        flip(case, spans(case.file().regions()))

    work.__name__, work.__doc__ = f"flip_{name}", about
    fault(work)


@fault
def flip_anywhere(case: Case) -> None:
    """One bit of the file."""
    flip(case, [(0, case.path.stat().st_size)])


@fault
def flip_many(case: Case) -> None:
    """40 bits of the file."""
    flip(case, [(0, case.path.stat().st_size)], 40)


flips("front", "One bit of the first copy of the schema.", lambda r: [r.front])
flips("batch", "One bit of what describes the batch.", lambda r: [r.batch])
flips("footer", "One bit of the footer, which holds schema and header.", lambda r: [r.footer])
flips("offsets", "One bit of the offsets of the frames.", lambda r: r.offsets)
flips("jpeg", "One bit of a frame.", lambda r: r.frames)
flips("column", "One bit of a column's values.", lambda r: r.columns)
flips("padding", "One bit between the buffers.", lambda r: r.padding)


@fault
def flip_header(case: Case) -> None:
    """One bit of the JSON header."""
    data, text = case.path.read_bytes(), json.dumps(case.file().header).encode()
    at = data.rindex(text[:40])
    flip(case, [(at, at + len(text))])


def overwrite_words(case: Case, span: tuple[int, int], width: int, count: int) -> None:
    """Replace ``count`` aligned integers of ``width`` bytes that are not 0 by hostile ones."""
    data = bytearray(case.path.read_bytes())
    places = [at for at in range(-(-span[0] // width) * width, span[1] - width, width) if any(data[at : at + width])]
    for at in case.rng.sample(places, min(count, len(places))):
        data[at : at + width] = (case.rng.choice(HUGE) % 2 ** (8 * width)).to_bytes(width, "little")
    case.path.write_bytes(data)


@fault
def hostile_batch_words(case: Case) -> None:
    """Huge or negative 64-bit numbers in what describes the batch: rows, buffer offsets and lengths."""
    overwrite_words(case, case.file().regions().batch, 8, case.rng.randint(1, 3))


@fault
def hostile_batch_offsets(case: Case) -> None:
    """Huge or negative 32-bit numbers in what describes the batch: vector lengths and table offsets."""
    overwrite_words(case, case.file().regions().batch, 4, 1)


@fault
def hostile_footer_words(case: Case) -> None:
    """Huge or negative 32-bit numbers in the footer."""
    overwrite_words(case, case.file().regions().footer, 4, case.rng.randint(1, 2))


@fault
def footer_length(case: Case) -> None:
    """A wrong length of the footer."""
    data = bytearray(case.path.read_bytes())
    length = case.rng.choice((0, -1, 2**31 - 1, -(2**31), len(data), len(data) + 1, case.rng.randrange(len(data))))
    data[-10:-6] = (length % 2**32).to_bytes(4, "little")
    case.path.write_bytes(data)


@fault
def block_of_footer(case: Case) -> None:
    """The footer points to another place, or to a batch of another size."""
    file = case.file()
    region = file.regions()
    data = bytearray(file.data)
    offset = region.batch[0].to_bytes(8, "little")
    at = data.find(offset, region.footer[0])
    field_at = at + case.rng.choice((0, 8, 16))  # offset int64, length of the description int32, length of the body int64
    width = 4 if field_at == at + 8 else 8
    data[field_at : field_at + width] = (case.rng.choice(HUGE) % 2 ** (8 * width)).to_bytes(width, "little")
    case.path.write_bytes(data)
