"""The Wan 2.1 VAE as a file, under the names of Wan's own code: the ``tokenizer.pth`` or ``Wan2.1_VAE.pth`` of a release."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.exchange.files import read_safetensors
from cosmos_ray.model.exchange.names import flaw, match
from cosmos_ray.model.exchange.pt import torch_load, unwrapped

MULTIPLES = (1, 2, 4, 4)  #: channels of each level, as multiples of the first level's
RESIDUAL_BLOCKS = 2  #: of each level


def read_wan_vae(file: Path) -> Any:
    """diffusers' ``AutoencoderKLWan`` with the weights in ``file``, in float32.

    Names may be Wan's or diffusers', with or without a wrapper. The widths are the file's. CheckpointError for a file that is no Wan 2.1
    VAE as a whole, with the first key that is missing, unknown or misshapen, and for one that would run code.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    held = read_safetensors(file) if file.suffix == ".safetensors" else unwrapped(torch_load(file, str(file)), str(file))
    tensors = {name.removeprefix("model.").removeprefix("vae."): value for name, value in held.items() if isinstance(value, torch.Tensor)}
    if "encoder.conv1.weight" in tensors:
        tensors = convert_wan_vae_to_diffusers(tensors)
    first = tensors.get("encoder.conv_in.weight")
    if first is None or first.ndim != 5:
        raise CheckpointError(f"{file} is no Wan 2.1 VAE: it has no encoder.conv1.weight of five dimensions; give the release's "
                              "tokenizer.pth (Wan2.1_VAE.pth), or a diffusers folder")
    vae: Any = AutoencoderKLWan(base_dim=first.shape[0], z_dim=16, dim_mult=list(MULTIPLES), num_res_blocks=RESIDUAL_BLOCKS)
    match(tensors, {name: value.shape for name, value in vae.state_dict().items()}, str(file))
    for name, value in tensors.items():
        if why := flaw(value):
            raise CheckpointError(f"{file}: key {name} {why}")
    vae.load_state_dict({name: value.float() for name, value in tensors.items()})
    return vae
