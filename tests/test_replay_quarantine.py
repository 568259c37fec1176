"""Damaged, foreign and left-behind files: quarantined with a reason, and never read as something else."""

import logging
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest

from cosmos_ray.errors import StoreError
from cosmos_ray.replay.format import schema
from cosmos_ray.replay.format.view import EpisodeView
from cosmos_ray.replay.store import ReplayStore
from cosmos_ray.replay.upkeep.repair import repair
from tests.conftest import flips_and_cuts
from tests.test_replay_episode import assert_same, make_episode
from tests.test_replay_store import episode_files, fresh_store, path_of, rewrite, store_of_three

store = pytest.fixture(fresh_store)
three = pytest.fixture(store_of_three)


def expect_quarantined(root, path, reason):
    """A fresh reader sees the other two episodes, and the file in quarantine with the reason."""
    content = path.read_bytes()
    store = ReplayStore(root, create=False)
    assert {summary.key.seed for summary in store.refresh()} == {0, 2}
    (entry,) = store.quarantine.entries()
    assert entry["file"] == str(path.relative_to(root)) and reason in entry["reason"]
    assert (root / "quarantine" / entry["moved_to"]).read_bytes() == content
    assert not path.exists()
    # The key is free again.
    assert store.commit(make_episode(1)) and len(store.refresh()) == 1 and len(store) == 3


def test_score_out_of_range_in_a_header_is_quarantined(three):
    root, path = three

    def grade(table, metadata):
        metadata[schema.HEADER_FIELD] = metadata[schema.HEADER_FIELD].replace(b'"success": true', b'"success": true, "score": 7')
        return table, metadata | {schema.CRC_FIELD: schema.header_crc(metadata[schema.VERSION_FIELD], metadata[schema.HEADER_FIELD])}

    rewrite(path, grade)
    expect_quarantined(root, path, "does not describe an episode")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.95, 0.999])
def test_torn_file_is_quarantined(three, fraction):
    root, path = three
    os.truncate(path, int(path.stat().st_size * fraction))
    expect_quarantined(root, path, "not a complete")


def test_huge_sparse_file_is_quarantined(three):
    """Mapping it may fail, which is no trouble with the store."""
    root, path = three
    os.truncate(path, 1 << 41)
    store = ReplayStore(root, create=False)
    assert {summary.key.seed for summary in store.refresh()} == {0, 2}
    assert "more than any episode" in store.quarantine.entries()[0]["reason"] and not path.exists()
    assert store.commit(make_episode(1)) and repair(root).restored == []


def test_foreign_file_is_quarantined(three):
    root, path = three
    path.write_text("notes about the robot")
    expect_quarantined(root, path, "Not an Arrow file")


def test_foreign_arrow_file_is_quarantined(three):
    root, path = three
    rewrite(path, lambda table, metadata: (table, {b"made by": b"somebody else"}))
    expect_quarantined(root, path, "not a cosmos_ray episode")


def test_file_under_the_name_of_another_episode_is_quarantined(three):
    root, path = three
    shutil.copy(path_of(ReplayStore(root), make_episode(0).key.name), path)
    expect_quarantined(root, path, "does not belong under this name")


def test_flipped_bit_in_the_header_is_quarantined(three):
    root, path = three
    data = bytearray(path.read_bytes())
    data[data.rindex(b'"success": true') + 11] ^= 1  # "true" becomes another word, in the footer's copy
    path.write_bytes(data)
    expect_quarantined(root, path, "header that does not match its checksum")


def test_foreign_files_beside_the_shards_are_quarantined(three):
    root, path = three
    for place in (root / "episodes", root / "episodes" / "demo-Lift", path.parent):
        (place / "notes.txt").write_text("hello")
    store = ReplayStore(root)
    assert len(store.refresh()) == 3
    assert len(store.quarantine.entries()) == 3
    assert all(path.suffix == ".arrow" for path in episode_files(root))


def test_stray_temporary_is_quarantined_once_it_is_old(three):
    root, path = three
    stray = path.with_name(f".{path.name}.123-abcd.tmp")
    stray.write_bytes(b"half an episode")
    store = ReplayStore(root)
    assert len(store.refresh()) == 3 and stray.exists()  # may be a live writer
    os.utime(stray, (1_000_000, 1_000_000))
    os.utime(stray.parent, (1_000_000, 1_000_000))
    assert store.refresh() == [] and not stray.exists()
    (entry,) = store.quarantine.entries()
    assert "temporary file left behind" in entry["reason"]


def test_quarantine_is_logged_as_a_warning(three, caplog):
    root, path = three
    os.truncate(path, 100)
    with caplog.at_level(logging.WARNING):
        ReplayStore(root).refresh()
    assert [record for record in caplog.records if "quarantined" in record.message and str(path) in record.message]


def test_torn_quarantine_log_is_still_read(three):
    root, path = three
    os.truncate(path, 100)
    store = ReplayStore(root)
    store.refresh()
    with open(root / "quarantine" / "log.jsonl", "a") as log:
        log.write('{"time": 1')
    assert len(store.quarantine.entries()) == 1


def test_newer_schema_version_is_refused_and_left_in_place(three):
    root, path = three
    newer = {schema.VERSION_FIELD: b"99", schema.HEADER_FIELD: b"in a form to come"}
    newer[schema.CRC_FIELD] = schema.header_crc(*newer.values())
    rewrite(path, lambda table, metadata: (table, metadata | newer))
    store = ReplayStore(root)
    assert {summary.key.seed for summary in store.refresh()} == {0, 2}
    with pytest.raises(StoreError, match="schema version 99, this package reads up to 2: upgrade"):
        store.read(make_episode(1).key.name)
    assert store.commit(make_episode(1)) is False  # it is committed, only not by us
    assert path.exists() and not store.quarantine.entries()


def test_missing_column_is_quarantined(three):
    root, path = three
    rewrite(path, lambda table, metadata: (table.drop_columns(["action"]), metadata))
    expect_quarantined(root, path, "no column action")


def test_labels_of_another_width_than_the_actions_are_quarantined(three):
    root, path = three

    def narrow(table, metadata):
        column = table.schema.get_field_index("label")
        values = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(13, np.float32)), 1)
        return table.set_column(column, "label", values), metadata

    rewrite(path, narrow)
    expect_quarantined(root, path, "actions and labels differ")


@pytest.mark.parametrize("what", ["action", "proprio", "state", "frame"])
def test_flipped_bit_in_the_data_is_found_on_read(three, what):
    root, path = three
    episode = make_episode(1)
    arrays = {"action": episode.actions, "proprio": episode.proprio, "state": episode.states}
    needle = episode.frames[3][1] if what == "frame" else arrays[what].tobytes()
    data = bytearray(path.read_bytes())
    data[data.index(needle) + len(needle) // 2] ^= 4
    path.write_bytes(data)
    store = ReplayStore(root)
    with pytest.raises(StoreError, match="does not match its checksum"):
        store.read(episode.key.name)
    assert not path.exists() and len(store.quarantine.entries()) == 1
    assert len(store.refresh()) == 2


def test_no_flip_or_cut_is_ever_read_as_another_episode(store):
    episode = make_episode(0, length=4, size=8)
    store.commit(episode)
    (path,) = episode_files(store.root)
    intact = path.read_bytes()
    damaged = 0
    for data in flips_and_cuts(intact):
        copy = store.root / "copy"
        copy.write_bytes(data)
        try:
            read = EpisodeView(str(copy)).episode()
        except StoreError:
            damaged += 1
        else:
            assert_same(read, episode)  # the flip hit padding or the redundant copy of the schema
    assert damaged > 750
