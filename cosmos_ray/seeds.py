"""Seeds of initial states, by what they are for, and seeds made of seeds."""

from __future__ import annotations

from cosmos_ray.errors import ConfigError

SPAN = 1_000_000  #: initial-state seeds per purpose and run seed
PURPOSES = {"demo": 0, "rollout": 1, "eval": 2}


def state_seed(purpose: str, run_seed: int, index: int) -> int:
    """Seed of initial state ``index``. ``purpose`` is a key of :data:`PURPOSES`; two purposes never share a seed, so evaluation is held
    out by construction. ConfigError for an index outside [0, SPAN)."""
    if not 0 <= index < SPAN:
        raise ConfigError(f"episode index {index} is out of range: a run has at most {SPAN} {purpose} episodes")
    return (run_seed * len(PURPOSES) + PURPOSES[purpose]) * SPAN + index


def purpose_of(seed: int) -> tuple[str, int]:
    """Purpose and index that :func:`state_seed` made ``seed`` of, whatever the run's seed."""
    block, index = divmod(seed, SPAN)
    return tuple(PURPOSES)[block % len(PURPOSES)], index


def mix_seed(*parts: int) -> int:
    """One well-spread 63-bit seed from several integers (splitmix64 over the parts)."""
    state = 0
    for part in parts:
        state = (state + (part & (2**64 - 1)) + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state & (2**63 - 1)
