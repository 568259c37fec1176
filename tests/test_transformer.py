"""The transformer against diffusers' class, and what it computes apart: prompts, modulation, nothing read back from the device."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_ray.config import ModelConfig
from cosmos_ray.model import sampling
from cosmos_ray.model.policy import CosmosPolicy
from cosmos_ray.model.prompts import GRAIN, Prompts, make_prompts
from cosmos_ray.model.reference import DiffusersTwin
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import HashText
from cosmos_ray.model.tokenizer import PatchPCA
from cosmos_ray.model.transformer import Transformer, TransformerConfig

TINY = TransformerConfig(width=128, heads=4, layers=4, patch=4, text_width=64, adaln_rank=64, rope_scale=(1.0, 1.0, 1.0))
SMALL = TransformerConfig(width=96, heads=4, layers=3, text_width=48, adaln_rank=32)


def network(config: TransformerConfig) -> Transformer:
    """With weights of every parameter away from zero, so that each of them matters."""
    net, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim == 2:
                p.normal_(0, p.shape[1] ** -0.5, generator=generator)
            else:
                p.normal_(1, 0.2, generator=generator)
    return net.eval()


def inputs(config: TransformerConfig, rows: int, frames: int, side: int, lengths: tuple[int, ...], text: int):
    """latents, clean, timesteps (another for each row) and text embeddings whose rows past the prompt's length are zero."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, config.channels, frames, side, side, generator=g)
    clean = torch.zeros(rows, frames)
    clean[:, : frames // 2] = 1
    timesteps = (1 - clean) * torch.rand(rows, 1, generator=g)
    tokens = torch.zeros(rows, text, config.text_width)
    for row, n in zip(tokens, lengths, strict=True):
        row[:n] = torch.randn(n, config.text_width, generator=g)
    return latents, clean, timesteps, tokens


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("config, frames, side", [
    (TINY, 9, 8), (SMALL, 11, 8), (SMALL, 7, 4), (dataclasses.replace(SMALL, bf16_timestep=False), 9, 6),
    (TransformerConfig(width=160, heads=8, layers=2, patch=1, text_width=32, adaln_rank=16, mlp_ratio=2.0), 13, 4),
    (TransformerConfig(layers=2), 9, 4),
], ids=["tiny", "11 frames", "7 frames", "fp32 timestep", "patch 1", "2B dimensions, 2 layers"])  # fmt: skip
def test_parity_with_diffusers(config, frames, side):
    net = network(config)
    latents, clean, timesteps, tokens = inputs(config, 2, frames, side, (5, 11), 64)
    with torch.no_grad():
        reference = DiffusersTwin(net)(latents, clean, timesteps, tokens)
        plain = net(latents, clean, timesteps, make_prompts(list(tokens), latents.device, collapse=False))
        collapsed = net(latents, clean, timesteps, make_prompts(list(tokens), latents.device))
    assert reference.abs().max() > 0.5
    assert difference(plain, reference) < 1e-5 and difference(collapsed, reference) < 1e-5


def test_a_wrong_timestep_of_one_frame_would_show():
    """The parity test can fail: what it compares depends on every frame's own timestep."""
    net = network(SMALL)
    latents, clean, timesteps, tokens = inputs(SMALL, 1, 9, 4, (5,), 64)
    prompts = make_prompts(list(tokens), latents.device)
    with torch.no_grad():
        right = net(latents, clean, timesteps, prompts)
        for frame in (0, 8):
            wrong = timesteps.clone()
            wrong[:, frame] += 0.1
            assert difference(net(latents, clean, wrong, prompts), right) > 1e-3


@pytest.mark.parametrize("lengths", [(3, 31), (31, 32), (33, 5), (512, 7), (0, 4)])
def test_collapsed_zero_rows_attend_as_all_of_them(lengths):
    net = network(SMALL)
    latents, clean, timesteps, tokens = inputs(SMALL, 2, 7, 4, lengths, 512)
    prompts = make_prompts(list(tokens), latents.device)
    assert prompts.tokens.shape[1] == min(512, -(-(max(lengths) + 1) // GRAIN) * GRAIN)
    with torch.no_grad():
        whole = net(latents, clean, timesteps, make_prompts(list(tokens), latents.device, collapse=False))
        assert difference(net(latents, clean, timesteps, prompts), whole) < 1e-5


def test_gradients_through_collapsed_prompts_are_those_of_all_rows():
    net = network(SMALL)
    latents, clean, timesteps, tokens = inputs(SMALL, 2, 7, 4, (4, 9), 512)
    gradients = []
    for collapse in (False, True):
        net.zero_grad()
        net(latents, clean, timesteps, make_prompts(list(tokens), latents.device, collapse=collapse)).square().mean().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(difference(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))


def test_keys_and_modulation_computed_ahead_change_nothing():
    net = network(TINY)
    latents, clean, timesteps, tokens = inputs(TINY, 3, 9, 8, (2, 5, 9), 16)
    clean, timesteps = clean[:1], timesteps[:1]
    prompts = make_prompts(list(tokens), latents.device)
    with torch.no_grad():
        at_once = net(latents, clean.expand(3, -1), timesteps.expand(3, -1), prompts)
        ahead = net(latents, clean, timesteps, net.attend_to(prompts), net.modulate(timesteps))
        by_rows = [net(latents[i : i + 1], clean, timesteps, make_prompts([tokens[i]], latents.device)) for i in range(3)]
    assert difference(ahead, at_once) < 1e-6 and difference(torch.cat(by_rows), at_once) < 1e-6


def test_rows_of_prompts_repeat_like_tensors():
    prompts = make_prompts([torch.ones(4, 3), torch.full((4, 3), 2.0)], torch.device("cpu"))
    values = prompts.tokens[:, 0, 0]
    assert prompts.repeat_interleave(2).of_rows(values).tolist() == [1, 1, 2, 2]
    assert prompts.repeat(2).of_rows(values).tolist() == [1, 2, 1, 2] and len(prompts.repeat(2)) == 4


def test_flops_of_the_2b_model_are_the_method_s():
    """Method 4.2: 6.84 and 8.53 TFLOP per evaluation with 9 and 11 latent frames and 512 text rows."""
    assert TransformerConfig().flops(9, 28, 28, 512) / 1e12 == pytest.approx(6.84, rel=0.01)
    assert TransformerConfig().flops(11, 28, 28, 512) / 1e12 == pytest.approx(8.53, rel=0.01)


class _Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def untrained_policy() -> CosmosPolicy:
    spec = make_spec(ModelConfig(width=64, heads=2, layers=2, image_size=32), ("wrist", "agent"), 4, 9)
    return CosmosPolicy(spec, PatchPCA(), HashText(spec.text_tokens, spec.transformer.text_width))


@pytest.mark.parametrize("sample_type", list(SampleType))
def test_the_sampler_reads_nothing_back_and_draws_nothing(sample_type):
    """A CUDA graph can capture it: on the meta device reading a value back raises, and no random operation runs."""
    policy = untrained_policy().to("meta")
    with torch.no_grad():
        text = policy.net.attend_to(Prompts(torch.empty(1, 16, 64, device="meta"), None, torch.empty(3, dtype=torch.int64, device="meta")))
    known = torch.empty(3, 16, 9, 4, 4, device="meta")
    with _Operations() as seen:
        out = sampling.sample(policy, sampling.give(policy, sample_type, known, text), known, steps=5)
    assert out.shape == known.shape
    assert not [name for name in seen.names if any(word in name for word in ("rand", "normal", "uniform", "local_scalar", "item"))]
    assert sum("scaled_dot_product" in name or "softmax" in name for name in seen.names) >= 5 * 2 * 2  # it did run: 5 steps, 2 layers


def test_reference_steps_make_one_evaluation_of_two():
    policy = untrained_policy()
    policy.net.initialize(torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.net.final_layer.linear.weight.normal_(0, 0.1)
    known, seeds = torch.zeros(1, 16, 9, 4, 4), torch.tensor([3])
    act = lambda steps: sampling.act(policy, known, policy.embed(["lift"]), seeds, steps)  # noqa: E731
    one, two, three = act(1), act(2), act(3)
    policy.reference_steps = True
    assert torch.equal(act(1), one) and torch.equal(act(2), one) and torch.equal(act(3), three) and not torch.equal(two, one)
