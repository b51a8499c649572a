"""Facts about this machine and process, for `shoal info` and the statistics of `shoal chat`."""

from __future__ import annotations

import os
import platform
import resource
import sys
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from shoal.machine import processors

# What the kernels and their competitors choose code by; the rest of the flags tells little.
FLAGS = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
PACKAGES = ("numpy", "tokenizers", "jinja2", "starlette", "uvicorn", "torch", "transformers", "huggingface_hub")


def peak_rss_bytes() -> int:
    """The most memory that this process has held at once, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # KiB on Linux


def describe_machine() -> dict[str, Any]:
    """Processor, memory, instruction sets, versions; plain data, ready for JSON."""
    import psutil  # type: ignore[import-untyped]

    import shoal

    memory = psutil.virtual_memory()
    return {
        "shoal": shoal.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": os.cpu_count(),
        "usable_threads": len(processors()) or os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "cpu_flags": _cpu_flags(),
        **_kernels(),
        "packages": _versions(),
    }


def _kernels() -> dict[str, Any]:
    from shoal import kernels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "no compiled kernels": here that is the answer, not a warning
        return {"isa_available": kernels.available_isas(), "isa": kernels.selected_isa()}


def _cpu_name() -> str:
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = _cpuinfo()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in FLAGS if flag in present]


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
