"""diffusers folders of CosmosTransformer3DModel, and the safetensors files in them (method 5.4). Needs no diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import read_safetensors, replacing, save_safetensors
from cosmos_ray.model.exchange.names import clean, match, to_diffusers

CLASS = "CosmosTransformer3DModel"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model"


def diffusers_config(width: int, heads: int, layers: int, text_width: int = 1024, adaln_rank: int = 256, mlp_ratio: float = 4.0,
                     channels: int = 16, patch: int = 2, rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)) -> dict[str, Any]:
    """What config.json says of a model of these dimensions; the defaults are the 2B model's. ``channels`` counts latent channels."""
    return {
        "_class_name": CLASS, "in_channels": channels + 1, "out_channels": channels, "num_attention_heads": heads,
        "attention_head_dim": width // heads, "num_layers": layers, "mlp_ratio": mlp_ratio, "text_embed_dim": text_width,
        "adaln_lora_dim": adaln_rank, "max_size": [128, 240, 240], "patch_size": [1, patch, patch], "rope_scale": list(rope_scale),
        "concat_padding_mask": True, "extra_pos_embed_type": None,
    }


def read_diffusers(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(weights under public names, parsed config.json) of a model folder, or of the pipeline folder above its ``transformer``.

    CheckpointError for another model class, pickled weights, a missing shard, and a file that cannot be read. That the weights are
    complete is for ``match`` to say.
    """
    folder = diffusers_folder(path)
    config = _read_json(folder / CONFIG)
    if config.get("_class_name") != CLASS:
        raise CheckpointError(f"{folder / CONFIG} is of a {config.get('_class_name')}, not of a {CLASS}: choose the transformer's folder")
    return clean(_together(_weight_files(folder)), str(folder)), config


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """The weights of the safetensors files that ``index`` (``*.safetensors.index.json``) names, under public names."""
    return clean(_together(_shards(index)), str(index))


def _together(files: list[Path]) -> dict[str, torch.Tensor]:
    """The tensors of several safetensors files. CheckpointError for one that is in two of them."""
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        held = read_safetensors(file)
        if double := sorted(held.keys() & tensors):
            raise CheckpointError(f"{file}: key {double[0]} is in another shard too: the shards are of two saves, copy the whole folder")
        tensors |= held
    return tensors


def write_diffusers(tensors: Mapping[str, torch.Tensor], folder: str | Path, config: Mapping[str, Any], overwrite: bool = False) -> None:
    """Write a folder that ``CosmosTransformer3DModel.from_pretrained`` loads; it appears when it is complete.

    ``config`` is as from :func:`diffusers_config`; CheckpointError when the tensors have other dimensions.
    """
    state = clean(tensors)
    match(state, _shapes(config), "the weights for diffusers")
    with replacing(folder, overwrite) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(dict(config), indent=2) + "\n")
        save_safetensors({to_diffusers(name): value for name, value in state.items()}, temporary / f"{WEIGHTS}.safetensors")


def diffusers_folder(path: str | Path) -> Path:
    """``path`` or its ``transformer`` folder, whichever has a config.json. CheckpointError when neither has."""
    for folder in (Path(path), Path(path) / "transformer"):
        if (folder / CONFIG).is_file():
            return folder
    raise CheckpointError(f"{path} is no diffusers folder: it has no {CONFIG}, nor has its transformer folder")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        held = json.loads(file.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}): copy it again") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{file} holds a {type(held).__name__} instead of settings: copy it again")
    return held


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, all present: of an index file if there is one, else the only one."""
    index = folder / f"{WEIGHTS}.safetensors.index.json"
    if index.is_file():
        return _shards(index)
    files = sorted(folder.glob(f"{WEIGHTS}*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise CheckpointError(f"{folder} has {files[0].name} and {files[1].name} but no {index.name}: keep one, or copy the index too")
    if any(folder.glob("*.bin")):
        raise CheckpointError(f"{folder} has its weights only as .bin, which is pickled code: save it with safe_serialization=True")
    raise CheckpointError(f"{folder} has no {WEIGHTS}.safetensors: copy the whole folder")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all beside it and present."""
    shards, folder = _read_json(index).get("weight_map"), index.parent
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index} has no weight_map of keys to files: copy it again")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != folder:
            raise CheckpointError(f"{index} points to {file.name} outside of its folder: refused")
        if not file.is_file():
            raise CheckpointError(f"{folder}: shard {file.name} is missing: copy the whole folder")
    return files


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Public name and shape of every parameter of the model that ``config`` describes."""
    try:
        head, layers = config["attention_head_dim"], config["num_layers"]
        rank, text = config["adaln_lora_dim"], config["text_embed_dim"]
        width, area = config["num_attention_heads"] * head, config["patch_size"][1] * config["patch_size"][2]
        hidden, into, out = int(width * config["mlp_ratio"]), config["in_channels"] + 1, config["out_channels"]
    except (LookupError, TypeError) as error:
        raise CheckpointError(f"the config for diffusers is incomplete ({error}): make it with diffusers_config") from error
    shapes = {"x_embedder.proj.1.weight": (width, into * area), "t_embedder.1.linear_1.weight": (width, width),
              "t_embedder.1.linear_2.weight": (3 * width, width), "t_embedding_norm.weight": (width,),
              "final_layer.linear.weight": (out * area, width), "final_layer.adaln_modulation.1.weight": (rank, width),
              "final_layer.adaln_modulation.2.weight": (2 * width, rank)}
    for block in (f"blocks.{i}." for i in range(layers)):
        for part, source in (("self_attn", width), ("cross_attn", text)):
            shapes |= {f"{block}{part}.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
            shapes |= {f"{block}{part}.{name}.weight": (width, width) for name in ("q_proj", "output_proj")}
            shapes |= {f"{block}{part}.{name}.weight": (width, source) for name in ("k_proj", "v_proj")}
        shapes |= {f"{block}mlp.layer1.weight": (hidden, width), f"{block}mlp.layer2.weight": (width, hidden)}
        for part in ("self_attn", "cross_attn", "mlp"):
            adaln = f"{block}adaln_modulation_{part}"
            shapes |= {f"{adaln}.1.weight": (rank, width), f"{adaln}.2.weight": (3 * width, rank)}
    return shapes
