"""What a user downloads is found as it lies: files, folders, the Hugging Face cache; and what is no policy's weights is refused by name."""

import json
import logging
import pickle
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosmos_ray import released
from cosmos_ray.config.settings import new_config, with_absolute_paths
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.exchange import read_weights
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.model.text import T5Text
from cosmos_ray.model.tokenizer import WanTokenizer
from tests.test_exchange import public, refused, same, weights

REVISION = "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567"
ID = "nvidia/Cosmos-Policy-LIBERO-Predict2-2B"


def cached(hub: Path, repository: str, files: dict[str, bytes], revision: str = REVISION, main: str | None = REVISION) -> Path:
    """A repository's folder as huggingface_hub leaves it: blobs without suffix, and links to them in a snapshot."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    for number, (name, content) in enumerate(files.items()):
        blob, link = folder / "blobs" / f"{number:064x}", folder / "snapshots" / revision / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    if main:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(main)
    return folder


def saved(state, tmp_path: Path) -> bytes:
    torch.save(state, tmp_path / "made")
    return (tmp_path / "made").read_bytes()


STATISTICS = {"actions_min": [-0.5] * 7, "actions_max": [0.9] * 7, "proprio_min": [-2.0] * 9, "proprio_max": [1.5] * 9}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache with one released policy."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    text = {"lift it": torch.ones(1, 512, 1024, dtype=torch.bfloat16)}
    cached(tmp_path / "hf" / "hub", ID, {
        "Cosmos-Policy-LIBERO-Predict2-2B.pt": saved({"model": public(weights())}, tmp_path), "README.md": b"",
        "libero_dataset_statistics.json": json.dumps(STATISTICS).encode(), "libero_t5_embeddings.pkl": pickle.dumps(text)})
    return tmp_path / "hf" / "hub"


# ---------------------------------------------------------------- where things lie


@pytest.mark.parametrize("place", ["id", "repository", "snapshot", "file", "id and file", "name"])
def test_a_cached_repository_is_read_wherever_it_is_pointed_at(hub, place, monkeypatch):
    repository = hub / f"models--{ID.replace('/', '--')}"
    snapshot, file = repository / "snapshots" / REVISION, "Cosmos-Policy-LIBERO-Predict2-2B.pt"
    path = {"id": ID, "repository": repository, "snapshot": snapshot, "file": snapshot / file, "id and file": f"{ID}/{file}",
            "name": repository.name}[place]
    monkeypatch.chdir(hub)
    assert same(read_weights(path), weights())
    if "file" not in place:
        assert np.array_equal(read_statistics(path).actions_low, np.full(7, -0.5, np.float32))
        assert set(T5Text(str(path)).embeddings) == {"lift it"}
    assert released.local(path).is_relative_to(snapshot)  # not the blob, whose name tells no format


def test_the_cache_is_where_huggingface_hub_has_it(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert released.hub() == tmp_path / ".cache" / "huggingface" / "hub"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert released.hub() == tmp_path / "xdg" / "huggingface" / "hub"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert released.hub() == tmp_path / "home" / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert released.hub() == tmp_path / "cache"


def test_a_run_keeps_where_the_files_lie_not_the_name_of_the_repository(hub):
    model = with_absolute_paths(new_config({"model.text_path": f"{ID}/libero_t5_embeddings.pkl", "model.tokenizer_path": "nobody/has-this"})
                                ).model
    assert model.text_path == str(hub / f"models--{ID.replace('/', '--')}" / "snapshots" / REVISION / "libero_t5_embeddings.pkl")
    assert not Path(model.tokenizer_path).exists()
    problem = released.problem("nobody/has-this")
    assert str(hub) in problem and "nobody/has-this" in problem and "\n" not in problem


def test_a_folder_with_one_file_of_weights_is_that_file(tmp_path):
    torch.save(public(weights()), tmp_path / "policy.pt")
    torch.save({}, tmp_path / "tokenizer.pth")
    save_file({"x": torch.ones(1)}, tmp_path / "libero_t5_embeddings.safetensors")
    assert same(read_weights(tmp_path), weights())


def test_several_candidates_are_named(hub, tmp_path):
    for name in ("model-480p-16fps.pt", "model-720p-16fps.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"^(?=[^\n]*\Z).* has 2 weights: model-480p-16fps.pt, model-720p-16fps.pt; give the path"):
        read_weights(tmp_path)
    for name in ("libero", "aloha"):
        (tmp_path / f"{name}_dataset_statistics.json").write_text(json.dumps(STATISTICS))
        (tmp_path / f"{name}_t5_embeddings.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match="has 2 dataset statistics: aloha_dataset_statistics.json, libero_dataset"):
        read_statistics(tmp_path)
    with pytest.raises(ConfigError, match="has 2 text embeddings"):
        T5Text(str(tmp_path))


def test_a_cache_that_is_not_whole_is_one_line(hub, tmp_path):
    with pytest.raises(ConfigError, match=f"{ID} has no other.pt in .*, only Cosmos-Policy-LIBERO-Predict2-2B.pt, README.md"):
        released.local(f"{ID}/other.pt")
    both = cached(hub, "one/two", {"a.pt": b"1"}, "aaaa", main=None)
    assert released.local("one/two") == both / "snapshots" / "aaaa"  # a download of a revision leaves no refs/main
    (both / "snapshots" / "bbbb").mkdir()
    with pytest.raises(ConfigError, match="has 2 snapshots: aaaa, bbbb; give the path of one of them"):
        released.local("one/two")
    (both / "blobs" / f"{0:064x}").unlink()
    with pytest.raises(ConfigError, match="a.pt is a link to .*, which is missing: the download is incomplete"):
        released.local(both / "snapshots" / "aaaa" / "a.pt")
    (hub / "models--three--four" / "snapshots").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no snapshots: the download is incomplete, repeat it"):
        released.local("three/four")


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("prefixes", [
    *permutations(("module.", "_orig_mod.", "net.")), ("model.", "net."), ("module.", "model.", "_orig_mod."), ("net.", "module."),
    ("_fsdp_wrapped_module.", "net.", "_fsdp_wrapped_module."),
], ids="".join)  # fmt: skip
def test_prefixes_of_wrappers_are_understood_in_any_order(tmp_path, prefixes):
    torch.save({"state_dict": public(weights(), "".join(prefixes))}, tmp_path / "policy.pt")
    assert same(read_weights(tmp_path / "policy.pt"), weights())


def test_wrapped_blocks_inside_a_name_are_understood(tmp_path):
    inside = {name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module._orig_mod."): value for name, value in weights().items()}
    torch.save(public(inside, "net."), tmp_path / "policy.pt")
    assert same(read_weights(tmp_path / "policy.pt"), weights())


def test_of_two_copies_the_trained_one_is_taken_and_said(tmp_path, caplog):
    average = {name: value + 1 for name, value in weights().items()}
    torch.save({**public(average, "module.net_ema."), **public(weights(), "module.net.")}, tmp_path / "both.pt")
    torch.save({"model": public(weights()), "ema": public(average)}, tmp_path / "wrapped.pt")
    torch.save({"ema": public(average, "net_ema.")}, tmp_path / "alone.pt")
    with caplog.at_level(logging.WARNING):
        assert same(read_weights(tmp_path / "both.pt"), weights()) and same(read_weights(tmp_path / "wrapped.pt"), weights())
    assert [record.getMessage().removeprefix(str(tmp_path)) for record in caplog.records] == [
        "/both.pt holds the trained network and its average (net_ema.): the trained one is taken",
        "/wrapped.pt holds weights under 'model' and 'ema': those under 'model' are taken"]
    caplog.clear()
    assert same(read_weights(tmp_path / "alone.pt"), average) and not caplog.records


@pytest.mark.parametrize("format", ["pt", "safetensors"])
@pytest.mark.parametrize("spoil, complaint", [
    (lambda value: value.index_fill(0, torch.tensor([0]), float("nan")), "has numbers that are not finite"),
    (lambda value: value.index_fill(0, torch.tensor([0]), float("inf")), "has numbers that are not finite"),
    (lambda value: value.to(torch.int8), r"is of torch.int8, as quantised"),
    (lambda value: value.to(torch.float8_e4m3fn), r"is of torch.float8_e4m3fn, as quantised"),
], ids=["nan", "inf", "int8", "float8"])  # fmt: skip
def test_weights_that_cannot_be_a_network_s_are_refused_by_name(tmp_path, format, spoil, complaint):
    state, key = weights(), "blocks.1.mlp.layer1.weight"
    state[key] = spoil(state[key])
    path = tmp_path / f"policy.{format}"
    torch.save(public(state), path) if format == "pt" else save_file(public(state), path)
    with refused(f"key {key} {complaint}"):
        read_weights(path)


@pytest.mark.parametrize("change, complaint", [
    ({"actions_min": [-1.0] * 7, "actions_max": [1.0] * 7, "proprio_min": [-1.0] * 9, "proprio_max": [1.0] * 9}, "after normalisation"),
    ({"actions_min": [2.0] + [-0.5] * 6}, r"actions_min\[0\] = 2 exceeds actions_max\[0\] = 0.9"),
    ({"proprio_max": [1.5] * 8 + [float("nan")]}, r"proprio_max\[8\] is not finite"), ({"proprio_max": None}, "proprio_max is no list"),
    ({"actions_max": [True] * 7}, "actions_max is no list of numbers"), ({"proprio_min": [-2.0] * 8}, "proprio_max has 9 numbers"),
], ids=["post_norm", "crossed", "nan", "null", "flags", "sizes"])  # fmt: skip
def test_statistics_that_no_data_have_are_refused_by_name(tmp_path, change, complaint):
    file = tmp_path / "libero_dataset_statistics_post_norm.json"
    file.write_text(json.dumps(STATISTICS | change))
    with refused(complaint):
        read_statistics(file)


def test_actions_alone_may_span_minus_one_to_one(tmp_path):
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps(STATISTICS | {"actions_min": [-1] * 7, "actions_max": [1] * 7}))
    assert read_statistics(file).actions_high.tolist() == [1.0] * 7


# ---------------------------------------------------------------- the VAE


def wan_name(name: str) -> str:
    """The name in Wan's own code of a parameter that diffusers calls ``name``."""
    side, _, rest = name.partition(".")
    for theirs, ours in (("resnets.0.", "0."), ("attentions.0.", "1."), ("resnets.1.", "2.")):
        if rest.startswith("mid_block."):
            rest = rest.replace(f"mid_block.{theirs}", f"middle.{ours}")
    parts = rest.split(".")
    if parts[0] == "up_blocks":
        inner = int(parts[3]) if parts[2] == "resnets" else 3
        parts = ["upsamples", str(4 * int(parts[1]) + inner), *parts[4:]]
    elif parts[0] == "down_blocks":
        parts[0] = "downsamples"
    rest = ".".join(parts)
    for theirs, ours in (("norm1.", "residual.0."), ("conv1.", "residual.2."), ("norm2.", "residual.3."), ("conv2.", "residual.6."),
                         ("conv_shortcut.", "shortcut."), ("norm_out.", "head.0."), ("conv_out.", "head.2."), ("conv_in.", "conv1.")):
        rest = rest.replace(theirs, ours) if theirs != "conv1." or "samples" in rest or "middle" in rest else rest
    return {"quant_conv": "conv1.", "post_quant_conv": "conv2."}[side] + rest if side.endswith("quant_conv") else f"{side}.{rest}"


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """(a small VAE of the real class and depth, its state under Wan's names)."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    made = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2).eval()
    return made, {wan_name(name): value for name, value in made.state_dict().items()}


def test_names_of_the_file_are_those_of_wans_code(vae):
    """194 keys; these are some of the public class's own state dict."""
    names = set(vae[1])
    assert len(names) == 194 and {
        "conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma",
        "encoder.downsamples.2.resample.1.weight",
        "encoder.downsamples.5.time_conv.weight", "encoder.middle.1.to_qkv.weight", "encoder.head.2.weight", "decoder.conv1.bias",
        "decoder.upsamples.3.resample.1.weight", "decoder.upsamples.3.time_conv.bias", "decoder.upsamples.4.shortcut.weight",
        "decoder.upsamples.14.residual.6.bias", "decoder.middle.2.residual.3.gamma", "decoder.head.0.gamma"} <= names


@pytest.mark.parametrize("place", ["tokenizer.pth", "tokenizer/tokenizer.pth", "Wan2.1_VAE.pth", "wrapped.pth", "vae.safetensors"])
def test_the_vae_of_a_release_encodes_as_the_diffusers_one(vae, tmp_path, place):
    made, state = vae
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, file)
    else:
        torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}} if "wrapped" in place else state, file)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8))
    for path in (file, tmp_path) if "wrapped" not in place else (file,):
        assert torch.equal(WanTokenizer.load(str(path)).encode(images, (1, 2), 3), WanTokenizer(made).encode(images, (1, 2), 3))


def test_a_file_that_is_no_whole_vae_is_one_line(vae, tmp_path):
    state = dict(vae[1])
    for name, change, complaint in (
            ("missing", {"decoder.head.2.weight": None}, "key decoder.conv_out.weight is missing"),
            ("shape", {"encoder.head.2.weight": torch.zeros(2, 2)}, r"key encoder.conv_out.weight has shape \(2, 2\)"),
            ("nan", {"conv1.bias": torch.full((32,), float("nan"))}, "key quant_conv.bias has numbers that are not finite")):
        torch.save({k: v for k, v in (state | change).items() if v is not None}, tmp_path / f"{name}.pth")
        with refused(complaint):
            WanTokenizer.load(str(tmp_path / f"{name}.pth"))
    torch.save(public(weights()), tmp_path / "policy.pt")
    with pytest.raises(CheckpointError, match="policy.pt is no Wan 2.1 VAE: it has no encoder.conv1.weight"):
        WanTokenizer.load(str(tmp_path / "policy.pt"))
