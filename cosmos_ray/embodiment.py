"""The robot as a policy knows it: what it sees, what it feels, what it moves, and how often.

A policy, a simulation and a set of demonstrations each have one. Data from one and a policy of another fit together when
:meth:`Embodiment.misfit` says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What the released suites call a camera, and the names that robosuite, LIBERO, RoboCasa and ALOHA have for the same place.
SUITE_CAMERAS = {
    "wrist": ("robot0_eye_in_hand", "eye_in_hand"), "primary": ("agentview", "robot0_agentview_left", "cam_high"),
    "secondary": ("robot0_agentview_right",), "left_wrist": ("cam_left_wrist",), "right_wrist": ("cam_right_wrist",),
}


@dataclass(frozen=True)
class Embodiment:
    """Sizes and names that a policy and its data must share."""

    cameras: tuple[str, ...]  #: in latent order: wrist cameras, then third-person ones
    action_dim: int  #: numbers per action d
    proprio_dim: int  #: numbers of proprioception p
    control_freq: float = 0.0  #: control steps per second, 0 where it is not known
    moving: tuple[int, ...] = ()  #: places in an action that move a hand (not its rotation, not a gripper); empty where not known
    quality: str = ""  #: how simulated frames are rendered, "fast" or "full"; "" where it is not known

    def misfit(self, other: Embodiment) -> list[tuple[str, str, str]]:
        """What differs, as (what, here, in ``other``), most basic first; what is not known (rate, ``moving``, quality) fits every other.

        Cameras are compared by name and in order: a picture in the slot of another camera is as wrong as one too few. A suite's name for a
        camera is that of :data:`SUITE_CAMERAS` too.
        """
        pairs: list[tuple[str, float | str, float | str]] = [
            ("numbers per action", self.action_dim, other.action_dim),
            ("numbers of proprioception", self.proprio_dim, other.proprio_dim)]
        if self.control_freq and other.control_freq:
            pairs.append(("control steps per second", self.control_freq, other.control_freq))
        if self.moving and other.moving and self.action_dim == other.action_dim:
            mine, theirs = (f"motion in the action's numbers {','.join(map(str, body.moving))}" for body in (self, other))
            pairs.append(("(counted from 0)", mine, theirs))
        if self.quality and other.quality:
            pairs.append(("render quality", self.quality, other.quality))
        differing = [(what, _text(mine), _text(theirs)) for what, mine, theirs in pairs if mine != theirs]
        if len(self.cameras) != len(other.cameras) or not all(map(same_camera, self.cameras, other.cameras)):
            here, there = (", ".join(cameras) or "none" for cameras in (self.cameras, other.cameras))
            differing.append(("cameras", here, there))
        return differing


def same_camera(name: str, other: str) -> bool:
    """Whether two names are of one camera: the same name, or a suite's and another project's for its place."""
    return name == other or other in SUITE_CAMERAS.get(name, ()) or name in SUITE_CAMERAS.get(other, ())


def third_person(camera: str) -> bool:
    """Whether a camera, by its name, looks at the robot instead of moving with its hand."""
    return "wrist" not in camera and "eye_in_hand" not in camera


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
