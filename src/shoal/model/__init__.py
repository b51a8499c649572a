"""The network in PyTorch: readable single-device maths, one idea per file. Needs the `train` extra."""

from shoal.model.cache import KVCache, LatentCache, new_cache
from shoal.model.load import as_checkpoint, empty_model, load_model, random_model
from shoal.model.model import Model, States
from shoal.model.moe import Routing

__all__ = [
    "KVCache",
    "LatentCache",
    "Model",
    "Routing",
    "States",
    "as_checkpoint",
    "empty_model",
    "load_model",
    "new_cache",
    "random_model",
]
