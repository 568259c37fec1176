"""Files that would run code when unpickled: refused with one line, and nothing runs."""

import io
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from cosmos_ray import safe_pickle
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.dcp import write_dcp
from cosmos_ray.model.exchange.pt import read_pt
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings


class Malicious:
    """Runs a shell command when it is unpickled."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.system, (f"touch '{self.victim}'",)


@pytest.fixture
def victim(tmp_path):
    """A file that the malicious pickles create; the test fails if one of them could."""
    file = tmp_path / "victim"
    pickle.loads(pickle.dumps(Malicious(file)))
    assert file.exists(), "the attack itself must work"
    file.unlink()
    yield file
    assert not file.exists()


def refused(line: str):
    return pytest.raises(CheckpointError, match=rf"^(?=[^\n]*\Z).*{line}")


SYSTEM = r"asks for posix\.system while it is unpickled, which could run any code: refused"


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pt_file_that_runs_code_is_refused(tmp_path, victim, old_format):
    torch.save({"net.x": torch.ones(2), "y": Malicious(victim)}, tmp_path / "w.pt", _use_new_zipfile_serialization=not old_format)
    with refused(rf"w\.pt {SYSTEM}"):
        read_weights(tmp_path / "w.pt")


def test_a_plain_pickle_named_pt_is_refused(tmp_path, victim):
    (tmp_path / "w.pt").write_bytes(pickle.dumps({"net.x": Malicious(victim)}))
    with refused("is no checkpoint written by torch.save"):
        read_pt(tmp_path / "w.pt")


def test_bytesio_is_allowed_for_this_file_only(tmp_path):
    torch.save({"net.x": torch.ones(2), "net._extra_state": io.BytesIO(b"state")}, tmp_path / "w.pt")
    assert set(read_pt(tmp_path / "w.pt")) == {"x"}
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "w.pt", weights_only=True)


def test_dcp_metadata_that_runs_code_is_refused(tmp_path, victim):
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    for held in (Malicious(victim), Metadata({"net.x": Malicious(victim)}), Metadata({}, planner_data=Malicious(victim))):
        (tmp_path / "w" / ".metadata").write_bytes(pickle.dumps(held))
        with refused(rf"\.metadata {SYSTEM}"):
            read_weights(tmp_path / "w")


def test_a_rank_s_own_metadata_is_never_read_instead(tmp_path, victim):
    """DCP falls back to __0.metadata, with a full unpickler, when the global file fails."""
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    (tmp_path / "w" / "__0.metadata").write_bytes(pickle.dumps(Malicious(victim)))
    assert set(read_weights(tmp_path / "w")) == {"x"}
    (tmp_path / "w" / ".metadata").write_bytes(b"")
    with refused("is no pickle or a damaged one"):
        read_weights(tmp_path / "w")


def test_objects_stored_beside_the_tensors_are_never_unpickled(tmp_path, victim):
    torch.distributed.checkpoint.save({"net.x": torch.ones(2), "net.note": Malicious(victim)}, checkpoint_id=tmp_path / "w", no_dist=True)
    victim.unlink(missing_ok=True)
    assert set(read_weights(tmp_path / "w")) == {"x"}


def test_a_shard_that_runs_code_is_refused(tmp_path, victim):
    write_dcp({"x": torch.ones(200)}, tmp_path / "w")
    shard = tmp_path / "w" / "__0_0.distcp"
    size = shard.stat().st_size
    with open(shard, "wb") as file:
        torch.save(Malicious(victim), file, _use_new_zipfile_serialization=False)
        file.write(bytes(size))
    with refused("a shard is damaged"):
        read_weights(tmp_path / "w")


def test_metadata_that_points_out_of_its_folder_is_refused(tmp_path):
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    write_dcp({"x": torch.ones(2)}, tmp_path / "other")
    file = tmp_path / "w" / ".metadata"
    record = pickle.loads(file.read_bytes())
    for entry in record.storage_data.values():
        entry.relative_path = "../other/__0_0.distcp"
    file.write_bytes(pickle.dumps(record))
    with refused("points to ../other/__0_0.distcp, outside of its folder: refused"):
        read_weights(tmp_path / "w")


def test_metadata_that_promises_more_than_the_shards_hold_allocates_nothing(tmp_path):
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    file = tmp_path / "w" / ".metadata"
    record = pickle.loads(file.read_bytes())
    item = record.state_dict_metadata["net.x"]
    item.size = item.chunks[0].sizes = torch.Size((1 << 50,))
    file.write_bytes(pickle.dumps(record))
    with refused(r"\.metadata is damaged: an entry of __0_0.distcp is too short"):
        read_weights(tmp_path / "w")


def test_metadata_with_impossible_sizes_is_refused(tmp_path):
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    file = tmp_path / "w" / ".metadata"
    record = pickle.loads(file.read_bytes())
    record.state_dict_metadata["net.x"].size, record.state_dict_metadata["net.x"].chunks = torch.Size((0, -5)), []
    file.write_bytes(pickle.dumps(record))
    with refused("metadata is damaged .*negative dimension"):
        read_weights(tmp_path / "w")


def test_metadata_of_other_kinds_is_refused(tmp_path):
    write_dcp({"x": torch.ones(2)}, tmp_path / "w")
    nothing = "holds no model weights"
    for held, line in (([], "holds a list, no DCP metadata"), (Metadata([]), "metadata is damaged"), (Metadata({}), nothing),
                       (Metadata({"x": BytesStorageMetadata()}), nothing), (Metadata({1: 2}), nothing)):
        (tmp_path / "w" / ".metadata").write_bytes(pickle.dumps(held))
        with refused(line):
            read_weights(tmp_path / "w")


def test_embeddings_that_run_code_are_refused(tmp_path, victim):
    file = tmp_path / "t5.pkl"
    for protocol in range(6):
        file.write_bytes(pickle.dumps({"lift the cube": Malicious(victim)}, protocol))
        with refused(rf"t5\.pkl {SYSTEM}"):
            read_text_embeddings(file)
    for old_format in (False, True):
        torch.save({"lift the cube": Malicious(victim)}, file, _use_new_zipfile_serialization=not old_format)
        with refused(SYSTEM):
            read_text_embeddings(file)


class Nested:
    """A tensor whose storage bytes are a malicious pickle: torch.storage._load_from_bytes would unpickle them in full."""

    def __init__(self, data: bytes):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


@pytest.mark.parametrize("old_format", [False, True])
def test_code_in_the_bytes_of_a_tensor_is_refused(tmp_path, victim, old_format):
    hidden = io.BytesIO()
    torch.save(Malicious(victim), hidden, _use_new_zipfile_serialization=not old_format)
    data = pickle.dumps({"lift the cube": Nested(hidden.getvalue())})
    pickle.loads(data)
    assert victim.exists(), "the attack itself must work"
    victim.unlink()
    (tmp_path / "t5.pkl").write_bytes(data)
    with refused(rf"t5\.pkl \(a tensor in it\) {SYSTEM}"):
        read_text_embeddings(tmp_path / "t5.pkl")


def test_a_pickle_cannot_reach_through_an_allowed_name(tmp_path, victim):
    """Dotted names, by which protocol 4 gets at attributes of what it may name."""
    data = b"\x80\x04\x8c\x0btorch._utils\x8c" + bytes([len(b"_rebuild_tensor_v2.__globals__")]) + b"_rebuild_tensor_v2.__globals__\x93."
    (tmp_path / "t5.pkl").write_bytes(data.replace(b"\x0btorch", b"\x0ctorch"))
    with refused(r"asks for torch\._utils\._rebuild_tensor_v2\.__globals__"):
        read_text_embeddings(tmp_path / "t5.pkl")


def test_a_pickle_cannot_change_what_it_may_name():
    """BUILD sets attributes: on a class or function it would change the running program."""
    def rebuilt(*args):
        return args

    data = b"\x80\x02cm\nf\nN}X" + struct.pack("<I", 12) + b"__defaults__)s\x86b."
    with refused("sets attributes of a function"):
        safe_pickle.load(io.BytesIO(data), {("m", "f"): rebuilt}, "file")
    assert rebuilt.__defaults__ is None
