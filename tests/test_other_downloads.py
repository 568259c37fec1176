"""Files that are not what their name says, and policies saved by other programs: read as they are, or refused with what to do."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from cosmos_ray import load_policy, released
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.exchange import match, read_weights
from cosmos_ray.model.exchange.statistics import read_statistics
from cosmos_ray.model.exchange.text_embeddings import read_text_embeddings
from cosmos_ray.model.text import T5Text
from cosmos_ray.model.tokenizer import WanTokenizer
from tests import public_files
from tests.test_exchange import public, refused, same, weights

READERS = {"w.pt": read_weights, "w.ckpt": read_weights, "w.safetensors": read_weights, "s.json": read_statistics,
           "t5_embeddings.pkl": read_text_embeddings, "tokenizer.pth": lambda file: WanTokenizer.load(str(file))}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content, says", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 39\n",
     r"is only a pointer to the file \(Git LFS\): run `git lfs pull`"),
    (b"\n<!DOCTYPE html>\n<html></html>", "is a web page, not the file: download the file itself"),
    (b"", "is an empty file: copy it again"),
], ids=["pointer", "page", "empty"])  # fmt: skip
def test_what_a_failed_download_left_is_called_what_it_is(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with refused(rf"{name} {says}"):
        READERS[name](tmp_path / name)


def test_a_checkpoint_of_lightning_with_its_trainer_s_state_is_read(tmp_path):
    trainer = {"pytorch-lightning_version": "2.1.0", "global_step": 10, "optimizer_states": [{"state": {0: torch.ones(2)}}]}
    torch.save({**trainer, "state_dict": public(weights(), "model.net.")}, tmp_path / "last.ckpt")
    assert same(read_weights(tmp_path / "last.ckpt"), weights()) and same(read_weights(tmp_path), weights())


def sharded(folder, second: dict | None = None):
    """Weights in two shards with an index, as transformers and accelerate write them."""
    names, files = sorted(weights()), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    half = len(names) // 2
    save_file({name: weights()[name] for name in names[:half]}, folder / files[0])
    save_file({name: weights()[name] for name in names[half:]} | (second or {}), folder / files[1])
    index = {"metadata": {}, "weight_map": {name: files[number >= half] for number, name in enumerate(names)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_with_an_index_are_one_model(tmp_path):
    folder = sharded(tmp_path)
    assert same(read_weights(folder), weights()) and same(read_weights(folder / "model.safetensors.index.json"), weights())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with refused("shard model-00002-of-00002.safetensors is missing: copy the whole folder"):
        read_weights(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    first = min(weights())
    with refused(f"model-00002-of-00002.safetensors: key {first} is in another shard too"):
        read_weights(sharded(tmp_path, {first: weights()[first] + 1}))


@pytest.mark.parametrize("state, says", [
    ({"blocks.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}, "is of a LoRA adapter, which is not merged"),
    ({"blocks.0.self_attn.q_proj.base_layer.weight": torch.ones(64, 64)}, "is of a LoRA adapter, which is not merged"),
    ({"student.blocks.0.mlp.layer1.weight": torch.ones(4, 64)}, "no key is of the model: the file has student.blocks.0.mlp"),
], ids=["adapter", "unmerged", "other names"])  # fmt: skip
def test_weights_of_nothing_that_can_act_say_what_they_are(tmp_path, state, says):
    with refused(says):
        match(state, {name: tuple(value.shape) for name, value in weights().items()}, "w.pt")


def test_statistics_in_another_form_say_what_is_wanted(tmp_path):
    (tmp_path / "stats.json").write_text(json.dumps({"action": {"min": [0], "max": [1]}, "observation.state": {"min": [0]}}))
    with refused("actions_min is missing, it has 'action', 'observation.state': give the release's"):
        read_statistics(tmp_path / "stats.json")
    held = public_files.statistics(tmp_path / "plain.json", 7, 9).read_text()
    (tmp_path / "mark.json").write_text(held, encoding="utf-8-sig")  # an editor's byte order mark
    assert len(read_statistics(tmp_path / "mark.json").actions_low) == 7


@pytest.mark.parametrize("asked", ["open the top drawer", "Open the top drawer."])
def test_an_instruction_is_given_to_the_letter(tmp_path, asked):
    with open(tmp_path / "t5.pkl", "wb") as file:
        pickle.dump({"Open the top drawer": torch.ones(512, 1024), "fold the shirt": torch.ones(512, 1024)}, file)
    with pytest.raises(ConfigError, match="no embedding of '.*', only of 2, the nearest 'Open the top drawer': give it to the"):
        T5Text(str(tmp_path / "t5.pkl"))(asked)


@pytest.mark.parametrize("changes, says", [
    ({"_class_name": "AutoencoderKL"}, "its config.json is of AutoencoderKL,"), ({"z_dim": 48}, "z_dim 48, is_residual False; give"),
    ({"is_residual": True}, "z_dim 16, is_residual True; give")], ids=lambda value: "")
def test_the_vae_of_another_model_is_refused(tmp_path, changes, says):
    folder = public_files.vae(tmp_path / "vae")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    with refused(says):
        WanTokenizer.load(str(folder))


def test_load_policy_refuses_statistics_of_another_suite_s_robot(tmp_path):
    texts = public_files.embeddings(tmp_path / "t5.pkl", ["open the top drawer"])
    with pytest.raises(ConfigError, match="aloha.json describes 14 numbers per action and 14 of .*, suite 'libero' has 7 and 9"):
        load_policy(public_files.weights(tmp_path / "w.pt"), suite="libero", tokenizer=public_files.vae(tmp_path / "vae"), text=texts,
                    statistics=public_files.statistics(tmp_path / "aloha.json", 14, 14))


def test_several_indices_are_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}{released.INDEX}").write_text("{}")
    with pytest.raises(ConfigError, match="has 2 indices of weights: a.safetensors.index.json, b.safetensors.index.json"):
        read_weights(tmp_path)
    (tmp_path / f"b{released.INDEX}").unlink()
    with pytest.raises(CheckpointError, match="has no weight_map"):
        read_weights(tmp_path)
