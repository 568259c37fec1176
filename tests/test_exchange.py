"""Weights in other people's formats: every format there and back to the bit, and one clear line for what cannot be read."""

import dataclasses
import io
import json
import pickle
import resource
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange import FORMATS, diffusers_config, match, read_weights, write_weights
from cosmos_ray.model.exchange.dcp import read_dcp, write_dcp
from cosmos_ray.model.exchange.diffusers_folder import read_diffusers, write_diffusers
from cosmos_ray.model.exchange.names import clean, from_diffusers, to_diffusers
from cosmos_ray.model.exchange.pt import read_pt, write_pt
from cosmos_ray.model.exchange.statistics import Statistics, read_statistics, write_statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings, write_text_embeddings
from cosmos_ray.model.transformer import Transformer, TransformerConfig

SMALL = TransformerConfig(width=64, heads=2, layers=2, text_width=32, adaln_rank=16)
CONFIG = diffusers_config(64, 2, 2, text_width=32, adaln_rank=16)
PATHS = {"pt": "weights.pt", "dcp": "iter_000000100", "diffusers": "transformer", "safetensors": "weights.safetensors"}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A small network's parameters, every number random."""
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(v.shape, generator=generator).to(dtype) for k, v in Transformer(SMALL).state_dict().items()}


def public(tensors: dict[str, torch.Tensor], prefix: str = "net.") -> dict[str, torch.Tensor]:
    return {prefix + k: v for k, v in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def refused(line: str):
    """Expects one CheckpointError that matches ``line`` and is a single line."""
    return pytest.raises(CheckpointError, match=rf"^(?=[^\n]*\Z).*{line}")


# ---------------------------------------------------------------- names


def test_all_names_of_the_2b_model_go_to_diffusers_and_back():
    with torch.device("meta"):
        names = set(Transformer(TransformerConfig()).state_dict())
    assert len(names) == 567
    theirs = {to_diffusers(name) for name in names}
    assert len(theirs) == 567 and not theirs & names
    assert {from_diffusers(name) for name in theirs} == names
    assert all(from_diffusers(to_diffusers(name)) == name == from_diffusers(name) for name in names)


def test_clean_takes_the_network_and_drops_what_is_no_parameter():
    ours = weights()
    noise = {"net.pos_embedder.seq": torch.arange(8), "net.accum_iteration": torch.tensor(3), "net.blocks.0.self_attn._extra_state": None,
             "net.blocks.1.self_attn._extra_state": io.BytesIO(b"state")}
    assert same(clean({**public(ours), **noise}), ours)
    assert same(clean(ours), ours)
    average = {k: v + 1 for k, v in ours.items()}
    assert same(clean({**public(average, "net_ema."), **public(ours)}), ours)
    assert same(clean(public(average, "net_ema.")), average)


def test_what_is_no_tensor_is_refused():
    with refused("key net.a is no dense tensor but a int"):
        clean({"net.a": 3})
    with refused(r"key a is no dense tensor but a Tensor \(torch.sparse_coo"):
        clean({"a": torch.eye(2).to_sparse()})


def test_two_names_of_one_parameter_are_refused():
    with refused("keys net.blocks.0.mlp.layer1.weight and blocks.0.mlp.layer1.weight are the same parameter"):
        clean({"net.blocks.0.mlp.layer1.weight": torch.ones(1), "blocks.0.mlp.layer1.weight": torch.ones(1)})


def test_match_names_the_first_key_that_does_not_fit():
    ours = weights()
    expected = {k: v.shape for k, v in ours.items()}
    match(ours, expected, "here")
    key = "blocks.1.mlp.layer2.weight"
    with refused(rf"here: key {key} is missing, the model has it with shape \(64, 256\)"):
        match({k: v for k, v in ours.items() if k != key}, expected, "here")
    with refused(r"here: key blocks.2.x with shape \(1,\) is unknown"):
        match({**ours, "blocks.2.x": torch.ones(1)}, expected, "here")
    with refused(rf"here: key {key} has shape \(64, 128\), the model's is \(64, 256\)"):
        match({**ours, key: torch.ones(64, 128)}, expected, "here")


# ---------------------------------------------------------------- every format


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_come_back_bit_for_bit(tmp_path, format, dtype):
    ours = weights(dtype)
    write_weights(ours, tmp_path / "new" / PATHS[format], format, CONFIG)
    assert same(read_weights(tmp_path / "new" / PATHS[format]), ours)
    assert [p.name for p in (tmp_path / "new").iterdir()] == [PATHS[format]]  # nothing temporary stays


@pytest.mark.parametrize("format", FORMATS)
def test_mixed_dtypes_and_views_survive(tmp_path, format):
    ours = weights(torch.bfloat16)
    buffer = torch.randn(1000)
    ours["t_embedding_norm.weight"] = buffer[100:164]
    ours["blocks.0.self_attn.q_proj.weight"] = ours["blocks.0.self_attn.k_proj.weight"]
    ours["blocks.0.self_attn.v_proj.weight"] = torch.randn(64, 64).double().t()
    write_weights(public(ours), tmp_path / PATHS[format], format, CONFIG)
    assert same(read_weights(tmp_path / PATHS[format]), ours)


@pytest.mark.parametrize("format", FORMATS)
def test_an_existing_path_is_replaced_only_on_request(tmp_path, format):
    path = tmp_path / PATHS[format]
    write_weights(weights(), path, format, CONFIG)
    second = {k: v + 1 for k, v in weights().items()}
    with refused(f"{path.name} exists: choose another name"):
        write_weights(second, path, format, CONFIG)
    assert same(read_weights(path), weights())
    write_weights(second, path, format, CONFIG, overwrite=True)
    assert same(read_weights(path), second) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_folder_of_other_things_is_never_replaced(tmp_path):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "config.json").write_text("{}")
    with refused("holds other things than weights"):
        write_weights(weights(), tmp_path / "runs", "dcp", overwrite=True)
    assert (tmp_path / "runs" / "demo").is_dir()


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_nothing_behind(tmp_path, format):
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with refused("cannot write .*[Ff]ile too large.*: choose a writable place"):
            write_weights(weights(), tmp_path / PATHS[format], format, CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_unknown_path_format_or_suffix_is_refused(tmp_path):
    with refused(r"there is no .*nothing.pt: give a \.pt or \.pth file"):
        read_weights(tmp_path / "nothing.pt")
    with refused("no weights in .*: give .* a torch.distributed.checkpoint folder .* or a diffusers folder"):
        read_weights(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"x")
    with refused("no weights in .*weights.npz: give"):
        read_weights(tmp_path / "weights.npz")
    with refused("unknown weights format 'onnx': choose one of pt, dcp"):
        write_weights(weights(), tmp_path / "w.pt", "onnx")
    with refused(r"need a name that ends in \.pt or \.pth"):
        write_weights(weights(), tmp_path / "weights", "pt")
    with refused("need a config: make it with diffusers_config"):
        write_weights(weights(), tmp_path / "weights", "diffusers")
    with refused("it is empty"):
        write_weights({}, tmp_path / "w.pt", "pt")


def test_a_safetensors_file_may_have_public_or_diffusers_names(tmp_path):
    for i, names in enumerate((weights(), public(weights()), {to_diffusers(k): v for k, v in weights().items()})):
        save_file(names, tmp_path / f"{i}.safetensors")
        assert same(read_weights(tmp_path / f"{i}.safetensors"), weights())


def test_exports_are_readable_by_whom_the_umask_allows(tmp_path):
    for format in FORMATS:
        write_weights(weights(), tmp_path / format / PATHS[format], format, CONFIG)
    (tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in tmp_path.rglob("*") if p.is_file()} == {(tmp_path / "plain").stat().st_mode}


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    write_weights(weights(), tmp_path / "w.safetensors", "safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    for size in (0, 5, 1000, len(data) - 1):
        (tmp_path / "w.safetensors").write_bytes(data[:size])
        with refused("w.safetensors is truncated or no safetensors file"):
            read_weights(tmp_path / "w.safetensors")


# ---------------------------------------------------------------- .pt


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("wrap", [
    lambda s: s, lambda s: {"model": s, "iteration": 3}, lambda s: {"state_dict": OrderedDict(s)}, lambda s: {"model": {"state_dict": s}}])
def test_a_pt_file_is_read_bare_or_wrapped_in_both_formats(tmp_path, wrap, old_format):
    extra = {"net.blocks.0.self_attn._extra_state": io.BytesIO(b"state"), "net.blocks.1.self_attn._extra_state": None,
             "net.blocks.1.cross_attn._extra_state": torch.zeros(2, dtype=torch.uint8)}
    state = wrap({**public(weights(torch.bfloat16)), **extra})
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=not old_format)
    assert same(read_pt(tmp_path / "w.pt"), weights(torch.bfloat16))


def test_a_module_s_own_state_dict_and_the_wrapped_export_are_read(tmp_path):
    torch.save(torch.nn.ModuleDict({"net": Transformer(SMALL)}).state_dict(), tmp_path / "module.pt")
    match(read_pt(tmp_path / "module.pt"), {k: v.shape for k, v in weights().items()}, "module.pt")
    write_pt(weights(), tmp_path / "wrapped.pth", wrapped="model")
    assert set(torch.load(tmp_path / "wrapped.pth", weights_only=True)["model"]) == set(public(weights()))
    assert same(read_weights(tmp_path / "wrapped.pth"), weights())


@pytest.mark.parametrize("old_format", [False, True])
def test_a_truncated_pt_file_is_refused(tmp_path, old_format):
    torch.save(public(weights()), tmp_path / "w.pt", _use_new_zipfile_serialization=not old_format)
    data = (tmp_path / "w.pt").read_bytes()
    for size in (10, 1000, len(data) // 2, len(data) - 10):
        (tmp_path / "w.pt").write_bytes(data[:size])
        with refused("w.pt is truncated"):
            read_pt(tmp_path / "w.pt")
    (tmp_path / "w.pt").write_bytes(b"")
    with refused("w.pt is an empty file"):
        read_pt(tmp_path / "w.pt")


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text.pt").write_text("hello world, this is a text\n" * 100)
    with refused("text.pt is no checkpoint written by torch.save"):
        read_pt(tmp_path / "text.pt")
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path, "text.pt")
    (tmp_path / "archive.zip").rename(tmp_path / "archive.pt")
    with refused("archive.pt is no checkpoint written by torch.save"):
        read_pt(tmp_path / "archive.pt")
    with refused("cannot read .*nothing.pt: No such file"):
        read_pt(tmp_path / "nothing.pt")
    with refused("cannot read .*: Is a directory"):
        read_pt(tmp_path)


def test_an_empty_or_foreign_dict_is_refused(tmp_path):
    for held, line in (({}, "holds no model weights: it is empty"), ({"model": {}}, "holds no model weights: it is empty"),
                       ([torch.ones(1)], "holds a list, not a state dict"), ({1: torch.ones(1)}, "holds a dict, not a state dict"),
                       ({"net.accum_iteration": torch.ones(1)}, "holds no model weights, only keys like net.accum_iteration"),
                       ({"net.x": torch.ones(1), "epoch": 3}, "key epoch is no dense tensor but a int")):
        torch.save(held, tmp_path / "w.pt")
        with refused(line):
            read_pt(tmp_path / "w.pt")


# ---------------------------------------------------------------- DCP


def test_a_training_folder_is_read_through_its_model_folder(tmp_path):
    """As the public trainer saves it: objects beside tensors, the average beside the network, other folders beside the model's."""
    folder = tmp_path / "iter_000000100"
    state = {**public(weights(torch.bfloat16)), **public({k: v + 1 for k, v in weights().items()}, "net_ema."),
             "net.blocks.0.self_attn._extra_state": io.BytesIO(b"state"), "net.accum_iteration": torch.tensor(3), "note": "text"}
    dcp.save(state, checkpoint_id=folder / "model", no_dist=True)
    dcp.save({"step": torch.tensor(3)}, checkpoint_id=folder / "optim", no_dist=True)
    assert same(read_weights(folder), weights(torch.bfloat16)) and same(read_weights(folder / "model"), weights(torch.bfloat16))


def save_sharded(rank: int, folder: str, sync: str) -> None:
    """One of two ranks that save the network sharded along the first dimension, as FSDP does."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{sync}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state = public({**weights(), "odd": torch.arange(3.0), "one": torch.ones(1, 5)})
    dcp.save({k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in state.items()}, checkpoint_id=folder)
    torch.distributed.destroy_process_group()


def test_a_folder_of_two_ranks_is_put_together(tmp_path):
    torch.multiprocessing.spawn(save_sharded, (str(tmp_path / "w"), str(tmp_path / "sync")), nprocs=2)
    assert len(list((tmp_path / "w").glob("*.distcp"))) == 2
    assert same(read_dcp(tmp_path / "w"), {**weights(), "odd": torch.arange(3.0), "one": torch.ones(1, 5)})
    (tmp_path / "w" / "__1_0.distcp").unlink()
    with refused("shard __1_0.distcp is missing: copy the whole folder"):
        read_dcp(tmp_path / "w")


def test_torch_s_own_loader_reads_our_dcp_folder(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    state = {k: torch.zeros_like(v) for k, v in public(weights()).items()}
    dcp.load(state, checkpoint_id=tmp_path / "w", no_dist=True)
    assert same(state, public(weights()))
    assert str(tmp_path).encode() not in (tmp_path / "w" / ".metadata").read_bytes()


def test_a_missing_or_truncated_shard_is_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    shard = tmp_path / "w" / "__0_0.distcp"
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with refused(rf"shard __0_0.distcp is truncated, {len(data) // 2} bytes of at least"):
        read_weights(tmp_path / "w")
    shard.write_bytes(bytes(len(data)))
    with refused(r"w: a shard is damaged \(.*\): copy the folder again"):
        read_weights(tmp_path / "w")
    shard.unlink()
    with refused("shard __0_0.distcp is missing"):
        read_weights(tmp_path / "w")


def test_an_unfinished_dcp_folder_is_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    (tmp_path / "w" / ".metadata").unlink()
    with refused("has shards but no .metadata: the save did not finish"):
        read_weights(tmp_path / "w")


def test_shards_that_do_not_cover_a_tensor_are_refused(tmp_path):
    write_dcp(weights(), tmp_path / "w")
    file = tmp_path / "w" / ".metadata"
    record = pickle.loads(file.read_bytes())
    item = record.state_dict_metadata["net.blocks.0.mlp.layer1.weight"]
    item.size = torch.Size((512, 64))
    file.write_bytes(pickle.dumps(record))
    with refused("the shards do not cover key net.blocks.0.mlp.layer1.weight exactly"):
        read_dcp(tmp_path / "w")


# ---------------------------------------------------------------- diffusers


def test_diffusers_loads_our_folder_and_we_read_theirs_sharded(tmp_path, monkeypatch):
    from diffusers import CosmosTransformer3DModel

    ours = weights(torch.bfloat16)
    # Names a part that Predict2 does not have, and for its sake loading insists on the package accelerate.
    monkeypatch.setattr(CosmosTransformer3DModel, "_keep_in_fp32_modules", None)
    write_diffusers(ours, tmp_path / "ours", CONFIG)
    theirs, info = CosmosTransformer3DModel.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values())
    assert same({from_diffusers(k): v for k, v in theirs.state_dict().items()}, ours)
    theirs.save_pretrained(tmp_path / "pipeline" / "transformer", max_shard_size="200KB")
    folder = tmp_path / "pipeline" / "transformer"
    assert len(list(folder.glob("*.safetensors"))) > 1
    tensors, config = read_diffusers(tmp_path / "pipeline")
    assert same(tensors, ours) and {k: config[k] for k in CONFIG} == CONFIG
    next(folder.glob("*00002*.safetensors")).unlink()
    with refused("transformer: shard .*00002.*safetensors is missing"):
        read_weights(tmp_path / "pipeline")


def test_a_config_for_other_dimensions_is_refused(tmp_path):
    with refused(r"key blocks.0.adaln_modulation_cross_attn.1.weight has shape \(16, 64\), the model's is \(256, 64\)"):
        write_diffusers(weights(), tmp_path / "w", {**CONFIG, "adaln_lora_dim": 256})
    with refused("key blocks.2.* is missing"):
        write_diffusers(weights(), tmp_path / "w", {**CONFIG, "num_layers": 3})
    with refused("config for diffusers is incomplete"):
        write_diffusers(weights(), tmp_path / "w", {"num_layers": 2})
    assert not list(tmp_path.iterdir())


def test_a_diffusers_folder_that_cannot_be_read_is_refused(tmp_path):
    folder = tmp_path / "w"
    write_diffusers(weights(), folder, CONFIG)
    file = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, folder / "diffusion_pytorch_model.fp16.safetensors")
    with refused("has diffusion_pytorch_model.fp16.safetensors and diffusion_pytorch_model.safetensors but no"):
        read_weights(folder)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text("[]")
    with refused("holds a list instead of settings"):
        read_weights(folder)
    index.write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with refused("outside of its folder: refused"):
        read_weights(folder)
    index.unlink()
    for part in folder.glob("*.safetensors"):
        part.unlink()
    with refused("has no diffusion_pytorch_model.safetensors: copy the whole folder"):
        read_weights(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"x")
    with refused(r"only as \.bin, which is pickled code"):
        read_weights(folder)
    (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    with refused("is of a WanTransformer3DModel, not of a CosmosTransformer3DModel"):
        read_weights(folder)
    (folder / "config.json").write_text("{")
    with refused("config.json is no JSON"):
        read_weights(folder)


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
    ({"proprio_min": [0, 9, 0]}, r"proprio_min\[1\] = 9.0 exceeds proprio_max\[1\] = 2.5"),
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
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "t5.pkl").write_bytes(data[:size])
        with refused("t5.pkl is no pickle or a damaged one"):
            read_text_embeddings(tmp_path / "t5.pkl")
    (tmp_path / "t5.safetensors").write_bytes(data)
    with refused("t5.safetensors is truncated or no safetensors file"):
        read_text_embeddings(tmp_path / "t5.safetensors")
    with refused("cannot read the text embeddings .*: No such file"):
        read_text_embeddings(tmp_path / "nothing.pkl")
    with refused("text embeddings are written as .safetensors"):
        write_text_embeddings(embeddings(), tmp_path / "t5.pkl")
    with refused("the dict to write holds no text embeddings"):
        write_text_embeddings({}, tmp_path / "new.safetensors")
