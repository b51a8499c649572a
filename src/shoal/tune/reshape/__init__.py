"""Another shape for a trained model: latent attention for grouped-query attention, experts for a dense feed-forward."""

from shoal.tune.reshape.experts import ExpertShape, with_experts
from shoal.tune.reshape.fit import fit
from shoal.tune.reshape.moments import measure
from shoal.tune.reshape.reshape import Shape, reshape

__all__ = ["ExpertShape", "Shape", "fit", "measure", "reshape", "with_experts"]
