"""Another shape for a trained model: latent attention for grouped-query attention, experts for a dense feed-forward."""

from shoal.tune.reshape.experts import ExpertShape, with_experts
from shoal.tune.reshape.fit import LayerFit, fit
from shoal.tune.reshape.heal import HealSettings, HealStep, heal
from shoal.tune.reshape.moments import measure
from shoal.tune.reshape.reshape import Shape, choose_shape, reshape

__all__ = [
    "ExpertShape",
    "HealSettings",
    "HealStep",
    "LayerFit",
    "Shape",
    "choose_shape",
    "fit",
    "heal",
    "measure",
    "reshape",
    "with_experts",
]
