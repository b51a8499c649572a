"""Another shape for a trained model: latent attention for grouped-query attention, experts for a dense feed-forward."""

from shoal.tune.reshape.reshape import Shape, reshape

__all__ = ["Shape", "reshape"]
