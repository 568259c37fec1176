"""The robot as a policy knows it: what it sees, what it feels, what it moves, and how often.

A policy, a simulation and a set of demonstrations each have one. Data from one and a policy of another fit together when
:meth:`Embodiment.misfit` says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Embodiment:
    """Sizes and names that a policy and its data must share."""

    cameras: tuple[str, ...]  #: in latent order: wrist cameras, then third-person ones
    action_dim: int  #: numbers per action d
    proprio_dim: int  #: numbers of proprioception p
    control_freq: float = 0.0  #: control steps per second, 0 where it is not known
    moving: tuple[int, ...] = ()  #: places in an action that move a hand (not its rotation, not a gripper); empty where not known

    def misfit(self, other: Embodiment) -> list[tuple[str, str, str]]:
        """What differs, as (what, here, in ``other``), most basic first; a control rate or ``moving`` that is not known fits every other.

        Cameras are compared in number alone, where a released policy has its own names for them: who knows the names compares them.
        """
        pairs: list[tuple[str, float | str, float | str]] = [
            ("numbers per action", self.action_dim, other.action_dim),
            ("numbers of proprioception", self.proprio_dim, other.proprio_dim),
            ("cameras", len(self.cameras), len(other.cameras)),
        ]
        if self.control_freq and other.control_freq:
            pairs.append(("control steps per second", self.control_freq, other.control_freq))
        if self.moving and other.moving and self.action_dim == other.action_dim:
            mine, theirs = (f"motion in the action's numbers {','.join(map(str, body.moving))}" for body in (self, other))
            pairs.append(("(counted from 0)", mine, theirs))
        return [(what, _text(mine), _text(theirs)) for what, mine, theirs in pairs if mine != theirs]


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
