"""Request in, tokens out."""

from __future__ import annotations

from shoal.engine.generation import Generation
from shoal.engine.llm import LLM
from shoal.engine.outputs import Chunk, Completion, Stats, TokenLogprob
from shoal.engine.params import SamplingParams

__all__ = ["LLM", "Chunk", "Completion", "Generation", "SamplingParams", "Stats", "TokenLogprob"]
