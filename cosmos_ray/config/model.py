"""Settings of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cosmos_ray.config.option import fill, option
from cosmos_ray.config.presets import preset_settings
from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The one network that is policy, world model and value function.

    What is not given is the preset's, or the suite's. ``dataclasses.replace`` keeps all values when it changes the preset: make a new
    object instead.
    """

    preset: Literal["tiny", "cosmos-predict2-2b"] = option("tiny", "model size; 'tiny' fits a laptop, 'cosmos-predict2-2b' has the real "
                                                           "dimensions")
    suite: Literal["", "libero", "robocasa", "aloha"] = option("", "suite of a released policy: 'libero', 'robocasa', 'aloha'; sets its "
                                                               "dimensions and its evaluation settings; empty = none")
    fidelity: Literal["ours", "reference"] = option(
        None, "'reference' computes frames, augmentation, decay and step ladders as the public code; 'ours' where we chose otherwise. A "
        "suite is 'reference'. Sets model.resize, model.augmentation, learner.decay_all and planner.ladder",
        follows="model.suite")
    image_size: int = option(None, "height and width of the frames that the network sees; a multiple of 8 pixels. Frames of any other "
                             "size, simulated or stored, are resized to it", low=16, high=1024, follows="model.preset")
    chunk: int = option(None, "actions per chunk (K)", low=1, high=256, follows="model.preset")
    output: Literal["x0", "velocity"] = option(None, "what the network outputs: 'x0' or 'velocity'; velocity is that of rectified flow",
                                               follows="model.preset")
    width: int = option(None, "model channels", low=1, follows="model.preset")
    layers: int = option(None, "transformer blocks", low=1, follows="model.preset")
    heads: int = option(None, "attention heads", low=1, follows="model.preset")
    patch: int = option(None, "side of a spatial patch of the latent grid", low=1, follows="model.preset")
    attention: Literal["full", "one-way"] = option(
        "full", "which frames see which; 'one-way': given frames see given frames alone, and nothing sees a frame that is neither given "
        "nor asked for, so that planning reads a state once for all its samples. Released weights have 'full'", rare=True)
    adaln_rank: int = option(None, "rank of the timestep modulation (AdaLN)", low=1, follows="model.preset", rare=True)
    rope_scale: tuple[float, ...] = option(None, "position scale of time, height and width; NTK extrapolation of the rotary embedding",
                                           low=0.01, follows="model.preset", rare=True)
    text_width: int = option(None, "width of a text token", low=1, follows="model.preset", rare=True)
    text_tokens: int = option(None, "text tokens per instruction", low=1, follows="model.preset", rare=True)
    sigma_frame_scale: bool = option(None, "multiply the training sigma by sqrt(latent frames)", follows="model.preset", rare=True)
    residual: bool = option(None, "predict a future frame as its change; the network sees the current frame and the actions beside it; "
                            "needs model.output x0", follows="model.preset", rare=True)
    top_share: float = option(None, "share of samples trained as the planner asks; of the world-model and value samples, those trained "
                              "as one evaluation at the first sigma, from zeros", low=0, high=1, follows="model.preset")
    imagined_share: float = option(None, "share of V(s') samples on an imagined future; the network imagines that future in one "
                                   "evaluation, as the planner does", low=0, high=1, follows="model.preset")
    uniform_share: float = option(0.3, "share of training sigmas from U(1, 85); the rest is log-normal. 0 is the video model's schedule, "
                                  "0.3 the paper's hybrid. Samples of model.top_share draw no sigma", low=0, high=1)
    sigma_min: float = option(None, "last sigma of the sampler", low=0.001, high=80, follows="model.preset")
    action_weight: float = option(None, "loss weight of the ACTION frame", low=0, follows="model.preset")
    value_weight: float = option(None, "loss weight of the VALUE frame", low=0, follows="model.preset")
    world_weight: float = option(None, "loss weight of the future frames in world-model samples", low=0, follows="model.preset")
    loss_scale: float = option(None, "factor of the whole loss", low=0, follows="model.preset", rare=True)
    augment: bool = option(None, "train on augmented frames; frames are cropped, rotated and recoloured at random in training, and the "
                           "policy acts on the centre crop", follows="model.preset")
    resize: Literal["bilinear", "bicubic"] = option(None, "filter that resizes frames to model.image_size; 'bicubic' is PIL's, to the bit",
                                                    follows="model.fidelity", rare=True)
    augmentation: Literal["smooth", "torchvision"] = option(
        None, "how frames are augmented; 'smooth' crops and rotates in one resampling, 'torchvision' one after the other as the public "
        "code, which leaves black corners", follows="model.fidelity", rare=True)
    jpeg: bool = option(None, "pass frames through JPEG before the network; quality 95, as the simulated suites do",
                        follows="model.suite", rare=True)
    tokenizer_path: str = option("", "the Wan 2.1 VAE; a diffusers folder, the release's tokenizer.pth, or what holds one of them: a "
                                 "folder, a snapshot of the Hugging Face cache, ORG/REPO in it. The 2B preset needs it")
    text_path: str = option("", "folder of the T5 encoder; or its cached embeddings, as .safetensors or the public .pkl; or what holds one "
                            "of them, as for model.tokenizer_path. The 2B preset needs it")

    def __post_init__(self):
        decided = preset_settings(self.preset, self.suite, self.fidelity or "")
        fill(self, {"output": decided["model.output"]})
        decided["model.residual"] = decided["model.residual"] and self.output == "x0"  # a change of the frame needs the frame
        fill(self, {name.removeprefix("model."): value for name, value in decided.items() if name.startswith("model.")})

    def check(self) -> None:
        """Raise :class:`ConfigError` for settings of the model that do not go together."""
        if self.residual and self.output != "x0":
            raise ConfigError(f"model.residual = true needs model.output = 'x0', not {self.output!r}")
        if len(self.rope_scale) != 3:
            raise ConfigError(f"model.rope_scale = {self.rope_scale}: give three scales (time, height, width)")
