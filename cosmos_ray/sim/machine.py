"""What of this machine the last bit of a simulation depends on."""

from __future__ import annotations

import platform
import re

SIMD = ("avx", "fma", "avx2", "avx512f", "avx512dq", "avx512vl", "asimd", "sve")
"""Vector instruction sets, as /proc/cpuinfo names them. Math libraries choose their code by these."""


def machine() -> dict[str, str]:
    """The processor and C library. The last bit of sin, exp and matrix products depends on both: libm, BLAS and the compiler
    pick their code by the vector instructions they find."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            text = file.read()
    except OSError:  # not Linux, or a container that hides it
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    found = set(flags.group(1).split()) if flags else set()
    return {
        "cpu": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "simd": ",".join(name for name in SIMD if name in found) or "unknown",
        "platform": " ".join(part for part in (platform.system(), platform.machine(), *platform.libc_ver()) if part),
    }
