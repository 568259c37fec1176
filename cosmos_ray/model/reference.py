"""diffusers' ``CosmosTransformer3DModel`` with our weights, to compare with: in tests of parity and in ``jobs/bench/model.py``."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cosmos_ray.errors import ConfigError
from cosmos_ray.model.exchange.diffusers_folder import diffusers_config
from cosmos_ray.model.exchange.names import to_diffusers
from cosmos_ray.model.transformer import Transformer


class DiffusersTwin:
    """diffusers' class holding ``net``'s parameters themselves, not copies. ConfigError where diffusers is not installed."""

    def __init__(self, net: Transformer):
        try:
            from diffusers.models.transformers import transformer_cosmos
        except ImportError as error:
            raise ConfigError("comparing with diffusers needs it: pip install 'cosmos-ray[2b]'") from error
        if not hasattr(transformer_cosmos, "transforms"):  # it resizes the padding mask with torchvision, which need not be there
            transformer_cosmos.transforms = SimpleNamespace(
                functional=SimpleNamespace(resize=lambda mask, size, interpolation: F.interpolate(mask, size)),
                InterpolationMode=SimpleNamespace(NEAREST="nearest"))
        config = {k: v for k, v in diffusers_config(**net.config.diffusers_dimensions()).items() if not k.startswith("_")}
        with torch.device("meta"):
            self.model = transformer_cosmos.CosmosTransformer3DModel(**config).eval()
        self.model.load_state_dict({to_diffusers(k): v for k, v in net.state_dict().items()}, assign=True)
        self.model.rope = type(self.model.rope)(hidden_size=net.config.head_dim, max_size=tuple(config["max_size"]),
                                                patch_size=tuple(config["patch_size"]), rope_scale=tuple(config["rope_scale"]))
        self.bf16_timestep = net.config.bf16_timestep

    def __call__(self, latents: torch.Tensor, clean: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One evaluation as :meth:`Transformer.forward`: latents (B, C, T, h, w), clean and timesteps (B, T), tokens (B, L, text_width)."""
        dtype = self.model.proj_out.weight.dtype
        b, _, t, h, w = latents.shape
        return self.model(
            latents.to(dtype), condition_mask=clean[:, None, :, None, None].to(dtype).expand(b, 1, t, h, w),
            timestep=(timesteps.bfloat16().float() if self.bf16_timestep else timesteps)[:, None, :, None, None],
            encoder_hidden_states=tokens.to(dtype), padding_mask=latents.new_zeros(1, 1, h, w, dtype=dtype), fps=None, return_dict=False)[0]
