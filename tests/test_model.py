"""The model: layout, injection, masks, sampler, one network in three roles, and checkpoints."""


import numpy as np
import pytest
import torch

from cosmos_ray.config import ModelConfig
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model import sampling, solver
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.denoising import denoise
from cosmos_ray.model.injection import Normalizer, extract, extract_value, inject, inject_value
from cosmos_ray.model.latents import current_latents, read_actions, read_value, training_latents
from cosmos_ray.model.layout import LatentLayout
from cosmos_ray.model.noise import seeded_noise
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.sample_types import SampleType, clean_frames, target_frames
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.tokenizer import PatchPCA
from cosmos_ray.model.training_batch import TrainingBatch
from cosmos_ray.model.transformer import Transformer, TransformerConfig
from cosmos_ray.seeds import mix_seed

CAMERAS = ("wrist", "agent")


def tiny(**changes) -> CosmosPolicy:
    config = ModelConfig(**{"width": 64, "heads": 2, "layers": 2, "image_size": 32, **changes})
    policy = build(make_spec(config, CAMERAS, action_dim=4, proprio_dim=9), seed=1)
    rng = np.random.default_rng(0)
    policy.tokenizer.fit(torch.from_numpy(rng.integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)))
    return policy


def batch(n: int, sample_types: SampleType | np.ndarray = SampleType.POLICY) -> TrainingBatch:
    rng = np.random.default_rng(3)
    image = lambda: rng.integers(0, 256, (n, 2, 32, 32, 3), dtype=np.uint8)  # noqa: E731
    uniform = lambda *shape: rng.uniform(-1, 1, (n, *shape)).astype(np.float32)  # noqa: E731
    return TrainingBatch(image(), image(), uniform(9), uniform(9), uniform(8, 4), uniform(), ["lift the cube"] * n,
                         np.broadcast_to(np.asarray(sample_types, np.int64), (n,)).copy())


@pytest.mark.parametrize("cameras, frames, action", [(1, 7, 3), (2, 9, 4), (3, 11, 5), (4, 13, 6)])
def test_layout_has_the_frames_of_the_method(cameras, frames, action):
    layout = LatentLayout(tuple(f"c{i}" for i in range(cameras)))
    assert (layout.frames, layout.action, layout.value) == (frames, action, frames - 1)
    assert layout.names[0] == "blank" and layout.names[layout.action] == "ACTION" and layout.names[-1] == "VALUE"


# Method 2.4 for the nine frames of LIBERO: blank proprio wrist agent ACTION proprio' wrist' agent' VALUE.
MASKS = {
    SampleType.POLICY: ("111100000", "000011111"),
    SampleType.WORLD_MODEL: ("111110000", "000001111"),
    SampleType.VALUE_FULL: ("111111110", "000000001"),
    SampleType.VALUE_FUTURE: ("100001110", "000000001"),
    SampleType.VALUE_ACTION: ("111110000", "000000001"),
}


@pytest.mark.parametrize("sample_type", list(SampleType))
def test_masks_of_the_five_sample_types(sample_type):
    layout = LatentLayout(CAMERAS)
    bits = lambda frames: "".join("1" if i in frames else "0" for i in range(9))  # noqa: E731
    assert (bits(clean_frames(layout, sample_type)), bits(target_frames(layout, sample_type))) == MASKS[sample_type]


@pytest.mark.parametrize("n", [1, 9, 32, 56, 700, 1024])
def test_inject_extract_round_trip_is_exact(n):
    vectors = torch.randint(-512, 512, (5, n)).float() / 512  # dyadic: the mean over copies rounds nothing
    frames = inject(vectors, (16, 8, 8))
    assert frames.shape == (5, 16, 8, 8)
    copies = 1024 // n
    if copies & (copies - 1) == 0:
        assert torch.equal(extract(frames, n), vectors)
    torch.testing.assert_close(extract(frames, n), vectors, rtol=0, atol=1e-6)


def test_extraction_averages_only_the_full_copies():
    frame = inject(torch.ones(1, 700), (16, 28, 28))
    frame.view(-1)[17 * 700:] = 1e6  # ALOHA: 17 full copies, then a remainder of 644 that must not count
    assert torch.equal(extract(frame, 700), torch.ones(1, 700))


def test_value_round_trip_is_exact():
    values = torch.tensor([-1.0, -0.25, 0.5, 1.0])
    assert torch.equal(extract_value(inject_value(values, (16, 8, 8))), values)


def test_too_long_a_chunk_is_refused():
    with pytest.raises(ConfigError, match="does not fit a latent frame"):
        inject(torch.zeros(1, 1025), (16, 8, 8))


def test_normalizer_round_trip_with_a_constant_dimension():
    scale = Normalizer.of(np.array([-2.0, 0.3, 0.0]), np.array([2.0, 0.3, 1.0]))
    x = torch.tensor([[1.0, 0.3, 0.25]])
    assert torch.equal(scale.normalize(x), torch.tensor([[0.5, 0.0, -0.5]]))
    torch.testing.assert_close(scale.restore(scale.normalize(x)), x)


GOLDEN = {  # method 2.6, obtained by running the public sampler
    1: [0.940490, 0.375849, 0.747231, 0.976369, 0.951225],
    3: [0.919998, 0.372546, 0.727794, 0.962413, 0.932070],
    5: [0.919898, 0.372450, 0.727493, 0.962381, 0.931990],
    10: [0.919849, 0.372405, 0.727353, 0.962365, 0.931950],
}


@pytest.mark.parametrize("steps", GOLDEN)
def test_sampler_golden_vectors(steps):
    x = torch.from_numpy(80 * np.random.RandomState(0).standard_normal((1, 5))).float()
    out = solver.sample(lambda x, sigma: torch.tanh(x / (1 + sigma)), x, steps)
    np.testing.assert_allclose(out[0].numpy(), GOLDEN[steps], atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10])
def test_steps_means_network_evaluations(steps):
    seen = []
    solver.sample(lambda x, sigma: seen.append(sigma) or x, torch.zeros(1), steps)
    assert len(seen) == steps and seen[0] == 80 and (steps == 1 or seen[-1] == pytest.approx(4))


def test_karras_sigmas_of_the_method():
    assert solver.karras_sigmas(5, 80, 4) == pytest.approx([80, 42.2911, 20.9724, 9.6183, 4], abs=1e-4)


def test_noise_of_a_row_does_not_depend_on_its_batch():
    together = seeded_noise(torch.tensor([5, 6, 7]), (16, 9, 8, 8))
    assert torch.equal(together[1], seeded_noise(torch.tensor([6]), (16, 9, 8, 8))[0])
    assert len({mix_seed(a, b) for a in range(30) for b in range(30)}) == 900


def test_the_2b_preset_has_the_real_dimensions():
    spec = make_spec(ModelConfig(preset="cosmos-predict2-2b", chunk=16), CAMERAS, 7, 9)
    with torch.device("meta"):
        net = Transformer(spec.transformer)
    assert sum(p.numel() for p in net.parameters()) == 1_956_413_440
    names = dict(net.named_parameters())
    assert len(names) == 567
    for name in ("x_embedder.proj.1.weight", "t_embedder.1.linear_2.weight", "t_embedding_norm.weight",
                 "blocks.27.self_attn.q_norm.weight", "blocks.0.cross_attn.output_proj.weight", "blocks.3.mlp.layer1.weight",
                 "blocks.9.adaln_modulation_cross_attn.2.weight", "final_layer.adaln_modulation.1.weight", "final_layer.linear.weight"):
        assert name in names
    assert names["x_embedder.proj.1.weight"].shape == (2048, 72)
    assert (spec.output, spec.frame_scale, spec.sigma_min, spec.loss_scale) == ("velocity", True, 4.0, 10.0)


def test_transformer_rejects_a_head_too_small_for_rope():
    with pytest.raises(ConfigError, match="3-D RoPE"):
        TransformerConfig(width=32, heads=4)


def test_pca_tokenizer_is_exact_on_images_of_its_span():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (64, 4, 1, 4, 1, 3), dtype=np.uint8)  # one flat colour per 8x8 patch: rank 3
    images = torch.from_numpy(np.broadcast_to(colours, (64, 4, 8, 4, 8, 3)).reshape(64, 32, 32, 3).copy())
    tokenizer = PatchPCA()
    assert tokenizer.fit(images) == pytest.approx(1.0, abs=1e-6)
    latents = tokenizer.encode(images[:6].view(3, 2, 32, 32, 3), (2, 3), 4)
    assert latents.shape == (3, 16, 4, 4, 4)
    assert torch.equal(tokenizer.decode(latents, (2, 3)), images[:6].view(3, 2, 32, 32, 3))
    assert torch.equal(tokenizer.decode(latents, (0,)), torch.zeros(3, 1, 32, 32, 3, dtype=torch.uint8))


def test_a_network_that_says_nothing_predicts_no_change():
    policy = tiny()  # untrained: the output is zero (AdaLN-zero)
    data, layout = batch(3), policy.layout
    known, text = training_latents(policy, data), policy.embed(data.instructions)
    for sample_type in (SampleType.POLICY, SampleType.WORLD_MODEL):
        out = sampling.generate(policy, sampling.give(policy, sample_type, known, text), torch.arange(3), steps=1)
        assert torch.equal(out[:, :, list(layout.future)], known[:, :, list(layout.current)])
        assert not out[:, :, layout.value].any()
    given = sampling.give(policy, SampleType.VALUE_FUTURE, known, text)  # s is hidden: nothing of it comes in
    out = sampling.generate(policy, given, torch.arange(3), steps=1)
    assert not out[:, :, list(layout.current)].any() and torch.equal(out[:, :, list(layout.future)], known[:, :, list(layout.future)])
    policy = tiny(residual=False)
    out = sampling.generate(policy, sampling.give(policy, SampleType.POLICY, known, text), torch.arange(3), steps=1)
    assert not out[:, :, list(layout.future)].any()


def test_a_velocity_output_is_no_change_of_the_current_frames():
    assert not tiny(output="velocity").spec.residual
    with pytest.raises(ConfigError, match="model.residual = true needs model.output = 'x0'"):
        ModelConfig(output="velocity", residual=True).check()


def shown_to_the_network(policy: CosmosPolicy, known: torch.Tensor, sample_type: SampleType, noised: torch.Tensor) -> torch.Tensor:
    """What the network gets at the first sigma."""
    shown = []

    def net(x, *_):
        shown.append(x)
        return torch.zeros_like(x)

    clean, hidden = (mask[int(sample_type)][None] for mask in (policy.clean, policy.hidden))
    denoise(policy, net, noised, policy.spec.sigma_max, known, clean, hidden, policy.embed(["lift"] * len(known)))
    return shown[0]


@pytest.mark.parametrize("sample_type", SampleType)
def test_future_tokens_see_the_current_frame_and_the_given_actions(sample_type):
    data = batch(2)
    noised = 80.0 * torch.randn(2, 16, 9, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, residual = tiny(residual=False), tiny()
    known, layout = training_latents(residual, data), residual.layout
    difference = shown_to_the_network(residual, known, sample_type, noised) - shown_to_the_network(plain, known, sample_type, noised)
    expected = torch.zeros_like(known)
    if sample_type in (SampleType.POLICY, SampleType.WORLD_MODEL, SampleType.VALUE_ACTION):
        expected[:, :, list(layout.future)] += known[:, :, list(layout.current)]
    if sample_type in (SampleType.WORLD_MODEL, SampleType.VALUE_ACTION):
        expected[:, :, list(layout.future)] += known[:, :, [layout.action]]
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=0)  # V(s') sees nothing of s or a


@pytest.mark.parametrize("sample_type", SampleType)
def test_a_single_evaluation_of_world_model_or_value_is_the_same_for_every_seed(sample_type):
    policy, data = tiny(), batch(3)
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    known, text, seeds = training_latents(policy, data), policy.embed(data.instructions), torch.arange(3)
    for steps, same in ((1, sample_type != SampleType.POLICY), (2, False)):
        given = sampling.give(policy, sample_type, known, text)
        first, second = (sampling.generate(policy, given, s, steps) for s in (seeds, seeds + 10))
        assert torch.equal(first, second) == same
    plain = tiny(top_share=0)
    plain.load_state_dict(policy.state_dict())
    assert not torch.equal(*(sampling.generate(plain, sampling.give(plain, sample_type, known, text), s, 1) for s in (seeds, seeds + 10)))


def test_generated_clean_frames_are_the_given_ones():
    policy = tiny()
    data = batch(3)
    known = training_latents(policy, data)
    text = policy.embed(data.instructions)
    for sample_type in SampleType:
        out = sampling.generate(policy, sampling.give(policy, sample_type, known, text), torch.arange(3), steps=2)
        given = list(clean_frames(policy.layout, sample_type))
        assert torch.equal(out[:, :, given], known[:, :, given])
        other = [i for i in range(9) if i not in given]
        assert not torch.equal(out[:, :, other], known[:, :, other])


def test_hidden_frames_do_not_leak_into_the_value():
    """V(s') must not see s or a, Q(s, a) must not see s' (method 2.4)."""
    policy = tiny()
    torch.nn.init.normal_(policy.net.final_layer.linear.weight, std=0.05)
    data = batch(2)
    known, text = training_latents(policy, data), policy.embed(data.instructions)
    for sample_type, hidden in ((SampleType.VALUE_FUTURE, [1, 2, 3, 4]), (SampleType.VALUE_ACTION, [5, 6, 7])):
        changed = known.clone()
        changed[:, :, hidden] += 1
        seeds = torch.arange(2)
        first, second = (sampling.evaluate(policy, sampling.give(policy, sample_type, latents, text), seeds, 3)
                         for latents in (known, changed))
        assert torch.equal(first, second)


def test_actions_are_read_back_from_training_latents():
    policy = tiny()
    policy.set_statistics(np.full(4, -2.0), np.full(4, 3.0), np.full(9, -1.0), np.full(9, 1.0))
    data = batch(4)
    torch.testing.assert_close(read_actions(policy, training_latents(policy, data)), torch.from_numpy(data.actions), rtol=0, atol=1e-6)
    torch.testing.assert_close(read_value(policy, training_latents(policy, data)), torch.from_numpy(data.value), rtol=0, atol=1e-6)


def test_images_of_another_camera_count_are_refused():
    with pytest.raises(ConfigError, match="do not fit the model"):
        current_latents(tiny(), np.zeros((1, 3, 32, 32, 3), np.uint8), np.zeros((1, 9), np.float32))


def test_checkpoint_round_trip(tmp_path):
    policy = tiny()
    save_policy(policy, tmp_path / "ck", version=7, info={"step": 3})
    loaded, version = load_checkpoint(tmp_path / "ck")
    assert version == 7 and loaded.spec == policy.spec
    for key, value in policy.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    save_policy(policy, tmp_path / "ck", version=8)
    assert load_checkpoint(tmp_path / "ck")[1] == 8 and [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_truncated_checkpoint_is_refused(tmp_path):
    save_policy(tiny(), tmp_path / "ck", version=1)
    file = tmp_path / "ck" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load_checkpoint(tmp_path / "ck")


def test_a_mismatched_checkpoint_names_the_first_offending_key(tmp_path):
    save_policy(tiny(), tmp_path / "a", version=1)
    save_policy(tiny(layers=3), tmp_path / "b", version=1)
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"net\.blocks\.2\.adaln_modulation_cross_attn\.1\.weight.*unknown to the model"):
        load_checkpoint(tmp_path / "a")


def test_a_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="run `pretrain` first"):
        load_checkpoint(tmp_path / "nothing")
