"""The parts of the 2B preset that run here: the real classes at small size, loaded from local directories."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cosmos_ray.config import ModelConfig
from cosmos_ray.errors import CheckpointError, ConfigError
from cosmos_ray.model.policy import build
from cosmos_ray.model.spec import make_spec
from cosmos_ray.model.text import T5Text

CAMERAS = ("wrist", "agent")


def small_2b(**changes) -> ModelConfig:
    return ModelConfig(**{"preset": "cosmos-predict2-2b", "width": 64, "heads": 2, "layers": 1, "chunk": 16, **changes})


def test_the_2b_preset_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"model\.tokenizer_path.*model\.text_path"):
        build(make_spec(small_2b(), CAMERAS, 64, 7, 9))


def test_text_embeddings_come_from_safetensors(tmp_path):
    file = tmp_path / "t5.safetensors"
    save_file({"lift the cube": torch.randn(1, 512, 1024)}, file)
    text = T5Text(str(file))
    assert text("lift the cube").shape == (512, 1024)
    with pytest.raises(ConfigError, match="holds no embedding of 'fold the shirt'"):
        text("fold the shirt")


def test_a_missing_text_path_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"point model\.text_path at"):
        T5Text(str(tmp_path / "nothing"))
