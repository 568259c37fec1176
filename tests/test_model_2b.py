"""The parts of the 2B preset that run here: the real classes at small size, loaded from local directories."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosmos_ray.config import ModelConfig
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model import sampling
from cosmos_ray.model.latents import current_latents, read_actions, read_future_images, training_latents
from cosmos_ray.model.objective import Objective
from cosmos_ray.model.policy import build
from cosmos_ray.model.sample_types import SampleType
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import T5Text
from cosmos_ray.model.tokenizer import WanTokenizer
from cosmos_ray.model.training_batch import TrainingBatch

CAMERAS = ("wrist", "agent")


def small_2b(**changes) -> ModelConfig:
    return ModelConfig(**{"preset": "cosmos-predict2-2b", "width": 64, "heads": 2, "layers": 1, "chunk": 16, **changes})


def test_the_2b_preset_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"model\.tokenizer_path.*model\.text_path"):
        build(make_spec(small_2b(), CAMERAS, 7, 9))


def test_text_embeddings_come_from_safetensors(tmp_path):
    file = tmp_path / "t5.safetensors"
    save_file({"lift the cube": torch.randn(1, 512, 1024)}, file)
    text = T5Text(str(file))
    assert text("lift the cube").shape == (512, 1024)
    with pytest.raises(ConfigError, match="there is no embedding of 'fold the shirt'"):
        text("fold the shirt")


def test_a_missing_text_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"point model\.text_path at"):
        T5Text(str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    """A Wan 2.1 VAE of the real class with few channels and random weights, in diffusers layout."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wan")
    AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1).save_pretrained(folder)
    return folder


def test_a_missing_vae_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"point model\.tokenizer_path at"):
        WanTokenizer.load(str(tmp_path))


def test_wan_prefix_encode_equals_the_full_encode(wan_folder):
    tokenizer = WanTokenizer.load(str(wan_folder))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 4, 32, 32, 3), dtype=np.uint8))
    full = tokenizer.encode(images, (2, 3, 6, 7), 9)
    assert full.shape == (1, 16, 9, 4, 4)
    torch.testing.assert_close(tokenizer.encode(images[:, :2], (2, 3), 4), full[:, :, :4], rtol=0, atol=1e-5)
    assert tokenizer.decode(full, (6, 7)).shape == (1, 2, 32, 32, 3)


def test_a_small_model_of_the_2b_preset_acts_and_learns(wan_folder, tmp_path):
    """Wan VAE, cached T5 embeddings, velocity output and scaled sigmas through the classes that run the tiny preset."""
    file = tmp_path / "t5.safetensors"
    save_file({"lift the cube": torch.randn(512, 1024)}, file)
    policy = build(make_spec(small_2b(image_size=32, tokenizer_path=str(wan_folder), text_path=str(file)), CAMERAS, 7, 9), seed=0)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 32, 32, 3), dtype=np.uint8)
    proprio = rng.uniform(-1, 1, (2, 9)).astype(np.float32)
    batch = TrainingBatch(images, images, proprio, proprio, rng.uniform(-1, 1, (2, 16, 7)).astype(np.float32), np.ones(2, np.float32),
                          ["lift the cube"] * 2, np.array([SampleType.POLICY, SampleType.VALUE_FUTURE]))
    loss, _ = Objective(policy).loss(batch, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.net.parameters())
    latents = current_latents(policy, images, proprio)
    out = sampling.act(policy, latents, policy.embed(batch.instructions), torch.arange(2), steps=2)
    assert read_actions(policy, out).shape == (2, 16, 7) and read_future_images(policy, out, images).shape == (2, 2, 32, 32, 3)


@pytest.fixture
def small_policy(wan_folder, tmp_path):
    file = tmp_path / "t5.safetensors"
    save_file({"lift the cube": torch.randn(512, 1024)}, file)
    return build(make_spec(small_2b(image_size=32, tokenizer_path=str(wan_folder), text_path=str(file)), CAMERAS, 7, 9), seed=0)


def observation() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8), rng.uniform(-1, 1, (1, 9)).astype(np.float32)


def test_acting_and_planning_encode_the_clean_prefix_once_and_decode_nothing(small_policy):
    from cosmos_ray.config import PlannerConfig
    from cosmos_ray.inference.core import InferenceCore
    from cosmos_ray.inference.messages import ActingPolicy, ActRequest

    vae, calls = small_policy.tokenizer.vae, []
    encode, decode = vae.encode, vae.decode
    vae.encode = lambda video: calls.append(("encode", video.shape[2])) or encode(video)
    vae.decode = lambda latents: calls.append(("decode", latents.shape[2])) or decode(latents)
    core = InferenceCore(small_policy, 1)
    for planner in (None, PlannerConfig(candidates=3, futures=2, future_steps=2)):
        calls.clear()
        request = ActRequest(*observation(), ("lift the cube",), np.array([3]), steps=2, acting=ActingPolicy(planner=planner))
        assert core.answer([request])[0].actions.shape == (1, 16, 7)
        assert calls == [("encode", 1 + 4 * 3)]  # blank, proprio and two cameras: 13 of 33 pixel frames
    calls.clear()
    core.answer([ActRequest(*observation(), ("lift the cube",), np.array([3]), steps=2, decode_futures=True)])
    assert [name for name, _ in calls] == ["encode", "encode", "decode"]


def test_vectors_in_the_latents_do_not_reach_the_decoded_frames(small_policy):
    """The decoder is causal: an ACTION latent left in place would colour every frame after it."""
    images, proprio = observation()
    latents = training_latents(small_policy, TrainingBatch(images, images, proprio, proprio, np.zeros((1, 16, 7), np.float32),
                                                           np.ones(1, np.float32), ["lift the cube"], np.array([SampleType.POLICY])))
    other = latents.clone()
    for slot in (small_policy.layout.proprio, small_policy.layout.action, small_policy.layout.future_proprio, small_policy.layout.value):
        other[:, :, slot] = 3.0
    assert torch.equal(read_future_images(small_policy, latents, images), read_future_images(small_policy, other, images))
    decoded = [small_policy.tokenizer.decode(x, small_policy.layout.future_images) for x in (latents, other)]
    assert not torch.equal(*decoded)  # what would have happened


def test_t5_embeddings_are_computed_by_a_local_encoder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "lift": 2, "the": 3, "cube": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    T5EncoderModel(T5Config(vocab_size=5, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).save_pretrained(tmp_path)
    embedding = T5Text(str(tmp_path), tokens=16, width=32)("lift the cube")
    assert embedding.shape == (16, 32)
    assert (embedding[:3].abs().sum(1) > 0).all() and torch.equal(embedding[3:], torch.zeros(13, 32))  # zero past the prompt
