"""Cosmos Policy: one network as policy, world model and value function (paper section 3, method 1 and 2).

Pure torch. The learner trains it through :meth:`CosmosPolicy.loss`; inference queries :meth:`act`, :meth:`imagine` and
:meth:`evaluate`, which are the same sampler with different frames given clean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from cosmos_ray.errors import ConfigError
from cosmos_ray.model import solver
from cosmos_ray.model.images import prepare
from cosmos_ray.model.injection import Normalizer, extract, extract_value, inject, inject_value
from cosmos_ray.model.noise import hybrid_sigma, seeded_noise
from cosmos_ray.model.prompts import Prompts, make_prompts
from cosmos_ray.model.sample_types import SampleType, clean_frames, mask_table, target_frames
from cosmos_ray.model.spec import PolicySpec
from cosmos_ray.model.text import HashText, T5Text
from cosmos_ray.model.tokenizer import PatchPCA, WanTokenizer
from cosmos_ray.model.transformer import Modulation, Transformer

HEAVIEST = 5.0  #: weight of the windows with the greatest advantage
PROMPTS_KEPT = 128  #: different instructions whose keys and values a serving policy holds (some 5 MB each at 2B)


@dataclass
class TrainingBatch:
    """One batch of windows (s, a, s', return), as arrays; see ``replay.WindowBatch``."""

    images: np.ndarray  #: (B, cameras, H, W, 3) uint8 at s
    future_images: np.ndarray  #: the same at s'
    proprio: np.ndarray  #: (B, p) float32 at s
    future_proprio: np.ndarray  #: (B, p) float32 at s'
    actions: np.ndarray  #: (B, K, d) float32: the chunk the sample is about
    value: np.ndarray  #: (B,) float32 in [-1, 1], return at s'
    instructions: Sequence[str]
    kinds: np.ndarray  #: (B,) int64 SampleType
    windows: Sequence[str] = ()  #: B names of the windows the frames are from, where latents may be cached under them
    own: np.ndarray | None = None  #: (B,) bool: policy samples of what a policy itself did, which advantage weighting is for


class CosmosPolicy(nn.Module):
    """Network, tokenizer, text and normalisation of one policy. Build it with :func:`build`, or load it from a checkpoint."""

    def __init__(self, spec: PolicySpec, tokenizer: nn.Module, text: Callable[[str], torch.Tensor], net_device: str = "cpu"):
        super().__init__()
        self.spec, self.layout, self.text = spec, spec.layout, text
        with torch.device(net_device):
            self.net = Transformer(spec.transformer)
        self.tokenizer = tokenizer
        for name, size in (("action", spec.action_dim), ("proprio", spec.proprio_dim)):
            self.register_buffer(f"{name}_low", torch.full((size,), -1.0))
            self.register_buffer(f"{name}_high", torch.ones(size))
        self.register_buffer("clean", mask_table(self.layout, clean_frames), persistent=False)
        self.register_buffer("target", mask_table(self.layout, target_frames), persistent=False)
        weight = torch.ones(len(SampleType), self.layout.frames)
        weight[:, self.layout.action], weight[:, self.layout.value] = spec.action_weight, spec.value_weight
        self.register_buffer("frame_weight", weight, persistent=False)
        self.set_world_weight(spec.world_weight)
        self.reference_steps = False  #: two sampler steps make one network evaluation, as in the public code (method 2.6)
        self.accelerated: Callable | None = None  #: stands in for :meth:`sample`, see ``model.accelerate``
        self._cache: dict | None = None

    def serve(self) -> None:
        """Keep what depends on weights, prompts and sigmas from call to call. Call again whenever the weights have changed."""
        self._cache = {}
        if self.accelerated is not None:
            self.accelerated.forget()

    def set_world_weight(self, weight: float) -> None:
        """Weigh the future frames in the loss of world-model samples by ``weight`` from now on."""
        self.spec = dataclasses.replace(self.spec, world_weight=weight)
        self.frame_weight[int(SampleType.WORLD_MODEL), list(self.layout.future)] = weight

    def set_statistics(self, action_low, action_high, proprio_low, proprio_high) -> None:
        """Fix the min/max normalisation, arrays (d,) and (p,)."""
        for name, value in (("action_low", action_low), ("action_high", action_high),
                            ("proprio_low", proprio_low), ("proprio_high", proprio_high)):
            getattr(self, name).copy_(torch.as_tensor(value))

    @property
    def actions_scale(self) -> Normalizer:
        return Normalizer(self.action_low, self.action_high)

    @property
    def proprio_scale(self) -> Normalizer:
        return Normalizer(self.proprio_low, self.proprio_high)

    @property
    def device(self) -> torch.device:
        return self.action_low.device

    # ---------------------------------------------------------------- latents

    def current_latents(self, images: np.ndarray, proprio: np.ndarray) -> torch.Tensor:
        """Latents (B, C, T, h, w) float32 with the blank frame and the state s filled, zeros elsewhere.

        Only the clean prefix is encoded: the tokenizers are causal. Args: images (B, cameras, H, W, 3) uint8, at H = W =
        ``image_size``, or of any size where the spec names a suite's image pipeline; proprio (B, p) float32. ConfigError when
        they do not fit the model.
        """
        layout = self.layout
        images = self._view(images)
        self._check(images, proprio)
        prefix = self.tokenizer.encode(torch.as_tensor(images, device=self.device), layout.images, layout.action)
        latents = prefix.new_zeros(*prefix.shape[:2], layout.frames, *prefix.shape[3:])
        latents[:, :, : layout.action] = prefix
        latents[:, :, layout.proprio] = self._vector(self.proprio_scale, proprio)
        return latents

    def encode_images(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Latents (B, C, 2 * cameras, h, w) float32 of whole windows: (B, 2 * cameras, H, W, 3) uint8, current then future."""
        slots = self.layout.images + self.layout.future_images
        return self.tokenizer.encode(torch.as_tensor(images, device=self.device), slots, self.layout.value)[:, :, list(slots)]

    def training_latents(self, batch: TrainingBatch, encoded: torch.Tensor | None = None) -> torch.Tensor:
        """Ground-truth latents (B, C, T, h, w) float32 of whole windows; ``encoded`` is :meth:`encode_images` if it is known."""
        layout, shape = self.layout, self.spec.frame_shape
        if encoded is None:
            self._check(batch.images, batch.proprio)
            encoded = self.encode_images(np.concatenate((batch.images, batch.future_images), axis=1))
        latents = encoded.new_empty(len(encoded), shape[0], layout.frames, *shape[1:])
        latents[:, :, 0] = self.tokenizer.blank(self.spec.image_size)
        latents[:, :, list(layout.images + layout.future_images)] = encoded
        latents[:, :, layout.proprio] = self._vector(self.proprio_scale, batch.proprio)
        latents[:, :, layout.future_proprio] = self._vector(self.proprio_scale, batch.future_proprio)
        latents[:, :, layout.action] = self.action_frame(batch.actions)
        latents[:, :, layout.value] = inject_value(torch.as_tensor(batch.value, device=self.device).float(), shape)
        return latents

    def action_frame(self, actions: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B, K, d) chunks in physical units to the (B, C, h, w) ACTION frame."""
        actions = torch.as_tensor(actions, device=self.device).float()
        return inject(self.actions_scale.normalize(actions).flatten(1), self.spec.frame_shape)

    def read_actions(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, K, d) chunks in physical units out of generated latents."""
        spec = self.spec
        flat = extract(latents[:, :, self.layout.action], spec.chunk * spec.action_dim)
        return self.actions_scale.restore(flat.view(-1, spec.chunk, spec.action_dim))

    def read_value(self, latents: torch.Tensor) -> torch.Tensor:
        """(B,) values in [-1, 1] out of generated latents."""
        return extract_value(latents[:, :, self.layout.value])

    def read_future_proprio(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, p) proprioception in physical units out of generated latents."""
        return self.proprio_scale.restore(extract(latents[:, :, self.layout.future_proprio], self.spec.proprio_dim))

    def read_future_images(self, latents: torch.Tensor, images: np.ndarray) -> torch.Tensor:
        """(B, cameras, H, W, 3) uint8 predicted frames, decoded on request only.

        The decoder is causal, so the frames that hold vectors get back the latents of the blank images they replaced, encoded
        behind the current ``images`` (as for :meth:`current_latents`), before anything after them is decoded (method 1.4).
        """
        layout = self.layout
        blank = self.tokenizer.encode(torch.as_tensor(self._view(images), device=self.device), layout.images, layout.future_images[0])
        latents = latents.clone()
        for slot in (layout.proprio, layout.action, layout.future_proprio):
            latents[:, :, slot] = blank[:, :, slot]
        return self.tokenizer.decode(latents, layout.future_images)

    def embed(self, instructions: Sequence[str]) -> Prompts:
        """One row of :class:`Prompts` per instruction; while serving, with their keys and values, computed once per prompt."""
        if self._cache is None:
            known = {instruction: i for i, instruction in enumerate(sorted(set(instructions)))}
            prompts = make_prompts([self.text(i) for i in known], self.device)
        else:
            known, prompts = self._cache.get("prompts", ({}, None))
            if not known.keys() >= set(instructions):
                earlier = known if len(known) < PROMPTS_KEPT else ()
                known = {instruction: i for i, instruction in enumerate(dict.fromkeys([*earlier, *instructions]))}
                with torch.no_grad():
                    prompts = self.net.attend_to(make_prompts([self.text(i) for i in known], self.device))
                self._cache["prompts"] = known, prompts
        return dataclasses.replace(prompts, rows=torch.tensor([known[i] for i in instructions], device=self.device))

    def _view(self, images: np.ndarray) -> np.ndarray:
        """Frames as the evaluation image pipeline of the policy's suite hands them on."""
        if self.spec.jpeg or self.spec.augmented:
            return prepare(images, self.spec.image_size, self.spec.jpeg, self.spec.augmented)
        return images

    def _vector(self, scale: Normalizer, vector: np.ndarray) -> torch.Tensor:
        return inject(scale.normalize(torch.as_tensor(vector, device=self.device).float()), self.spec.frame_shape)

    def _check(self, images: np.ndarray, proprio: np.ndarray) -> None:
        spec = self.spec
        expected = (len(spec.cameras), spec.image_size, spec.image_size, 3)
        if tuple(images.shape[1:]) != expected:
            raise ConfigError(f"images {tuple(images.shape[1:])} do not fit the model: it takes {expected} ({', '.join(spec.cameras)})")
        if proprio.shape[1] != spec.proprio_dim:
            raise ConfigError(f"proprioception of {proprio.shape[1]} numbers does not fit the model: it takes {spec.proprio_dim}")

    # ---------------------------------------------------------------- denoising

    def denoise(self, net: Callable, noised: torch.Tensor, sigma: torch.Tensor | float, known: torch.Tensor, clean: torch.Tensor,
                text: Prompts, modulation: Modulation | None = None) -> torch.Tensor:
        """One network evaluation (method 2.1).

        With ``spec.residual`` the tokens of a future frame also see the current frame and the ACTION frame, as far as they are given,
        and what the network says of it is the change from the current frame.

        Args: noised x_sigma (B, C, T, h, w); sigma, or one for each row as (B, 1); known clean latents; clean (B or 1, T) mask;
        text B rows of prompts; modulation for this sigma and mask if it is known already.
        Returns the predicted x0, float32, with the clean frames put back.
        """
        t = sigma / (1 + sigma)
        t_latent = t[..., None, None, None] if isinstance(t, torch.Tensor) else t
        given = clean[:, None, :, None, None] > 0
        scaled = (1 - t_latent) * noised
        shown = torch.where(given, known, scaled)
        if self.spec.residual:
            layout, told = self.layout, torch.where(given, known, 0)
            beside = (0, 0, 0, 0, layout.action + 1, 1)  # zeros in every frame but the future ones
            # Slices, for a list of frames would be copied to the device, which no CUDA graph can hold.
            current = F.pad(told[:, :, layout.proprio:layout.action], beside)
            action = told[:, :, layout.action:layout.action + 1].expand(-1, -1, len(layout.future), -1, -1)
            shown = shown + torch.where(given, 0, current + F.pad(action, beside))
        out = net(shown, clean, (1 - clean) * t, text, modulation).float()
        x0 = out if self.spec.output == "x0" else scaled - t_latent * out
        if self.spec.residual:
            x0 = x0 + current
        return torch.where(given, known, x0)

    def loss(self, batch: TrainingBatch, generator: torch.Generator, net: Callable | None = None,
             encoded: torch.Tensor | None = None, *, critic: CosmosPolicy | None = None,
             advantage: float = 0.0) -> tuple[torch.Tensor, dict[str, float]]:
        """Training loss of one batch (method 2.2, 2.3) and the mean absolute error per kind of frame.

        Every sample draws its sigma and noise from ``generator``; ``net`` is the network to train (the DeepSpeed engine),
        this policy's own by default; ``encoded`` as in :meth:`training_latents`. With ``advantage``, the samples of ``batch.own`` are
        weighted by :meth:`advantage_weights` of ``critic`` at that temperature. The errors are keyed ``action``, ``future``, ``value``
        and averaged over the samples that carry loss there.
        """
        x0 = self.training_latents(batch, encoded)
        kinds = torch.as_tensor(batch.kinds, device=self.device)
        clean, target = self.clean[kinds], self.target[kinds]
        drawn = hybrid_sigma(len(x0), self.layout.frames, self.spec.frame_scale, generator, self.spec.uniform_share)
        sigma = drawn.to(x0)[:, None]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        text = self.embed(batch.instructions)
        samples = torch.ones(len(x0), 1, device=x0.device)
        if advantage and batch.own.any():
            own = torch.as_tensor(batch.own, device=self.device)
            samples[own, 0] = critic.advantage_weights(x0[own], list(np.asarray(batch.instructions)[batch.own]), advantage)
        if self.spec.imagined_share:
            chosen = torch.rand(len(x0), generator=generator).to(x0) < self.spec.imagined_share
            self._imagine_some(x0, text, (chosen & (kinds == int(SampleType.VALUE_FUTURE))).nonzero()[:, 0])
        noised = x0 + sigma[..., None, None, None] * noise
        if self.spec.top_share:
            top = (torch.rand(len(x0), generator=generator).to(x0) < self.spec.top_share) & (kinds != int(SampleType.POLICY))
            sigma = torch.where(top[:, None], self.spec.sigma_max, sigma)
            noised[top] = 0
        predicted = self.denoise(net or self.net, noised, sigma, x0, clean, text)
        weight = ((1 + sigma) / sigma).square() * target * self.frame_weight[kinds] * samples
        error = predicted - x0
        loss = self.spec.loss_scale * (weight * error.square().mean((1, 3, 4))).mean()
        with torch.no_grad():
            absolute = error.abs().mean((1, 3, 4)) * target
            groups = {"action": [self.layout.action], "future": list(self.layout.future), "value": [self.layout.value]}
            errors = {k: float(absolute[:, i].sum() / target[:, i].sum().clamp_min(1)) for k, i in groups.items()}
        return loss, errors

    @torch.no_grad()
    def _imagine_some(self, x0: torch.Tensor, text: Prompts, rows: torch.Tensor) -> None:
        """Put what one evaluation of the world model imagines in place of the future frames of ``rows`` (indices).

        The network runs for no rows too: under ZeRO-3 every rank has to gather its parameters as often as the others.
        """
        known, future = x0[rows], list(self.layout.future)
        known[:, :, future] = self._expected(SampleType.WORLD_MODEL, known, text.take(rows))[:, :, future]
        x0[rows] = known

    @torch.no_grad()
    def advantage_weights(self, x0: torch.Tensor, instructions: Sequence[str], temperature: float) -> torch.Tensor:
        """(B,) weights exp(A / temperature), at most ``HEAVIEST``, of windows x0 (B, C, T, h, w); A = V(s') - V(s) in units of the value
        target, by this network: advantage-weighted regression (arXiv 1910.00177) with the future's value for the return."""
        before = x0.clone()
        before[:, :, list(self.layout.future)] = x0[:, :, list(self.layout.current)]
        latents = self._expected(SampleType.VALUE_FUTURE, torch.cat((before, x0)), self.embed(instructions).repeat(2))
        now, later = self.read_value(latents).clamp(-1, 1).chunk(2)
        return ((later - now) / temperature).exp().clamp(max=HEAVIEST)

    def _expected(self, kind: SampleType, known: torch.Tensor, text: Prompts) -> torch.Tensor:
        """One evaluation from zeros at the first sigma: the mean of the frames that ``kind`` does not give."""
        return self.denoise(self.net, torch.zeros_like(known), self.spec.sigma_max, known, self.clean[int(kind)][None], text)

    # ---------------------------------------------------------------- sampling

    @torch.no_grad()
    def generate(self, kind: SampleType, known: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
        """Sample the frames that ``kind`` does not give, jointly. Row i uses noise of ``seeds[i]`` alone. Where ``spec.top_share`` trained
        for it, a single evaluation of world model or value starts from zeros: it is the expectation, and no seed changes it.

        Args: known (B, C, T, h, w) latents whose clean frames are filled; seeds (B,) int64; steps network evaluations.
        Returns (B, C, T, h, w) float32.
        """
        expected = self.spec.top_share and kind != SampleType.POLICY and solver.evaluations(steps, self.reference_steps) == 1
        noise = torch.zeros_like(known) if expected else seeded_noise(seeds, known.shape[1:]).to(known)
        if text.keys is None:
            text = self.net.attend_to(text)
        if self.accelerated is not None:
            return self.accelerated(self, kind, known, text, noise, steps)
        return self.sample(kind, known, text, noise, steps)

    @torch.no_grad()
    def sample(self, kind: SampleType, known: torch.Tensor, text: Prompts, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """:meth:`generate` from given standard-normal noise: device work only, nothing random, nothing read back."""
        spec = self.spec
        clean = self.clean[int(kind)][None]
        return solver.sample(
            lambda x, sigma: self.denoise(self.net, x, sigma, known, clean, text, self._modulation(kind, clean, sigma)),
            noise * spec.sigma_max, solver.evaluations(steps, self.reference_steps), spec.sigma_max, spec.sigma_min)

    def _modulation(self, kind: SampleType, clean: torch.Tensor, sigma: float) -> Modulation:
        """AdaLN of one sampler step; all rows of a batch share sigma and mask, so one row serves them all."""
        key = (kind, sigma)
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        modulation = self.net.modulate((1 - clean) * (sigma / (1 + sigma)))
        if self._cache is not None:
            self._cache[key] = modulation
        return modulation

    def place(self, device: str, dtype: torch.dtype) -> CosmosPolicy:
        """Move to ``device``, the network and a VAE there computing in ``dtype``."""
        self.to(device)
        self.net.to(dtype)
        if isinstance(self.tokenizer, WanTokenizer) and device != "cpu":
            self.tokenizer.vae.to(dtype)
        return self

    def act(self, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
        """Policy: current latents to latents with action, future and value filled."""
        return self.generate(SampleType.POLICY, latents, text, seeds, steps)

    def imagine(self, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int) -> torch.Tensor:
        """World model: latents with state and ACTION filled to latents with future and value filled."""
        return self.generate(SampleType.WORLD_MODEL, latents, text, seeds, steps)

    def evaluate(self, latents: torch.Tensor, text: Prompts, seeds: torch.Tensor, steps: int, kind: SampleType) -> torch.Tensor:
        """Value function of ``kind`` (one of the VALUE types): (B,) values in [-1, 1]."""
        return self.read_value(self.generate(kind, latents, text, seeds, steps))


def build(spec: PolicySpec, seed: int | None = 0, embeddings: dict[str, torch.Tensor] | None = None) -> CosmosPolicy:
    """A policy with freshly initialised weights; the tokenizer of ``tiny`` still has to be fitted, the 2B one's is loaded.

    With ``seed`` None the network is left without memory, for weights that are about to be loaded. ``embeddings`` are text
    embeddings that are known already.
    """
    if spec.preset == "tiny":
        tokenizer, text = PatchPCA(), HashText(spec.text_tokens, spec.transformer.text_width)
    else:
        if not spec.tokenizer_path or not (spec.text_path or embeddings):
            raise ConfigError(f"preset {spec.preset} needs model.tokenizer_path (Wan 2.1 VAE directory) and model.text_path (T5)")
        tokenizer = WanTokenizer.load(spec.tokenizer_path)
        text = T5Text(spec.text_path, spec.text_tokens, spec.transformer.text_width, embeddings)
    policy = CosmosPolicy(spec, tokenizer, text, "meta" if seed is None else "cpu")
    if seed is not None:
        policy.net.initialize(torch.Generator().manual_seed(seed))
    return policy
