"""The latent sequence: which frame holds what (method section 1.1).

``[blank, proprio, wrist cameras, third-person cameras, ACTION, future proprio, future wrist, future third, VALUE]``.
Two cameras give the nine frames of LIBERO, three the eleven of RoboCasa and ALOHA, one gives seven.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from cosmos_ray.errors import ConfigError


@dataclass(frozen=True)
class LatentLayout:
    """Frame order of one camera set. ``cameras`` are in latent order: wrist cameras first, then third-person ones."""

    cameras: tuple[str, ...]

    def __post_init__(self):
        if not self.cameras:
            raise ConfigError("a latent layout needs at least one camera")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One name per latent frame, in order."""
        now = ("proprio", *self.cameras)
        return ("blank", *now, "ACTION", *(f"future {name}" for name in now), "VALUE")

    @property
    def frames(self) -> int:
        """Number of latent frames T."""
        return len(self.names)

    @property
    def proprio(self) -> int:
        return 1

    @property
    def images(self) -> tuple[int, ...]:
        """Frames of the current camera images."""
        return tuple(range(2, 2 + len(self.cameras)))

    @property
    def action(self) -> int:
        return 2 + len(self.cameras)

    @property
    def future_proprio(self) -> int:
        return self.action + 1

    @property
    def future_images(self) -> tuple[int, ...]:
        """Frames of the predicted camera images."""
        return tuple(range(self.action + 2, self.action + 2 + len(self.cameras)))

    @property
    def value(self) -> int:
        return self.frames - 1

    @property
    def current(self) -> tuple[int, ...]:
        """The state s: current proprio and images."""
        return (self.proprio, *self.images)

    @property
    def future(self) -> tuple[int, ...]:
        """The state s': future proprio and images."""
        return (self.future_proprio, *self.future_images)
