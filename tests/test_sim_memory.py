"""What the simulators of one process hold: many LIBERO scenes at full quality, and many resets with pictures."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_TEN_TASKS = """
import resource
from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment
environments = [Environment(SimConfig(task=f"libero_object/{number}")) for number in range(10)]
for env in environments * 2:
    env.render()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

_RESETS = """
import psutil
from cosmos_ray.config import SimConfig
from cosmos_ray.sim.environment import Environment
env = Environment(SimConfig(quality="full"))
for seed in range(501):
    env.reset(seed)
    env.render()
    if seed in (20, 500):
        print(psutil.Process().memory_info().rss / 2**20)
"""


def printed(program: str) -> list[float]:
    """The numbers that a program prints in a process of its own."""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)})
    return [float(line) for line in done.stdout.split()]


@pytest.mark.slow
def test_ten_tasks_of_libero_object_at_full_quality_take_less_than_4_gb():
    (peak,) = printed(_TEN_TASKS)
    assert 1000 < peak < 4000


@pytest.mark.slow
def test_memory_is_flat_over_500_resets_with_pictures():
    early, late = printed(_RESETS)
    assert late < 1.05 * early
