"""Shoal trains, reshapes, shrinks and serves DeepSeek-style language models on the hardware people already have:

    import shoal
    llm = shoal.LLM("smollm2-135m")
    print(llm.chat([{"role": "user", "content": "What is the capital of France?"}]).text)

Importing it loads neither the engine nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from shoal.engine import LLM, SamplingParams


def __getattr__(name: str) -> object:
    # The command line must start fast, so the engine is imported when first asked for.
    if name in ("LLM", "SamplingParams"):
        from shoal import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'shoal' has no attribute {name!r}")
