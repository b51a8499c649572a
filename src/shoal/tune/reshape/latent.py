"""A layer of grouped-query attention written as multi-head latent attention.

The rotary key: chosen components of the keys (`slots`), two dimensions each. All else of the keys, unrotated, and all
values are one linear map of the layer's input; its best approximation of rank C − 1 is the latent (a joint singular
value decomposition, as in TransMLA, arXiv 2502.07864, and MHA2MLA, arXiv 2502.14837). "Best" is measured where it
counts: inputs as they occur, an error in a key by the queries that meet it and by what a wrong score costs, an error in
a value by the output projection. Both errors are then in the unit of the layer's output, so keys and values share the
rank without a knob between them.

DeepSeek normalises the latent, c / rms(c), which no choice of weights undoes for a linear map. The remaining dimension
of the latent holds a constant, far larger than all others: the root mean square becomes that constant and the norm a
fixed factor, exact to |c|² / (2 · LARGE² · C). The constant comes from the bias of `kv_a_proj_with_mqa`
(`attention_bias`), and behind the norm it carries the mean of keys and values and their biases. Queries with a bias
(Qwen2) pass through a compressed query of full rank with a constant of the same kind.

Letters: X = D + 1 inputs with their constant, N query heads, G key-value heads, P pairs of a head, H nope, V value,
R rope, C latent, Y = G · (H + V) rows of what the latent stands for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.config import GQAConfig
from shoal.tune.reshape.layer import GQALayer, real_rows
from shoal.tune.reshape.moments import Moments
from shoal.tune.reshape.slots import components

# Root mean square of the constant, beside which the latent's other values are about 1. A power of two, so that scaling
# by it costs nothing in bfloat16; small enough for float16 (LARGE · √C < 65504 up to C = 1023).
LARGE = 2048.0
FLOOR = 1e-4  # an output that counts less than this share of the one that counts most is taken to count this much


@dataclass(frozen=True, kw_only=True)
class Widths:
    """The widths of the new attention, equal in all layers.

    Attributes:
        slots_P: how many components of each frequency keep their rotation.
        latent: C, the constant included.
        query_bias: whether queries have a bias, and so pass through a compressed query.
    """

    slots_P: Tensor
    latent: int
    query_bias: bool

    def nope_pairs(self, kv_heads: int) -> Tensor:
        """Frequencies with components that lose their rotation."""
        return (self.slots_P < kv_heads).nonzero()[:, 0]

    def nope(self, kv_heads: int) -> int:
        """H: the pairs with something left, and at least one, as the layout demands."""
        return 2 * max(1, len(self.nope_pairs(kv_heads)))

    def most_latent(self, gqa: GQAConfig) -> int:
        """C that cuts nothing off, made even."""
        return gqa.num_key_value_heads * (2 * len(self.nope_pairs(gqa.num_key_value_heads)) + gqa.head_dim) + 2


def to_latent(layer: GQALayer, moments: Moments, widths: Widths) -> dict[str, Tensor]:
    """The `self_attn` weights of the layer as DeepSeek-V3 names them. Float64."""
    rotary_RX, lift_NQP, nope_GHX = _rotary(layer, moments, widths)
    weight, bias, up_GYC = _latent(layer, moments, nope_GHX, widths)
    out_bias_D = layer.out_bias_D
    out = {
        **_queries(layer, moments, lift_NQP, widths),
        "kv_a_proj_with_mqa.weight": torch.cat([weight, rotary_RX[:, :-1]]),
        "kv_a_proj_with_mqa.bias": torch.cat([bias, rotary_RX[:, -1]]),
        "kv_a_layernorm.weight": _norm(widths.latent),
        "kv_b_proj.weight": up_GYC.repeat_interleave(layer.group, 0).flatten(0, 1),
        "o_proj.weight": layer.out_NDH.transpose(0, 1).flatten(1),
        "o_proj.bias": out_bias_D if out_bias_D is not None else weight.new_zeros(layer.out_NDH.shape[1]),
    }
    return {name: value.contiguous() for name, value in out.items()}


def _rotary(layer: GQALayer, moments: Moments, widths: Widths) -> tuple[Tensor, Tensor, Tensor]:
    """The rotary key's rows [R, X]; what each head's query pairs become [N, nope pairs then slots, P], complex; and
    what is left of the keys, to be seen without rotation [G, H, X]."""
    found = components(layer, moments)
    heads, pairs = layer.query_NPX.shape[:2]

    def one_pair(pair: int, factors_N: Tensor | float) -> Tensor:
        lift_NP = layer.query_NPX.new_zeros(heads, pairs)
        lift_NP[:, pair] = factors_N
        return lift_NP

    rows, lifts = [], [one_pair(pair, 1.0) for pair in widths.nope_pairs(len(layer.key_GPX)).tolist()]
    left_PGX = layer.key_GPX.transpose(0, 1).clone()
    for pair, count in enumerate(widths.slots_P.tolist()):
        taken_KX = found.take_PGG[pair, :count] @ layer.key_GPX[:, pair]
        give_GK = found.give_PGG[pair, :, :count]
        rows.append(taken_KX)
        left_PGX[pair] -= give_GK @ taken_KX
        lifts += [one_pair(pair, factor_G.conj().repeat_interleave(layer.group)) for factor_G in give_GK.T]
    left_PGX *= moments.still_P[:, None, None]
    left_PGX = left_PGX[widths.nope_pairs(len(layer.key_GPX))]
    nope_GHX = torch.stack([real_rows(left_PX) for left_PX in left_PGX.transpose(0, 1)])
    nope_GHX = F.pad(nope_GHX, (0, 0, 0, widths.nope(len(nope_GHX)) - nope_GHX.shape[1]))
    return real_rows(torch.cat(rows)), torch.stack(lifts, dim=1), nope_GHX


def _queries(layer: GQALayer, moments: Moments, lift_NQP: Tensor, widths: Widths) -> dict[str, Tensor]:
    """q_proj, or q_a_proj … q_b_proj where there is a bias. Rows of a head: nope, then rope."""
    spare = widths.nope(len(layer.key_GPX)) - 2 * len(widths.nope_pairs(len(layer.key_GPX)))
    turn_NQZ = F.pad(torch.stack([_real_matrix(lift_QP) for lift_QP in lift_NQP]), (0, 0, spare, 0))
    turn_NQZ = turn_NQZ * math.sqrt(turn_NQZ.shape[1])  # readers divide scores by this
    low_NZX = torch.stack([real_rows(query_PX) for query_PX in layer.query_NPX])
    if not widths.query_bias:
        return {"q_proj.weight": (turn_NQZ @ low_NZX)[..., :-1].flatten(0, 1)}
    turn, low = torch.block_diag(*turn_NQZ), low_NZX.flatten(0, 1)  # type: ignore[no-untyped-call]
    rank = len(low) + 1
    size = ((low @ moments.query_XX) * low).sum(1).mean().sqrt().clamp_min(1e-12)
    weight, bias = _with_constant(low[:, :-1] / size, low.new_zeros(len(low)))
    return {
        "q_a_proj.weight": weight, "q_a_proj.bias": bias, "q_a_layernorm.weight": _norm(rank),
        "q_b_proj.weight": _behind_norm(size * turn, turn @ low[:, -1]),
    }  # fmt: skip


def cut_off(layer: GQALayer, moments: Moments, widths: Widths) -> float:
    """Mean square error of the layer's output by what the latent's rank cuts off, to first order."""
    _, _, nope_GHX = _rotary(layer, moments, widths)
    energy_Y = torch.linalg.eigvalsh(_felt(layer, moments, nope_GHX, widths)[2])
    return float(energy_Y[: max(0, len(energy_Y) - widths.latent + 1)].clamp_min(0).sum())


def _felt(layer: GQALayer, moments: Moments, nope_GHX: Tensor, widths: Widths) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in the unit of the layer's output: their map [Y, X], how to undo that unit [G, H + V, H + V], and
    their covariance [Y, Y]."""
    values_GVV = _by_group(layer.out_NDH.mT @ layer.out_NDH, layer)
    weights = zip(_key_weights(layer, moments, widths), values_GVV, strict=True)
    blocks = [torch.block_diag(*pair) for pair in weights]  # type: ignore[no-untyped-call]
    roots = [_roots(block_YY) for block_YY in blocks]
    wanted_GYX = torch.cat([nope_GHX, layer.value_GHX], dim=1)
    felt_YX = torch.cat([root_YY @ wanted_YX for (root_YY, _), wanted_YX in zip(roots, wanted_GYX, strict=True)])
    mean_X = moments.mean_X
    spread_XX = moments.keys_XX / moments.keys_XX[-1, -1] - torch.outer(mean_X, mean_X)
    return felt_YX, torch.stack([inverse_YY for _, inverse_YY in roots]), felt_YX @ spread_XX @ felt_YX.T


def _latent(layer: GQALayer, moments: Moments, nope_GHX: Tensor, widths: Widths) -> tuple[Tensor, Tensor, Tensor]:
    """kv_a rows of the latent and their biases, and kv_b [G, H + V, C]."""
    felt_YX, inverse_GYY, covariance_YY = _felt(layer, moments, nope_GHX, widths)
    energy_Y, basis_YY = torch.linalg.eigh(covariance_YY)
    rank = min(widths.latent - 1, len(energy_Y))
    spare = widths.latent - 1 - rank
    basis_YK = basis_YY[:, -rank:].flip(1)
    size = energy_Y[-rank:].clamp_min(0).mean().sqrt().clamp_min(1e-12)
    down_KX = F.pad(basis_YK.T @ felt_YX / size, (0, 0, 0, spare))
    weight, bias = _with_constant(down_KX[:, :-1], -down_KX[:, :-1] @ moments.mean_X[:-1])
    up_GYK = F.pad(inverse_GYY @ basis_YK.reshape(len(nope_GHX), -1, rank) * size, (0, spare))
    wanted_GYX = torch.cat([nope_GHX, layer.value_GHX], dim=1)
    return weight, bias, _behind_norm(up_GYK, wanted_GYX @ moments.mean_X)


def _key_weights(layer: GQALayer, moments: Moments, widths: Widths) -> Tensor:
    """What a square error in the unrotated keys of each KV head costs: by the queries that meet it. [G, H, H]."""
    kv_heads = len(layer.key_GPX)
    query_NHX = torch.stack([real_rows(query_PX[widths.nope_pairs(kv_heads)]) for query_PX in layer.query_NPX])
    moment_NHH = query_NHX @ moments.query_XX @ query_NHX.mT * moments.heads_N[:, None, None]
    spare = widths.nope(kv_heads) - moment_NHH.shape[1]
    return _by_group(F.pad(moment_NHH, (0, spare, 0, spare)), layer)


def _by_group(matrix_NHH: Tensor, layer: GQALayer) -> Tensor:
    """Sums over the query heads of each KV head. [G, H, H]."""
    return matrix_NHH.view(-1, layer.group, *matrix_NHH.shape[1:]).sum(1)


def _roots(moment_YY: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse, with a floor under what hardly counts."""
    value_Y, vector_YY = torch.linalg.eigh(moment_YY)
    root_Y = value_Y.clamp_min(float(value_Y.max()) * FLOOR**2 + 1e-60).sqrt()
    return vector_YY * root_Y @ vector_YY.T, vector_YY / root_Y @ vector_YY.T


def _real_matrix(map_QP: Tensor) -> Tensor:
    """A complex matrix as one that acts on interleaved real and imaginary parts. [2Q, 2P]."""
    top_QZ = torch.stack([map_QP.real, -map_QP.imag], dim=-1).flatten(1)
    bottom_QZ = torch.stack([map_QP.imag, map_QP.real], dim=-1).flatten(1)
    return torch.stack([top_QZ, bottom_QZ], dim=1).flatten(0, 1)


def _with_constant(weight_KD: Tensor, bias_K: Tensor) -> tuple[Tensor, Tensor]:
    """A projection with the constant as its first output: weight [K + 1, D] and bias [K + 1]."""
    return F.pad(weight_KD, (0, 0, 1, 0)), F.pad(bias_K, (1, 0), value=_constant(len(bias_K) + 1))


def _behind_norm(weight: Tensor, constant: Tensor) -> Tensor:
    """The projection that follows the norm: `weight` [.., K] on the other values, `constant` [..] for the constant."""
    width = weight.shape[-1] + 1
    first = constant[..., None] / (float(_norm(width)[0]) * math.sqrt(width))
    return torch.cat([first, weight * (_constant(width) / (LARGE * math.sqrt(width)))], dim=-1)


def _constant(width: int) -> float:
    """The constant before the norm: LARGE · √width as bfloat16 can hold it."""
    return float(torch.tensor(LARGE * math.sqrt(width)).bfloat16())


def _norm(width: int) -> Tensor:
    """Weights of the norm: LARGE undoes the division; the constant comes out as about 1."""
    weight = torch.full((width,), LARGE, dtype=torch.float64)
    weight[0] = float(torch.tensor(width**-0.5).bfloat16())
    return weight
