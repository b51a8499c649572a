"""Another shape for a trained model: latent attention for grouped-query attention, experts for a dense feed-forward."""

from shoal.tune.reshape.experts import ExpertShape, with_experts
from shoal.tune.reshape.fit import LayerFit, fit
from shoal.tune.reshape.moments import measure
from shoal.tune.reshape.reshape import Shape, choose_shape, reshape

__all__ = ["ExpertShape", "LayerFit", "Shape", "choose_shape", "fit", "measure", "reshape", "with_experts"]
