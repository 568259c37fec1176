"""Weights in other people's formats: every format there and back to the bit, and one clear line for what cannot be read."""

import io
import resource
import shutil
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange import FORMATS, diffusers_config, match, read_weights, write_weights
from cosmos_ray.model.exchange.names import clean, from_diffusers, to_diffusers
from cosmos_ray.model.exchange.pt import read_pt, write_pt
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
    with refused(r"there is no .*nothing.pt: give a \.pt, \.pth or \.ckpt file"):
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
    for size in (5, 1000, len(data) - 1):
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
