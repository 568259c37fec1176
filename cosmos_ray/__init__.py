"""cosmos_ray: a closed-loop Ray actor-learner system for Cosmos Policy (arXiv 2601.16163)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_ray.deployment import DeployedPolicy, PolicyOutput, load_policy

__version__ = "0.1.0"
__all__ = ["DeployedPolicy", "PolicyOutput", "load_policy"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are asked for: commands and simulator processes start without torch."""
    if name in __all__:
        from cosmos_ray import deployment

        return getattr(deployment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
