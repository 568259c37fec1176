"""Simulation: robosuite tasks as fast, deterministic and restorable environments, and scripted demonstrations."""

from cosmos_ray.caches import use_temporary_caches

use_temporary_caches()  # here, before numba is imported, in workers of a cluster too
