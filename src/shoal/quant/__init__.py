"""Shrink a model: round its weights to 8 or 4 bits, write a folder that others read, and measure what that cost."""

from shoal.quant.export import quantize
from shoal.quant.recipes import RECIPES

__all__ = ["RECIPES", "quantize"]
