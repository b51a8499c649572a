"""The compiled extension: loaded once, with the setting `SHOAL_ISA` applied."""

from __future__ import annotations

import functools
import importlib
import types
import warnings

from shoal import settings
from shoal.errors import ConfigError


@functools.cache
def load() -> types.ModuleType | None:
    """The compiled module with the setting applied, or None after one warning."""
    try:
        native: types.ModuleType | None = importlib.import_module("shoal.kernels._native")
    except ModuleNotFoundError as error:
        if error.name != "shoal.kernels._native":
            raise
        native = None
        warnings.warn("the CPU kernels are not compiled; NumPy stands in, slowly", RuntimeWarning, stacklevel=3)
    wanted = settings.isa()
    if wanted is not None:
        select(native, wanted)
    return native


def select(native: types.ModuleType | None, name: str) -> None:
    """Put an instruction set in force. ConfigError if the machine or build lacks it."""
    names = native.available_isas() if native else ["numpy"]
    if name not in names:
        raise ConfigError("SHOAL_ISA", f"{name!r} is not available here; choose from {', '.join(names)}")
    if native:
        native.select_isa(name)
