"""Which rotary components to keep. RoPE turns pair p of every KV head by the same angle, so the G complex keys of a
frequency may be mixed by any complex matrix without disturbing their rotation (TransMLA, arXiv 2502.07864 §4.2, uses
real rotations for the same purpose). The principal components of that mixture, weighted by how strongly queries listen,
are the candidates for the rotary key that all heads share; a *slot* is one of them, two of its R dimensions.

A component that gets no slot loses its rotation. What then remains best is its value at the average distance:
c = E[e^{-iθΔ}] times itself. So its contribution is its energy times 1 − |c|²: fast frequencies lose nearly everything,
slow ones hardly anything.

All layers share one list of frequencies, so the counts of slots per frequency are chosen once, over all layers.

Letters: L layers, G key-value heads, P pairs of a head, X = D + 1 inputs with their constant.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shoal.tune.reshape.layer import GQALayer
from shoal.tune.reshape.moments import Moments


class Components(NamedTuple):
    """Complex mixtures of the KV heads, per frequency, in falling order of energy.

    Attributes:
        take_PGG: row m makes component m from the keys of the G heads. Complex.
        give_PGG: column m brings component m back to the heads; give · take = 1. Complex.
        energy_PG: mean square of the scores that each component carries.
    """

    take_PGG: Tensor
    give_PGG: Tensor
    energy_PG: Tensor


def components(layer: GQALayer, moments: Moments) -> Components:
    """Principal components of the keys at each frequency, heads weighted by the energy of their queries."""
    listen_NP = quadratic(layer.query_NPX, moments.query_XX)
    listen_GP = (listen_NP * moments.heads_N[:, None]).view(-1, layer.group, listen_NP.shape[1]).sum(1)
    weight_PG = listen_GP.T.sqrt()
    weight_PG = weight_PG.clamp_min(1e-6 * weight_PG.max().clamp_min(1e-30))
    key_PGX = layer.key_GPX.transpose(0, 1)
    moment_PGG = key_PGX @ moments.keys_XX.to(key_PGX.dtype) @ key_PGX.mH
    energy_PG, mix_PGG = torch.linalg.eigh(weight_PG[:, :, None] * moment_PGG * weight_PG[:, None, :])
    energy_PG, mix_PGG = energy_PG.flip(-1).clamp_min(0), mix_PGG.flip(-1)
    take_PGG = mix_PGG.mH * weight_PG[:, None, :]
    give_PGG = mix_PGG / weight_PG[:, :, None]
    return Components(take_PGG, give_PGG, energy_PG)


def quadratic(map_NPX: Tensor, moment_XX: Tensor) -> Tensor:
    """E|map · x|² from E[x xᵀ]. Real [N, P]."""
    return torch.einsum("npx,xy,npy->np", map_NPX, moment_XX.to(map_NPX.dtype), map_NPX.conj()).real


def contributions(found: Components, moments: Moments) -> Tensor:
    """Mean square of the scores that each component's rotation is worth. [P, G]."""
    return found.energy_PG * (1 - moments.still_P.abs().square()).clamp_min(0)[:, None]


def choose_slots(worth_LPG: Tensor, slots: int) -> Tensor:
    """How many components of each frequency keep their rotation, the ones worth most over all layers. [P].

    Within a frequency the components of every layer fall in worth, so the best ones are always the first ones.
    """
    worth_PG = worth_LPG.sum(0)
    best = worth_PG.flatten().topk(slots).indices
    return torch.zeros(len(worth_PG), dtype=torch.int64).scatter_add_(
        0, best // worth_PG.shape[1], torch.ones_like(best)
    )
