"""Seeds made of seeds."""

from __future__ import annotations


def mix_seed(*parts: int) -> int:
    """One well-spread 63-bit seed from several integers (splitmix64 over the parts)."""
    state = 0
    for part in parts:
        state = (state + (part & (2**64 - 1)) + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state & (2**63 - 1)
