"""The environment variables that Shoal reads, all of them, each checked here and listed in the README's table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from shoal.errors import ConfigError

# The twins of `shoal serve`'s flags, which the command line reads through Typer; a flag wins. Spaces separate several
# keys or origins.
SERVE_FLAGS = {
    "model": "SHOAL_MODEL",
    "adapter": "SHOAL_ADAPTER",
    "code": "SHOAL_CODE",
    "host": "SHOAL_HOST",
    "port": "SHOAL_PORT",
    "served-name": "SHOAL_SERVED_NAME",
    "api-key": "SHOAL_API_KEY",
    "api-key-file": "SHOAL_API_KEY_FILE",
    "admin-key": "SHOAL_ADMIN_KEY",
    "without-key": "SHOAL_WITHOUT_KEY",
    "cors-origin": "SHOAL_CORS_ORIGIN",
    "parallel": "SHOAL_PARALLEL",
    "max-queue": "SHOAL_MAX_QUEUE",
    "request-seconds": "SHOAL_REQUEST_SECONDS",
    "drain-seconds": "SHOAL_DRAIN_SECONDS",
    "price-per-hour": "SHOAL_PRICE_PER_HOUR",
    "max-context": "SHOAL_MAX_CONTEXT",
    "threads": "SHOAL_THREADS",
    "pin": "SHOAL_PIN",
    "log": "SHOAL_LOG",
    "log-prompts": "SHOAL_LOG_PROMPTS",
    "trace-dir": "SHOAL_TRACE_DIR",
    "trace-text": "SHOAL_TRACE_TEXT",
}


def isa() -> str | None:
    """`SHOAL_ISA`: the instruction set of the CPU kernels (scalar, avx2, avx512, neon); None: the machine's best."""
    return os.environ.get("SHOAL_ISA") or None


def models_dir() -> Path:
    """`SHOAL_MODELS`: where pulled models live; by default `shoal/models` in `XDG_CACHE_HOME`, or in `~/.cache`."""
    chosen = os.environ.get("SHOAL_MODELS")
    if chosen:
        path = _expand("SHOAL_MODELS", chosen)
        if path.exists() and not path.is_dir():
            raise ConfigError("SHOAL_MODELS", f"{chosen} is not a folder")
        return path
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is invalid and to be ignored.
    root = Path(cache) if cache.startswith("/") else _expand("SHOAL_MODELS", "~/.cache")
    return root / "shoal" / "models"


def threads() -> int | None:
    """`SHOAL_THREADS`: how many CPU threads the engine may use; None lets it count the cores it is given."""
    text = os.environ.get("SHOAL_THREADS")
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= 4096:
        raise ConfigError("SHOAL_THREADS", f"must be a whole number from 1 to 4096, got {text!r}")
    return int(text)


def debug() -> bool:
    """`SHOAL_DEBUG`: 1 shows the traceback of an error that otherwise takes one line."""
    text = os.environ.get("SHOAL_DEBUG", "")
    if text not in ("", "0", "1"):
        raise ConfigError("SHOAL_DEBUG", f"must be 0 or 1, got {text!r}")
    return text == "1"


def hub_endpoint() -> str | None:
    """`HF_ENDPOINT`: the server that `shoal pull ORG/NAME` asks; None means huggingface_hub's own."""
    text = os.environ.get("HF_ENDPOINT")
    if not text:
        return None
    if not text.startswith(("https://", "http://")):
        raise ConfigError("HF_ENDPOINT", f"must start with https:// or http://, got {text!r}")
    return text.rstrip("/")


class Launched(NamedTuple):
    """A process that a launcher started as one of several: its number, that number on its machine, and how many."""

    rank: int
    local_rank: int
    world: int


def launched() -> Launched | None:
    """`RANK`, `LOCAL_RANK` and `WORLD_SIZE`, as torchrun and its like set them; None: this process is on its own."""
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return None
    rank = os.environ.get("RANK", "")
    given = {"WORLD_SIZE": text, "RANK": rank, "LOCAL_RANK": os.environ.get("LOCAL_RANK", rank)}
    for name, value in given.items():
        if not (value.isascii() and value.isdigit()) or not (name == "WORLD_SIZE") <= int(value[:9]) < 1 << 20:
            raise ConfigError(name, f"must be a whole number as torchrun sets it, got {value!r}")
    world, number, local = (int(value) for value in given.values())
    if number >= world:
        raise ConfigError("RANK", f"must be less than the WORLD_SIZE of {world}, got {number}")
    return Launched(number, local, world) if world > 1 else None


def one_thread_each() -> None:
    """Keep the thread pools of the libraries below us (tokenizers, OpenMP) at one thread in this process: its siblings
    use the other processors. What somebody has set stays; of use before those libraries start their pools."""
    for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _expand(name: str, text: str) -> Path:
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(name, "must be set, as there is no home folder") from error
