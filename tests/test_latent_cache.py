"""The cache of encoded windows: what it returns, and what it survives."""

import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.learner.latent_cache import STRAY_SECONDS, LatentCache
from tests.conftest import flips_and_cuts

SHAPE = (4, 3, 2, 2)
ROW = 4 * 3 * 2 * 2 * 2  # bytes


def latents_of(keys):
    """(B, *SHAPE) float32, a function of each key."""
    return np.stack([np.random.default_rng(zlib.crc32(key.encode())).standard_normal(SHAPE).astype(np.float32) for key in keys])


def keys_from(first, count):
    return [f"rollout-Lift-00001234-a0-2ef2b81a@{t}#1" for t in range(first, first + count)]


def make(folder, fingerprint="wan-64", shape=SHAPE, limit=1 << 30, **options):
    return LatentCache(folder, fingerprint, shape, limit, **options)


def filled(folder, segments=3, rows=5):
    """A closed cache's keys, ``rows`` of them to a segment."""
    cache = make(folder)
    for segment in range(segments):
        keys = keys_from(segment * rows, rows)
        cache.put(keys, latents_of(keys))
        cache.flush()
    cache.close()
    return keys_from(0, segments * rows)


def files(folder, fingerprint="wan-64"):
    return sorted(path for path in (folder / fingerprint).iterdir())


def assert_right(cache, keys, expected):
    """The mask is as expected, and every row that is found is the right one, to the bit."""
    found, latents = cache.get(keys)
    assert found.dtype == bool and found.tolist() == list(expected)
    assert latents.dtype == np.float16 and latents.shape == (len(keys), *cache.shape)
    right = latents_of(keys).astype(np.float16)
    right[~found] = 0
    assert latents.tobytes() == right.tobytes()


def test_what_is_put_is_found_before_and_after_it_is_written(tmp_path):
    cache = make(tmp_path)
    keys = keys_from(0, 10)
    assert_right(cache, keys, [False] * 10)
    cache.put(keys[:6], latents_of(keys[:6]))
    assert files(tmp_path) == [] and len(cache) == 6
    mixed = [keys[8], keys[2], keys[2], keys[9], keys[0]]
    for _ in range(2):
        assert_right(cache, mixed, [False, True, True, False, True])
        cache.flush()
    assert len(files(tmp_path)) == 1 and cache.stored_bytes == files(tmp_path)[0].stat().st_size > 6 * ROW
    cache.close()
    assert_right(make(tmp_path), keys, [True] * 6 + [False] * 4)
    assert_right(cache, keys, [True] * 6 + [False] * 4)  # still usable


def test_no_keys_are_no_rows(tmp_path):
    found, latents = make(tmp_path).get([])
    assert found.shape == (0,) and latents.shape == (0, *SHAPE)


def test_float16_rounds_standardised_latents_eight_times_finer_than_bfloat16(tmp_path):
    cache = make(tmp_path, shape=(100_000,))
    values = np.random.default_rng(0).standard_normal((1, 100_000)).astype(np.float32)
    cache.put(["key"], values)
    error = cache.get(["key"])[1].astype(np.float32) - values
    assert np.sqrt(np.square(error).mean()) == pytest.approx(2.1e-4, rel=0.05)
    bits = values.view(np.uint32) + 0x8000 & 0xFFFF0000  # the upper half, rounded: bfloat16
    assert np.sqrt(np.square(bits.view(np.float32) - values).mean()) == pytest.approx(1.66e-3, rel=0.05)


def test_known_keys_keep_what_they_have(tmp_path):
    cache = make(tmp_path)
    keys = keys_from(0, 2)
    cache.put([*keys, keys[0]], np.concatenate([latents_of(keys), np.zeros((1, *SHAPE), np.float32)]))
    cache.put(keys, np.zeros((2, *SHAPE), np.float32))
    cache.flush()
    cache.put(keys, np.zeros((2, *SHAPE), np.float32))
    cache.flush()
    assert_right(cache, keys, [True, True])
    assert len(files(tmp_path)) == 1


def test_segments_are_written_when_they_are_full(tmp_path):
    cache = make(tmp_path, segment_bytes=4 * ROW)
    keys = keys_from(0, 11)
    cache.put(keys, latents_of(keys))
    assert len(files(tmp_path)) == 2
    assert_right(make(tmp_path), keys, [True] * 8 + [False] * 3)
    cache.close()
    assert_right(make(tmp_path), keys, [True] * 11)


def test_segments_of_other_processes_are_found_after_a_refresh(tmp_path):
    reader, writer = make(tmp_path), make(tmp_path)
    keys = keys_from(0, 4)
    writer.put(keys, latents_of(keys))
    writer.flush()
    assert_right(reader, keys, [False] * 4)
    reader.refresh()
    assert_right(reader, keys, [True] * 4)
    # Both encode the same window at the same time: the second to write leaves it out.
    more = keys_from(4, 2)
    for cache in (reader, writer):
        cache.put(more, latents_of(more))
    writer.close()
    reader.close()
    assert len(files(tmp_path)) == 2


def test_fingerprints_never_mix(tmp_path):
    keys = filled(tmp_path)
    other = make(tmp_path, fingerprint="wan-224")
    assert_right(other, keys, [False] * len(keys))
    other.put(keys, np.zeros((len(keys), *SHAPE), np.float32))
    other.close()
    assert_right(make(tmp_path), keys, [True] * len(keys))


@pytest.mark.parametrize("fingerprint", ["", "..", ".hidden", "a/b", "a b", "x" * 201])
def test_fingerprints_that_are_no_file_names_are_refused(tmp_path, fingerprint):
    with pytest.raises(StoreError, match="fingerprint"):
        make(tmp_path, fingerprint=fingerprint)


def test_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot create a latent cache in .*: a part of the path is a file"):
        make(tmp_path / "file")


@pytest.mark.parametrize(
    "latents, message",
    [(np.zeros((2, 4, 3, 2, 1)), "do not fit a cache"), (np.zeros((1, *SHAPE)), "do not fit a cache"),
     (np.full((2, *SHAPE), np.nan), "not finite in float16"), (np.full((2, *SHAPE), 1e6), "not finite in float16")],
)  # fmt: skip
def test_latents_that_do_not_fit_are_refused(tmp_path, latents, message):
    with pytest.raises(StoreError, match=message):
        make(tmp_path).put(keys_from(0, 2), latents)


def test_limit_ends_the_adding_and_is_logged_once(tmp_path, caplog):
    cache = make(tmp_path, limit=4000, segment_bytes=5 * ROW)
    keys = keys_from(0, 200)
    for key in keys:
        cache.put([key], latents_of([key]))
    cache.close()
    kept = len(cache)
    assert 5 <= kept < 60
    assert_right(make(tmp_path), keys, [True] * kept + [False] * (200 - kept))
    assert sum("reached its limit of 4000 bytes" in record.message for record in caplog.records) == 1
    again = make(tmp_path, limit=4000)
    again.put(keys_from(500, 1), latents_of(keys_from(500, 1)))
    assert len(again) == kept


def test_open_segments_are_bounded(tmp_path):
    keys = filled(tmp_path, segments=12, rows=2)
    before = len(os.listdir("/proc/self/fd"))
    cache = make(tmp_path, open_limit=3)
    for order in (keys, keys[::-1]):
        assert_right(cache, order, [True] * 24)
    assert len(os.listdir("/proc/self/fd")) - before <= 3


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95, 0.999])
def test_torn_segment_is_deleted_and_encoded_again(tmp_path, caplog, fraction):
    keys = filled(tmp_path)
    torn = files(tmp_path)[1]
    os.truncate(torn, int(torn.stat().st_size * fraction))
    cache = make(tmp_path)
    assert_right(cache, keys, [True] * 5 + [False] * 5 + [True] * 5)
    assert not torn.exists() and sum("deleting latent cache segment" in record.message for record in caplog.records) == 1
    cache.put(keys, latents_of(keys))
    cache.close()
    assert_right(make(tmp_path), keys, [True] * 15)


@pytest.mark.parametrize("what", ["text", "another arrow file", "other shape", "no rows"])
def test_foreign_segment_is_deleted(tmp_path, what):
    keys = filled(tmp_path)
    foreign = files(tmp_path)[1]
    table = pa.ipc.open_file(foreign.read_bytes()).read_all()
    if what == "text":
        foreign.write_text("notes about the robot")
    elif what == "other shape":
        other = make(tmp_path / "other", shape=(4, 3, 4, 1))  # as many bytes
        other.put(keys[5:10], latents_of(keys[5:10]).reshape(5, 4, 3, 4, 1))
        other.close()
        shutil.copy(files(tmp_path / "other")[0], foreign)
    else:
        table = table.replace_schema_metadata(None) if what == "another arrow file" else table.slice(0, 0)
        with pa.ipc.new_file(foreign, table.schema) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(table.to_pylist(), schema=table.schema))
    assert_right(make(tmp_path), keys, [True] * 5 + [False] * 5 + [True] * 5)
    assert not foreign.exists()


@pytest.mark.parametrize("what", ["row", "key"])
def test_flipped_bit_in_a_row_or_its_key_is_found_when_it_is_read(tmp_path, caplog, what):
    keys = filled(tmp_path)
    flipped = files(tmp_path)[2]
    data = bytearray(flipped.read_bytes())
    if what == "row":
        data[data.index(latents_of(keys[14:])[0].astype(np.float16).tobytes()) + 10] ^= 1
    else:
        data[data.index(b"@14#") + 2] ^= 1  # the key of step 14 becomes that of step 15
    flipped.write_bytes(data)
    cache = make(tmp_path)
    assert_right(cache, keys_from(14, 2), [False, False])
    assert ("does not match its checksum" in caplog.text) and not flipped.exists()
    assert_right(cache, keys, [True] * 10 + [False] * 5)


def test_no_flip_or_cut_raises_or_returns_another_row(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    keys = filled(tmp_path, segments=1)
    path = files(tmp_path)[0]
    intact = path.read_bytes()
    right = latents_of(keys).astype(np.float16)
    damaged = 0
    for data in flips_and_cuts(intact):
        path.write_bytes(data)
        found, latents = make(tmp_path).get(keys)
        assert latents[found].tobytes() == right[found].tobytes()
        damaged += not found.all()
    assert damaged > 500


def test_segments_that_vanish_are_forgotten(tmp_path, caplog):
    keys = filled(tmp_path)
    cache, narrow = make(tmp_path), make(tmp_path, open_limit=1)
    files(tmp_path)[0].unlink()
    assert_right(cache, keys, [True] * 15)  # still mapped
    assert_right(narrow, keys, [False] * 5 + [True] * 10)
    cache.refresh()
    assert_right(cache, keys, [False] * 5 + [True] * 10)
    assert cache.stored_bytes == sum(path.stat().st_size for path in files(tmp_path))
    # The whole folder can go while the cache is in use.
    shutil.rmtree(tmp_path / "wan-64")
    cache.refresh()
    assert_right(cache, keys, [False] * 15)
    cache.put(keys, latents_of(keys))
    cache.close()
    assert_right(make(tmp_path), keys, [True] * 15)


def test_failed_write_ends_the_adding_and_raises_nothing(tmp_path, caplog):
    keys = filled(tmp_path)
    cache = make(tmp_path)
    more = keys_from(100, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
        for _ in range(2):
            cache.put(more, latents_of(more))
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert sum("cannot be written, nothing more is added" in record.message for record in caplog.records) == 1
    assert len(files(tmp_path)) == 3  # no temporary is left
    assert_right(cache, keys + more, [True] * 15 + [False] * 100)


def test_temporaries_of_killed_writers_are_removed_once_they_are_old(tmp_path):
    keys = filled(tmp_path, segments=1)
    old, young = (tmp_path / "wan-64" / f".{name}.arrow.1-ab.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half a segment")
    past = os.stat(old).st_mtime - STRAY_SECONDS - 10
    os.utime(old, (past, past))
    assert_right(make(tmp_path), keys, [True] * 5)
    assert not old.exists() and young.exists()


WRITER = """
import sys
from tests.test_latent_cache import ROW, keys_from, latents_of, make
cache = make(sys.argv[1], segment_bytes=4 * ROW)
first = int(sys.argv[2])
for batch in range(100_000):
    keys = keys_from(first + 4 * batch, 4)
    cache.put(keys, latents_of(keys))
    print(first + 4 * batch, flush=True)
"""


def test_sigkill_of_a_writer_loses_no_written_segment(tmp_path, caplog):
    """6 writers, 2 at a time on one folder, are killed at random instants: what they wrote is there, and nothing is torn."""
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    rng = random.Random(0)
    plans = [(rng.randint(1, 40), rng.uniform(0, 0.004)) for _ in range(6)]

    def write_and_kill(writer):
        batches, pause = plans[writer]
        arguments = [sys.executable, "-c", WRITER, str(tmp_path), str(1_000_000 * writer)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)
        written = [int(process.stdout.readline()) for _ in range(batches)]
        try:
            process.wait(timeout=pause)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        written += [int(line) for line in process.stdout if line.endswith("\n")]
        assert process.wait() == -signal.SIGKILL
        return written

    with ThreadPoolExecutor(2) as pool:
        written = [first for firsts in pool.map(write_and_kill, range(6)) for first in firsts]
    cache = make(tmp_path)
    keys = [key for first in written for key in keys_from(first, 4)]
    assert_right(cache, keys, [True] * len(keys))
    assert len(cache) - len(keys) <= 6 * 4  # at most the segment in flight of each writer
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
