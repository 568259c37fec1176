"""Wrong schemas and hostile headers: files that are whole, with valid checksums, and yet no episodes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa

from cosmos_ray.replay.format.schema import CRC_FIELD, HEADER_FIELD, VERSION_FIELD
from jobs.chaos.case import Case, fault
from jobs.chaos.episode_file import NUMBERS, EpisodeFile, frame_buffers
from jobs.chaos.episodes import CAMERAS

# ---------------------------------------------------------------- wrong schema, valid checksums


def pick_column(case: Case, file: EpisodeFile) -> str:
    return case.rng.choice([*NUMBERS, f"frame/{case.rng.choice(CAMERAS)}"])


@fault
def column_missing(case: Case) -> None:
    """A column is not there."""
    file = case.file()
    file.replace_column(case.rng.choice([name for name in file.batch.schema.names if name != "step"]), None)
    file.write()


@fault
def column_renamed(case: Case) -> None:
    """A column has another name."""
    file = case.file()
    name = case.rng.choice([name for name in file.batch.schema.names if name != "step"])
    file.replace_column(name, file.batch.column(name), case.rng.choice((name + "x", "", "../" + name, "a\nb")))
    file.write()


@fault
def column_twice(case: Case) -> None:
    """Two columns have one name."""
    file = case.file()
    name = pick_column(case, file)
    file.batch = pa.RecordBatch.from_arrays([*file.batch.columns, file.batch.column(name)], names=[*file.batch.schema.names, name])
    file.write()


@fault
def column_of_other_type(case: Case) -> None:
    """A column of numbers has another type."""
    file, name = case.file(), case.rng.choice(NUMBERS)
    rows = file.batch.num_rows
    arrays = [
        pa.array(["text"] * rows), pa.nulls(rows), pa.array([True] * rows), pa.array([[1.0]] * rows), pa.array([{"a": 1}] * rows),
        pa.array(["a"] * rows).dictionary_encode(), pa.array(np.zeros(rows, np.float16)), pa.array(np.zeros(rows, np.int8)),
        pa.array([b"1234"] * rows, pa.binary(4)), pa.array(np.zeros(rows, np.float64)),
        pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(rows * 3, np.int16)), 3),
        pa.FixedSizeListArray.from_arrays(pa.array(["x"] * rows), 1),
        pa.array([[[1]]] * rows),
    ]
    file.replace_column(name, case.rng.choice(arrays))
    file.write()


@fault
def column_without_width(case: Case) -> None:
    """A column of vectors has vectors of another width, with a valid checksum; actions of width 0 too."""
    file = case.file()
    name = case.rng.choice(("action", "proprio", "label"))
    rows, width = file.batch.num_rows, case.rng.choice((0, 1, 1000))
    values = pa.array(np.zeros(rows * width, np.float32))
    type_ = pa.list_(pa.float32(), width)
    file.replace_column(name, pa.Array.from_buffers(type_, rows, [None], children=[values]))
    if name == "label" or width == 0:  # a wider action or proprioception alone would be a valid episode of another robot
        file.seal()
    file.write()


@fault
def frames_of_other_type(case: Case) -> None:
    """A frame column is not of large binaries."""
    file = case.file()
    name = f"frame/{case.rng.choice(CAMERAS)}"
    column, rows = file.batch.column(name), file.batch.num_rows
    arrays = [
        column.cast(pa.binary()), pa.array([b"ab"] * rows, pa.binary(2)), pa.nulls(rows), pa.array([1] * rows), pa.array([[b"a"]] * rows),
        pa.array(["text"] * rows, pa.large_string()), column.cast(pa.binary()).dictionary_encode(), pa.nulls(rows, pa.large_binary()),
    ]  # fmt: skip
    file.replace_column(name, case.rng.choice(arrays))
    file.write()


@fault
def nulls_in_column(case: Case) -> None:
    """A column has nulls where it may not, its checksums valid."""
    file = case.file()
    name = case.rng.choice(NUMBERS)
    values = file.batch.column(name).to_pylist()
    values[case.rng.randrange(len(values) - 1)] = None
    file.replace_column(name, pa.array(values, file.batch.column(name).type))
    file.write()


@fault
def rows_do_not_match(case: Case) -> None:
    """More or fewer rows than the header says."""
    file = case.file()
    rows = case.rng.choice((0, 1, file.batch.num_rows - 1, file.batch.num_rows + 1, file.batch.num_rows * 3))
    table = pa.Table.from_batches([file.batch] * 3).slice(0, rows).combine_chunks()
    file.batch = table.to_batches()[0] if rows else file.batch.slice(0, 0)
    file.write()


@fault
def batches(case: Case) -> None:
    """None, two or many record batches."""
    file = case.file()
    half = file.batch.num_rows // 2
    halves = [file.batch.slice(0, half), file.batch.slice(half)]
    parts = case.rng.choice(([], [file.batch] * 2, [file.batch] * 50, halves, [file.batch, file.batch.slice(0, 0)]))
    file.write(batches=parts)


@fault
def compressed(case: Case) -> None:
    """The same content, compressed as Arrow may."""
    case.file().write(compression=case.rng.choice(("zstd", "lz4")))


@fault
def compressed_length(case: Case) -> None:
    """A compressed buffer that claims to be huge when it is unpacked."""
    file = case.file()
    sizes = [buffer.size for array in file.batch.columns for buffer in array.buffers() if buffer is not None and buffer.size > 200]
    file.write(compression=case.rng.choice(("zstd", "lz4")))
    data = bytearray(case.path.read_bytes())
    for size in case.rng.sample(sizes, len(sizes)):
        at = data.find(size.to_bytes(8, "little"), 3000)
        if at >= 0:
            data[at : at + 8] = case.rng.choice((2**33, 2**40, 2**62, -5 % 2**64)).to_bytes(8, "little")
            break
    case.path.write_bytes(data)


@fault
def other_format(case: Case) -> None:
    """Arrow's stream format, or the magic bytes of another format."""
    file = case.file()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, file.batch.schema) as writer:
        writer.write_batch(file.batch)
    parquet, hdf5 = b"PAR1" + file.data[4:-4] + b"PAR1", b"\x89HDF\r\n\x1a\n" + file.data
    case.path.write_bytes(case.rng.choice((sink.getvalue().to_pybytes(), parquet, hdf5)))


# ---------------------------------------------------------------- frames, valid checksums


def frames_of(file: EpisodeFile, camera: str) -> tuple[np.ndarray, bytes]:
    offsets, data = frame_buffers(file.batch.column(f"frame/{camera}"))
    return offsets.copy(), data.tobytes()


@fault
def frame_offsets(case: Case) -> None:
    """Frame offsets outside of their data, negative, or descending, under valid checksums."""
    file, camera = case.file(), case.rng.choice(CAMERAS)
    offsets, data = frames_of(file, camera)
    last, at = len(offsets) - 1, case.rng.randrange(1, len(offsets))
    what = case.rng.randrange(5)
    if what == 0:
        offsets[last] = case.rng.choice((len(data) + 1, 2**40, 2**62))
    elif what == 1:
        offsets[at] = case.rng.choice((-1, -(2**40), -(2**63)))
    elif what == 2:
        offsets[1:last] = offsets[1:last][::-1]
    elif what == 3:
        offsets += case.rng.choice((1, 2**33))
    else:
        offsets[:] = 2**63 - 1
    file.write_offsets(camera, offsets)


@fault
def frame_is_no_jpeg(case: Case) -> None:
    """The frames of a camera are no JPEGs, under valid checksums."""
    case.valid = "frames"
    file, camera = case.file(), case.rng.choice(CAMERAS)
    offsets, _ = frames_of(file, camera)
    garbage = case.rng.choice((b"\xff\xd8\xff", b"\x00", b"GIF89a", b"\xff\xd8" * 50))
    lengths = np.where(np.diff(offsets) > 0, len(garbage), 0)
    file.set_frames(camera, np.concatenate([[0], np.cumsum(lengths)]), garbage * int((lengths > 0).sum()))
    file.seal()
    file.write()


@fault
def frame_claims_to_be_huge(case: Case) -> None:
    """JPEGs of up to 65500 x 65500 pixels by their own header, under valid checksums."""
    case.valid = "frames"
    file, camera = case.file(), case.rng.choice(CAMERAS)
    offsets, data = frames_of(file, camera)
    side = case.rng.choice((20000, 65500)).to_bytes(2, "big")
    changed = bytearray(data)
    at = changed.find(b"\xff\xc0")
    while at >= 0:
        changed[at + 5 : at + 9] = side + side
        at = changed.find(b"\xff\xc0", at + 9)
    file.set_frames(camera, offsets, bytes(changed))
    file.seal()
    file.write()


@fault
def frame_missing(case: Case) -> None:
    """The header says that a step has frames, the column has none there."""
    file, camera = case.file(), case.rng.choice(CAMERAS)
    column = file.batch.column(f"frame/{camera}").to_pylist()
    present = [t for t, jpeg in enumerate(column) if jpeg is not None]
    column[case.rng.choice(present)] = None
    array = pa.array(column, pa.large_binary())
    offsets, data = frame_buffers(array)
    file.set_frames(camera, offsets, data.tobytes())
    file.seal()
    file.write()


# ---------------------------------------------------------------- hostile headers, valid checksums


NOT = {  # type -> values that are not of it
    "text": (None, 3, True, [], {}, ["x"], 1e308),
    "whole number": (None, "3", 1.5, [], {}, "x", 10**400, 2**63, -(2**70), float("nan"), float("inf")),
    "number": (None, "x", [], {}, 10**400),
    "flag": (None, "yes", 3, [], {}, float("nan"), 0.5),
    "table": (None, [], "x", 3, [[1, 2]], True),
}
FIELDS = {
    "run": "text", "task": "text", "source": "text", "instruction": "text", "invalid": "text", "seed": "whole number",
    "attempt": "whole number", "length": "whole number", "policy_version": "whole number", "return": "number", "success": "flag",
    "timed_out": "flag", "info": "table", "checksums": "table",
}  # fmt: skip
WORSE: dict[str, tuple[Any, ...]] = {
    "source": ("expert", "", "x" * 100_000, "a\nb"),
    "task": ("../../../etc/passwd", "Lift/../..", "\ud800", "x" * 100_000, "a\nb", ""),
    "run": ("../..", "\ud800", "a\nb"),
    "seed": (-1, 12345), "attempt": (-1, 7), "length": (0, -1, 10**9, 2**31 - 1, 2**62),
    "cameras": (None, "wrist", [1, 2], ["nope"], ["wrist", "a\nb"], ["../../x"], [["wrist"]], {}, [None], 3, ["x"] * 100_000),
    "score": (7, -1, "x", float("nan"), [], 10**400, {}),
}  # fmt: skip
STEPS: tuple[Any, ...] = (
    None, 3, "0123", [None], ["0"], [[0]], [-1], [10**6], [2**40], [10**400], [1.5], [float("nan")], {}, "", [[[0]]], [5, 2, 1], [-(2**70)],
    [[0, 10**9, 1]], [[0, 2, 0]], [[2, 0, -1]], [[0, 3, 1], [0, 3, 1]], [[-5, 2, 1]], [[0.0, 2.0, 1.0]], [[True, 2, 1]],
)  # fmt: skip


@fault
def header_field_of_other_type(case: Case) -> None:
    """A field of the header has a value of another type."""
    file = case.file()
    name = case.rng.choice(sorted(FIELDS))
    file.header[name] = case.rng.choice(NOT[FIELDS[name]])
    file.write()


@fault
def header_field_out_of_range(case: Case) -> None:
    """A field of the header has an impossible value: path traversal, negative, huge, not this file's key."""
    file = case.file()
    name = case.rng.choice(sorted(WORSE))
    file.header[name] = case.rng.choice(WORSE[name])
    file.write()


@fault
def header_field_missing(case: Case) -> None:
    """A field of the header is not there."""
    file = case.file()
    optional = {"score", "created", "initial_state"}
    del file.header[case.rng.choice(sorted(set(file.header) - optional))]
    file.write()


@fault
def header_length(case: Case) -> None:
    """The header says another length, by one."""
    file = case.file()
    file.header["length"] += case.rng.choice((-1, 1))
    file.write()


@fault
def header_frame_steps(case: Case) -> None:
    """The header lists frames at impossible steps."""
    file = case.file()
    file.header["frame_ranges"] = case.rng.choice(STEPS)
    file.write()


@fault
def header_checksums(case: Case) -> None:
    """The checksum of a column is missing or no checksum."""
    file = case.file()
    name = pick_column(case, file)
    sums = file.header["checksums"]
    value = case.rng.choice((None, "x", float(sums[name]) + 0.5, -1, 2**40, [], "missing"))
    sums[name] = value
    if value == "missing":
        del sums[name]
    file.write()


@fault
def header_not_json(case: Case) -> None:
    """The header is not JSON, not text, or not a table."""
    texts = (b"", b"{", b"\xff\xfe\x00", b"null", b"[]", b"3", b'"x"', b"NaN", b"{}", b"\x00" * 9)
    long = (b"[" * 100_000, b'{"a":' * 50_000, b"1" * 100_000)
    case.file().write(text=case.rng.choice((*texts, *long)))


@fault
def header_huge(case: Case) -> None:
    """A header of 10 MB, or deeply nested."""
    file = case.file()
    what = case.rng.randrange(4)
    deep: Any = 0
    if what == 0:
        file.header["filler"] = "x" * 10_000_000
    elif what == 1:
        file.header["filler"] = list(range(1_500_000))
    elif what == 2:
        for _ in range(400):
            deep = [deep]
        file.header["filler"] = deep
    else:
        file.write(text=json.dumps(file.header).encode()[:-1] + b', "filler": ' + b"[" * 50_000 + b"]" * 50_000 + b"}")
        return
    file.write()


@fault
def header_version(case: Case) -> None:
    """A version that is none, negative, huge, or another one's; its checksum is valid."""
    file = case.file()
    numbers = (b"-1", b"0", b"1", b"99", b"3", b"4294967298", b"9" * 5000)
    file.version = case.rng.choice((*numbers, b"abc", b"", b"1e3", b"\xff", b"1.0"))
    file.write()


@fault
def header_checksum(case: Case) -> None:
    """The header's checksum is wrong, no number, or missing; or version or header are."""
    def change(fields: dict[bytes, bytes]) -> None:
        name = case.rng.choice((VERSION_FIELD, HEADER_FIELD, CRC_FIELD))
        if name == CRC_FIELD and case.rng.random() < 0.5:
            fields[name] = case.rng.choice((b"0", b"", b"x", b"-1", b"\xff"))
        else:
            del fields[name]

    case.file().write(metadata=change)
