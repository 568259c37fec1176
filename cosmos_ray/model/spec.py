"""Everything that fixes a model's shape and arithmetic, as one JSON-serialisable record, filled from the config."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosmos_ray.config import ModelConfig
from cosmos_ray.embodiment import Embodiment
from cosmos_ray.errors import CheckpointError
from cosmos_ray.model.layout import LatentLayout
from cosmos_ray.model.tokenizer import CHANNELS, PATCH
from cosmos_ray.model.transformer import TransformerConfig

#: What a policy and a planning network must have in common: they pass latents to each other.
SHARED = ("action_dim", "proprio_dim", "cameras", "image_size", "chunk", "transformer", "jpeg", "augmented")


@dataclass(frozen=True)
class PolicySpec:
    """What a checkpoint must agree on with the code that loads it."""

    preset: str
    cameras: tuple[str, ...]  #: latent order: wrist cameras, then third-person ones
    image_size: int  #: pixels, square; frames of other sizes are resized to it
    chunk: int  #: actions per chunk K
    action_dim: int
    proprio_dim: int
    transformer: TransformerConfig
    output: str  #: "x0" or "velocity"
    frame_scale: bool  #: training sigma x sqrt(frames)
    sigma_min: float  #: last sigma of the sampler
    sigma_max: float = 80.0
    action_weight: float = 1.0
    value_weight: float = 1.0
    world_weight: float = 1.0
    loss_scale: float = 1.0
    text_tokens: int = 16
    tokenizer_path: str = ""
    text_path: str = ""
    jpeg: bool = False  #: frames go through JPEG before the model sees them, as in the simulated suites (method 1.2)
    residual: bool = False  #: future frames are predicted as changes of the current ones, see :meth:`CosmosPolicy.denoise`
    imagined_share: float = 0.0  #: of the V(s') samples, those trained on an imagined s'
    top_share: float = 0.0  #: of the world-model and value samples, those trained as one evaluation from zeros
    uniform_share: float = 0.3  #: of the training sigmas, those drawn from U(1, 85)
    resize: str = "bilinear"  #: filter that resizes frames of another size
    augmentation: str = "smooth"  #: how training frames are augmented, see ``model.augmentation``
    augmented: bool = False  #: trained on augmented frames; acts on their centre, 90 % of the area
    moving: tuple[int, ...] = ()  #: as :attr:`Embodiment.moving`
    control_freq: float = 0.0  #: control steps per second of the data, 0 where it is not known
    quality: str = ""  #: as :attr:`Embodiment.quality`

    @property
    def embodiment(self) -> Embodiment:
        """What the policy sees and moves."""
        return Embodiment(self.cameras, self.action_dim, self.proprio_dim, self.control_freq, self.moving, self.quality)

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout(self.cameras)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one latent frame."""
        side = self.image_size // PATCH
        return CHANNELS, side, side

    def unlike(self, other: PolicySpec) -> str:
        """The first of :data:`SHARED` in which ``other`` differs, "" if there is none: what one network generates, the other may judge."""
        return next((name for name in SHARED if getattr(self, name) != getattr(other, name)), "")

    def to_json(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> PolicySpec:
        """Rebuild from :meth:`to_json`; CheckpointError names the field that does not fit."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise CheckpointError(f"model description has the unknown field {unknown[0]!r}: it was written by a newer cosmos_ray")
        try:
            inner = dict(data["transformer"])
            inner["rope_scale"] = tuple(inner["rope_scale"])
            return cls(**{**data, "cameras": tuple(data["cameras"]), "moving": tuple(data.get("moving", ())),
                          "transformer": TransformerConfig(**inner)})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"model description is incomplete or malformed: {error}") from error


def make_spec(config: ModelConfig, cameras: tuple[str, ...], action_dim: int, proprio_dim: int, control_freq: float = 0.0) -> PolicySpec:
    """The record of a network with the settings of ``config``, for these cameras (in latent order), and actions and proprioception
    of so many numbers, ``control_freq`` times a second (0: not known). ConfigError when the transformer's dimensions do not fit."""
    transformer = TransformerConfig(
        width=config.width, heads=config.heads, layers=config.layers, patch=config.patch, text_width=config.text_width,
        adaln_rank=config.adaln_rank, one_way=config.attention == "one-way",
        rope_scale=(config.rope_scale[0], config.rope_scale[1], config.rope_scale[2]))
    return PolicySpec(
        preset=config.preset, cameras=cameras, image_size=config.image_size, chunk=config.chunk, action_dim=action_dim,
        proprio_dim=proprio_dim, transformer=transformer, output=config.output, frame_scale=config.sigma_frame_scale,
        sigma_min=config.sigma_min, action_weight=config.action_weight, value_weight=config.value_weight, world_weight=config.world_weight,
        loss_scale=config.loss_scale, text_tokens=config.text_tokens, residual=config.residual, imagined_share=config.imagined_share,
        top_share=config.top_share, uniform_share=config.uniform_share, jpeg=config.jpeg, resize=config.resize,
        augmentation=config.augmentation, augmented=config.augment,
        tokenizer_path=config.tokenizer_path, text_path=config.text_path, control_freq=control_freq)
