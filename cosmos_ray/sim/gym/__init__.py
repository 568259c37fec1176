"""Gymnasium both ways: its environments as our simulations (``foreign``), and our simulations as its environments (``offered``).

``import cosmos_ray.sim.gym`` registers ours, and so does ``gymnasium.make("cosmos_ray.sim.gym:cosmos_ray/Lift-v0")``.
"""

from __future__ import annotations

from cosmos_ray.config.libero import LIBERO_SUITES
from cosmos_ray.config.tasks import SPECS

NAMESPACE = "cosmos_ray"


def register() -> None:
    """Register our tasks with gymnasium, as ``cosmos_ray/TASK-v0`` (``cosmos_ray/libero_spatial-3-v0``).

    Does nothing where gymnasium is not installed, or when repeated.
    """
    try:
        import gymnasium
    except ImportError:
        return
    libero = (f"{suite}/{number}" for suite, known in LIBERO_SUITES.items() for number in range(known.tasks))
    for task in (*SPECS, *libero):
        name = f"{NAMESPACE}/{task.replace('/', '-')}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(name, "cosmos_ray.sim.gym.offered:OfferedEnv", kwargs={"task": task})


register()
