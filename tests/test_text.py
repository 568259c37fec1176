"""T5 embeddings: from the public pickle, carried by a checkpoint, and one clear line where there are none."""

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cosmos_ray.config import ModelConfig
from cosmos_ray.errors import CheckpointError, ConfigError, CosmosRayError
from cosmos_ray.model import sampling
from cosmos_ray.model.checkpoint import load_checkpoint, save_policy
from cosmos_ray.model.latents import current_latents, read_actions
from cosmos_ray.model.policy import CosmosPolicy, build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import HashText, T5Text
from cosmos_ray.model.tokenizer import WanTokenizer
from tests import test_model_2b

wan_folder = test_model_2b.wan_folder  # the fixture

LIFT, FOLD = "lift the red cube", "fold the shirt"


def embedding(seed: int, words: int = 5, width: int = 1024, tokens: int = 512) -> torch.Tensor:
    """As in the released files: (1, tokens, width) bfloat16, zero past the prompt."""
    rows = torch.zeros(1, tokens, width, dtype=torch.bfloat16)
    rows[0, :words] = torch.randn(words, width, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return rows


def pickled(path, embeddings: dict[str, torch.Tensor]) -> str:
    with open(path, "wb") as file:
        pickle.dump(embeddings, file)
    return str(path)


def refused(kind: type[CosmosRayError], line: str):
    """Expects one error of ``kind`` that matches ``line`` and is a single line."""
    return pytest.raises(kind, match=rf"^(?=[^\n]*\Z).*{line}")


def test_the_public_pickle_is_read(tmp_path):
    text = T5Text(pickled(tmp_path / "t5.pkl", {LIFT: embedding(0), FOLD: embedding(1)}))
    assert torch.equal(text(LIFT), embedding(0)[0]) and torch.equal(text(FOLD), embedding(1)[0])
    with refused(ConfigError, "no embedding of 'open the door', only of 2, .* add it to model.text_path, or give a T5 directory"):
        text("open the door")


@pytest.mark.parametrize("width, tokens", [(768, 512), (1024, 256)])
def test_embeddings_of_another_shape_are_refused(tmp_path, width, tokens):
    path = pickled(tmp_path / "t5.pkl", {LIFT: embedding(0, width=width, tokens=tokens)})
    with refused(CheckpointError, rf"'{LIFT}' has shape \({tokens}, {width}\), the model takes \(512, 1024\)"):
        T5Text(path)


def test_embeddings_of_a_checkpoint_come_before_those_of_the_file(tmp_path):
    text = T5Text(pickled(tmp_path / "t5.pkl", {LIFT: embedding(0), FOLD: embedding(1)}), known={LIFT: embedding(2)[0]})
    assert torch.equal(text(LIFT), embedding(2)[0]) and torch.equal(text(FOLD), embedding(1)[0])


def test_without_a_path_the_known_embeddings_are_all_there_is():
    """An empty path is not the folder the command was called in."""
    text = T5Text("", known={LIFT: embedding(0)[0]})
    assert torch.equal(text(LIFT), embedding(0)[0])
    with refused(ConfigError, "no embedding of 'fold the shirt'"):
        text(FOLD)
    with refused(CheckpointError, "no text embeddings at ''"):
        T5Text("")


def test_a_folder_without_an_encoder_is_one_line(tmp_path):
    with refused(CheckpointError, "no T5 encoder can be loaded from .*: point model.text_path at a whole one"):
        T5Text(str(tmp_path))(LIFT)


def test_a_vae_without_its_weights_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan", "z_dim": 16}')
    with refused(CheckpointError, "the Wan 2.1 VAE in .* cannot be loaded: .*copy it again"):
        WanTokenizer.load(str(tmp_path))


@pytest.mark.parametrize("words, kept", [(0, 0), (4, 4), (16, 16), (40, 16)])
def test_hashed_words_fill_the_front_and_the_rest_is_zero(words, kept):
    rows = HashText(16, 8)(" ".join(f"word{i}" for i in range(words)))
    assert rows.shape == (16, 8)
    assert (rows[:kept].abs().sum(1) > 0).all() and not rows[kept:].any()


# ---------------------------------------------------------------- in a checkpoint


@pytest.fixture
def policy(wan_folder, tmp_path) -> CosmosPolicy:
    """A small policy whose text comes from a pickle."""
    path = pickled(tmp_path / "t5.pkl", {LIFT: embedding(0), FOLD: embedding(1)})
    config = ModelConfig(preset="cosmos-predict2-2b", width=64, heads=2, layers=1, chunk=16, image_size=32,
                         tokenizer_path=str(wan_folder), text_path=path)
    made = build(make_spec(config, ("wrist", "agent"), 7, 9), seed=0)
    torch.nn.init.normal_(made.net.final_layer.linear.weight, std=0.05, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    for name, parameter in made.net.named_parameters():
        if name.endswith("cross_attn.2.weight"):
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)  # open the gates that start closed
    return made


def actions(policy: CosmosPolicy, instruction: str) -> torch.Tensor:
    rng = np.random.default_rng(0)
    known = current_latents(policy, rng.integers(0, 256, (1, 2, 32, 32, 3), dtype=np.uint8), np.zeros((1, 9), np.float32))
    return read_actions(policy, sampling.act(policy, known, policy.embed([instruction]), torch.arange(1), steps=2))


def test_a_checkpoint_carries_its_text_and_acts_without_the_file_it_came_from(policy, tmp_path):
    save_policy(policy, tmp_path / "ck", version=1)
    (tmp_path / "t5.pkl").unlink()
    stored = load_file(tmp_path / "ck" / "text.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in stored.items()} == {k: (torch.bfloat16, (512, 1024)) for k in (LIFT, FOLD)}
    loaded, _ = load_checkpoint(tmp_path / "ck")
    assert torch.equal(actions(loaded, LIFT), actions(policy, LIFT))
    assert not torch.equal(actions(loaded, LIFT), actions(loaded, FOLD))
    with refused(ConfigError, "no embedding of 'open the door'"):
        loaded.embed(["open the door"])
    save_policy(loaded, tmp_path / "again", version=2)  # and on from checkpoint to checkpoint
    assert {k: v.tobytes() for k, v in files(tmp_path / "again").items()} == {k: v.tobytes() for k, v in files(tmp_path / "ck").items()}


def files(folder) -> dict[str, np.ndarray]:
    return {k: v.view(torch.uint8).numpy() for k, v in load_file(folder / "text.safetensors").items()}


def test_a_checkpoint_with_text_of_another_width_is_refused(policy, tmp_path):
    save_policy(policy, tmp_path / "ck", version=1)
    save_file({LIFT: torch.zeros(512, 768)}, tmp_path / "ck" / "text.safetensors")
    with refused(CheckpointError, r"has shape \(512, 768\), the model takes \(512, 1024\)"):
        load_checkpoint(tmp_path / "ck")


def test_a_checkpoint_that_lost_its_text_names_the_path_it_needs(policy, tmp_path):
    save_policy(policy, tmp_path / "ck", version=1)
    (tmp_path / "ck" / "text.safetensors").unlink()
    assert torch.equal(actions(load_checkpoint(tmp_path / "ck")[0], LIFT), actions(policy, LIFT))  # from the file it came from
    (tmp_path / "t5.pkl").unlink()
    with refused(CheckpointError, "no text embeddings at .*t5.pkl.*point model.text_path at"):
        load_checkpoint(tmp_path / "ck")
