"""The compiled extension's executor classes, or a clear error where it is absent."""

from __future__ import annotations

from shoal.errors import ShoalError

try:
    from shoal.kernels._native import Engine, Packed, pack, packed_bytes, read_bandwidth
except ImportError as error:  # pragma: no cover - a pure Python install
    raise ShoalError("Shoal's engine needs its compiled extension, which this installation lacks") from error

__all__ = ["Engine", "Packed", "pack", "packed_bytes", "read_bandwidth"]
