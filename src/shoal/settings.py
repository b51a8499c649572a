"""The environment variables that Shoal reads, all of them, each checked here and listed in the README's table."""

from __future__ import annotations

import os


def isa() -> str | None:
    """`SHOAL_ISA`: the instruction set of the CPU kernels (scalar, avx2, avx512, neon); None lets the machine decide."""
    return os.environ.get("SHOAL_ISA") or None
