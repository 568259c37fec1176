"""Parameter names: the public checkpoints', with or without ``net.``, and diffusers' (method 5.2 and 5.4)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import owned

PREFIX = "net."
EMA = "net_ema"

#: What wrappers put before a parameter's name, or into it: DDP, torch.compile, activation checkpointing, FSDP.
_WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
#: What holds the network, before a parameter's name, in any order.
_HOLDERS = ("net", EMA, "model")

logger = logging.getLogger(__name__)

#: Counters, tables and Transformer Engine state that are no parameters: dropped where a name contains one of these.
DROPPED = ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours", "pos_embedder.seq",
           "pos_embedder.dim_spatial_range", "pos_embedder.dim_temporal_range", "_extra_state")

#: (public, diffusers): substrings to replace in this order, and back in the opposite order.
_PAIRS = (
    ("t_embedder.1", "time_embed.t_embedder"), ("t_embedding_norm", "time_embed.norm"), ("blocks", "transformer_blocks"),
    ("adaln_modulation_self_attn.1", "norm1.linear_1"), ("adaln_modulation_self_attn.2", "norm1.linear_2"),
    ("adaln_modulation_cross_attn.1", "norm2.linear_1"), ("adaln_modulation_cross_attn.2", "norm2.linear_2"),
    ("adaln_modulation_mlp.1", "norm3.linear_1"), ("adaln_modulation_mlp.2", "norm3.linear_2"),
    ("self_attn", "attn1"), ("cross_attn", "attn2"), ("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"),
    ("output_proj", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k"), ("mlp.layer1", "ff.net.0.proj"), ("mlp.layer2", "ff.net.2"),
    ("x_embedder.proj.1", "patch_embed.proj"), ("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    ("final_layer.adaln_modulation.2", "norm_out.linear_2"), ("final_layer.linear", "proj_out"),
)


def to_diffusers(name: str) -> str:
    """diffusers' name of a parameter; ``name`` is the public name without ``net.``."""
    for public, diffusers in _PAIRS:
        name = name.replace(public, diffusers)
    return name


def from_diffusers(name: str) -> str:
    """The inverse of :func:`to_diffusers`; public names stay unchanged."""
    for public, diffusers in reversed(_PAIRS):
        name = name.replace(diffusers, public)
    return name


def public_names(names: Iterable[str], where: str) -> dict[str, str]:
    """{name as stored: public name without ``net.``} of the parameters among ``names``.

    Prefixes of wrappers (``module.``, ``_orig_mod.`` and such) and of what holds the network (``net.``, ``net_ema.``, ``model.``) are
    taken off, in any order. Of two copies of the network, the trained one counts, not its average, and a warning says so: ``net_ema.``
    counts only where it is alone. Names that no rule covers are kept, and :func:`match` refuses
    them. CheckpointError when two stored names mean the same parameter.
    """
    names = list(names)
    bare = {name: _bare(name) for name in names if not any(part in name for part in DROPPED)}
    averages = sum(average for _, average in bare.values())
    if both := 0 < averages < len(bare):
        logger.warning("%s holds the trained network and its average (%s.): the trained one is taken", where, EMA)
    chosen: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name, (short, average) in bare.items():
        if both and average:
            continue
        public = from_diffusers(short)
        if public in taken:
            raise CheckpointError(f"{where}: keys {taken[public]} and {name} are the same parameter: remove one of them")
        chosen[name], taken[public] = public, name
    if not chosen:
        raise CheckpointError(f"{where} holds no model weights" + (f", only keys like {names[0]}" if names else ": it is empty"))
    return chosen


def _bare(name: str) -> tuple[str, bool]:
    """(the name without wrappers and holders, whether it is of an average)."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    held = next((i for i, part in enumerate(parts[:-1]) if part not in _HOLDERS), max(0, len(parts) - 1))
    return ".".join(parts[held:]), EMA in parts[:held]


def clean(tensors: Mapping[str, Any], where: str = "the state dict") -> dict[str, torch.Tensor]:
    """A state dict under public names, in the stored dtypes. CheckpointError as :func:`public_names`, and for what is no dense tensor."""
    out = {}
    for name, public in public_names(tensors, where).items():
        value = tensors[name]
        if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{where}: key {name} is no dense tensor but a {_described(value)}: save the model's plain state dict")
        out[public] = value.detach()
    return out


def _described(value: Any) -> str:
    name = type(value).__name__
    return f"{name} ({value.layout}, {value.dtype}, {value.device})" if isinstance(value, torch.Tensor) else name


def flaw(tensor: torch.Tensor) -> str:
    """Why a tensor is no weights, "" if it may be: weights have 16 bits or more, and every number is finite.

    The extremes tell that, forty times faster than ``isfinite`` on bf16: nan goes into both.
    """
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return f"is of {tensor.dtype}, as quantised weights are: choose weights that are not quantised"
    finite = not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())
    return "" if finite else "has numbers that are not finite: its training diverged, or the file is damaged"


def prefixed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Ready to be written: :func:`owned` tensors under names with ``net.``."""
    return owned({PREFIX + name: value for name, value in clean(tensors).items()})


def match(tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """CheckpointError with the first missing, unknown or misshapen key: weights fit as a whole or not at all."""
    if adapters := [key for key in tensors if ".lora_" in key or ".base_layer." in key]:
        raise CheckpointError(f"{where}: key {adapters[0]} is of a LoRA adapter, which is not merged into its network: merge them "
                              "(`merge_and_unload` of peft) and save the network")
    if tensors and expected and not set(tensors) & set(expected):
        raise CheckpointError(f"{where}: no key is of the model: the file has {min(tensors)} and such, the model {min(expected)}: "
                              "choose weights of this model")
    for key in sorted(set(tensors) | set(expected)):
        if key not in tensors:
            raise CheckpointError(f"{where}: key {key} is missing, the model has it with shape {tuple(expected[key])}: "
                                  "choose weights of this model")
        shape = tuple(tensors[key].shape)
        if key not in expected:
            raise CheckpointError(f"{where}: key {key} with shape {shape} is unknown to the model: choose weights of this model")
        if shape != tuple(expected[key]):
            raise CheckpointError(f"{where}: key {key} has shape {shape}, the model's is {tuple(expected[key])}: "
                                  "set the model's dimensions to those of the weights")
