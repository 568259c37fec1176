"""What travels beside weights: dataset statistics and text embeddings."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cosmos_ray.model.exchange.statistics import Statistics, read_statistics, write_statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings, write_text_embeddings
from tests.test_exchange import refused, same

# ---------------------------------------------------------------- statistics


RANGES = {"actions_min": [-1.0, -0.1], "actions_max": [1.0, 0.3], "proprio_min": [0.0, 2.5, -3.0], "proprio_max": [0.5, 2.5, 3.0],
          "actions_mean": [0.0, 0.1], "proprio_median": [0.1, 2.5, 0.0], "source": "demonstrations"}


def test_statistics_are_read_and_written(tmp_path):
    file = tmp_path / "dataset_statistics.json"
    file.write_text(json.dumps(RANGES))
    held = read_statistics(file)
    assert held.actions_high.dtype == np.float32 and held.actions_high.tolist() == pytest.approx([1.0, 0.3])
    assert held.constant == ["proprio[1]"] and held.raw == RANGES
    write_statistics(held, tmp_path / "copy.json")
    assert json.loads((tmp_path / "copy.json").read_text()) == RANGES
    high = np.array([np.float32(1) / 3, np.pi], np.float32)
    write_statistics(dataclasses.replace(held, actions_high=high), file, overwrite=True)
    assert np.array_equal(read_statistics(file).actions_high, high)
    write_statistics(Statistics(high - 1, high, high - 1, high), tmp_path / "own.json")
    assert read_statistics(tmp_path / "own.json").constant == []
    with refused("own.json exists"):
        write_statistics(held, tmp_path / "own.json")


@pytest.mark.parametrize(("change", "line"), [
    ({"proprio_max": None}, "proprio_max is missing"),
    ({"actions_min": [float("nan"), 0]}, r"actions_min\[0\] is not finite"),
    ({"actions_max": [1, 1e300]}, r"actions_max\[1\] is not finite"),
    ({"actions_max": [10**400, 1]}, r"actions_max\[0\] is not finite"),
    ({"proprio_min": [0, 9, 0]}, r"proprio_min\[1\] = 9 exceeds proprio_max\[1\] = 2.5"),
    ({"actions_max": [1.0]}, "actions_max has 1 numbers, actions_min 2"),
    ({"proprio_median": [1.0]}, "proprio_median has 1 numbers, proprio_min 3"),
    ({"actions_min": [[1.0], [2.0]]}, "actions_min is no list of numbers"),
    ({"actions_min": []}, "actions_min is no list of numbers"),
    ({"actions_min": [True, False]}, "actions_min is no list of numbers"),
])
def test_statistics_that_make_no_sense_are_refused(tmp_path, change, line):
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps({k: v for k, v in {**RANGES, **change}.items() if v is not None}))
    with refused(f"statistics.json: {line}"):
        read_statistics(file)


def test_a_file_without_statistics_is_refused(tmp_path):
    with refused("cannot read the dataset statistics .*: No such file"):
        read_statistics(tmp_path / "statistics.json")
    (tmp_path / "statistics.json").write_text("[]")
    with refused("holds a list, no dataset statistics"):
        read_statistics(tmp_path / "statistics.json")
    (tmp_path / "statistics.json").write_bytes(b"\xff\x00{")
    with refused("statistics.json is no JSON"):
        read_statistics(tmp_path / "statistics.json")


# ---------------------------------------------------------------- text embeddings


def embeddings(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"put the cube {where}": torch.randn(1, 512, 1024, generator=generator).to(dtype) for where in ("down", "away")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_public_pickle_of_embeddings_is_read_and_kept_as_safetensors(tmp_path, dtype):
    expected = {k: v[0] for k, v in embeddings(dtype).items()}
    file = tmp_path / "libero_t5_embeddings.pkl"
    for protocol in (2, 4, 5):
        file.write_bytes(pickle.dumps(embeddings(dtype), protocol))
        assert same(read_text_embeddings(file), expected)
    write_text_embeddings(read_text_embeddings(file), tmp_path / "t5.safetensors")
    assert same(read_text_embeddings(tmp_path / "t5.safetensors"), expected) and same(load_file(tmp_path / "t5.safetensors"), expected)
    for old_format in (False, True):
        torch.save(embeddings(dtype), file, _use_new_zipfile_serialization=not old_format)
        assert same(read_text_embeddings(file), expected)


def test_embeddings_pickled_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    data = pickle.dumps(embeddings())
    assert b"cuda:0" in data
    (tmp_path / "t5.pkl").write_bytes(data)
    assert all(v.device.type == "cpu" for v in read_text_embeddings(tmp_path / "t5.pkl").values())


def test_rows_of_one_batch_do_not_keep_the_batch_in_memory(tmp_path):
    batch = torch.randn(4, 8, 16)
    (tmp_path / "t5.pkl").write_bytes(pickle.dumps({str(i): batch[i : i + 1] for i in range(4)}))
    held = read_text_embeddings(tmp_path / "t5.pkl")
    assert torch.equal(held["2"], batch[2]) and all(v.untyped_storage().nbytes() == v.nbytes for v in held.values())


@pytest.mark.parametrize(("held", "line"), [
    ({}, "holds no text embeddings: it must be a dict of instructions to tensors, not an empty dict"),
    ([1], "not a list"),
    ({"a": 3}, "'a' has a int instead of an embedding"),
    ({3: torch.ones(4, 8)}, "the key 3 is no instruction"),
    ({"a": torch.ones(8)}, r"'a' has a torch.float32 tensor of shape \(8,\) instead of an embedding"),
    ({"a": torch.ones(2, 4, 8)}, r"shape \(2, 4, 8\) instead"),
    ({"a": torch.ones(4, 8, dtype=torch.int64)}, "'a' has a torch.int64 tensor"),
    ({"a": torch.ones(4, 8), "b": torch.ones(4, 9)}, "the embedding of 'b' is 9 wide, others 8"),
    ({"a": torch.full((4, 8), torch.nan)}, "the embedding of 'a' has numbers that are not finite"),
])
def test_what_is_no_dict_of_embeddings_is_refused(tmp_path, held, line):
    (tmp_path / "t5.pkl").write_bytes(pickle.dumps(held))
    with refused(line):
        read_text_embeddings(tmp_path / "t5.pkl")


def test_a_damaged_embeddings_file_is_refused(tmp_path):
    data = pickle.dumps(embeddings())
    for size in (1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "t5.pkl").write_bytes(data[:size])
        with refused("t5.pkl is no pickle or a damaged one"):
            read_text_embeddings(tmp_path / "t5.pkl")
    (tmp_path / "t5.safetensors").write_bytes(data)
    with refused("t5.safetensors is truncated or no safetensors file"):
        read_text_embeddings(tmp_path / "t5.safetensors")
    with refused("cannot read the text embeddings .*: No such file"):
        read_text_embeddings(tmp_path / "nothing.pkl")
    with refused("text embeddings are written as .safetensors"):
        write_text_embeddings(embeddings(), tmp_path / "t5.npz")
    with refused("the dict to write holds no text embeddings"):
        write_text_embeddings({}, tmp_path / "new.safetensors")
