"""What the attention of each layer meets on a text: second moments of its inputs, and how far back it looks.

Letters: X = D + 1 inputs with their constant, N query heads, P pairs, B windows, T tokens, S tokens looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal import positions
from shoal.config import ModelConfig
from shoal.model import Model
from shoal.model.attend import causal_mask
from shoal.model.gqa import GQA
from shoal.model.rope import RopeTable, rope_table, rotate
from shoal.tune.reshape.layer import GQALayer, block_of

NEAR = 0.5  # share of the distances that count as attention weighs them; the others are spread evenly


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Float64 statistics of one layer.

    Attributes:
        query_XX: E[x xᵀ] of x = [h; 1] over all tokens, h the normalised input.
        keys_XX: the same, tokens weighted by how much attention they receive.
        heads_N: what an error in a head's scores costs in the layer's output, on average: |W_o (v − out)|².
        still_P: E[e^{-iθΔ}] of every frequency over the distances Δ that queries look back. Complex.
    """

    query_XX: Tensor
    keys_XX: Tensor
    heads_N: Tensor
    still_P: Tensor

    @property
    def mean_X(self) -> Tensor:
        """E[x], tokens weighted as in `keys_XX`."""
        return self.keys_XX[-1] / self.keys_XX[-1, -1]


def assume(layer: GQALayer, config: ModelConfig, length: int) -> Moments:
    """Without a text: independent inputs of unit size before the norm's weight, and all distances alike."""
    norm = layer.input_norm_D
    moment_XX = torch.diag(torch.cat([norm.square(), norm.new_ones(1)]))
    uniform_T = torch.arange(length, 0, -1, dtype=torch.float64)
    heads = layer.query_NPX.shape[0]
    return Moments(
        query_XX=moment_XX, keys_XX=moment_XX, heads_N=norm.new_ones(heads),
        still_P=_still(config, uniform_T / uniform_T.sum()),
    )  # fmt: skip


@torch.no_grad()
def measure(
    model: Model, windows: Sequence[Sequence[int]], progress: Callable[[int, int], None] | None = None
) -> list[Moments]:
    """Run the model layer by layer over windows of equal length and gather every layer's moments."""
    config = model.config
    tokens_BT = torch.tensor([list(window) for window in windows])
    rope = rope_table(config.rope, config.attention.rope_dim, torch.arange(tokens_BT.shape[1]))
    x_BTD = model.model.embed_tokens(tokens_BT)
    out: list[Moments] = []
    for index in range(config.num_hidden_layers):
        block = block_of(model, index)
        assert isinstance(block.self_attn, GQA)
        total = _Totals(config, tokens_BT.shape[1])
        for row in range(len(x_BTD)):
            total.add(block.self_attn, block.input_layernorm(x_BTD[row]), rope)
            x_BTD[row] = block(x_BTD[row : row + 1], rope, None)[0][0]
        out.append(total.moments())
        if progress is not None:
            progress(index + 1, config.num_hidden_layers)
    return out


class _Totals:
    """Sums over windows."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        size, heads = config.hidden_size + 1, config.attention.num_attention_heads
        self.config = config
        self.query_XX = torch.zeros(size, size, dtype=torch.float64)
        self.keys_XX = torch.zeros(size, size, dtype=torch.float64)
        self.tokens, self.received = 0, 0.0
        self.cost_N, self.square_N = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
        self.distance_T = torch.zeros(length, dtype=torch.float64)

    def add(self, attention: GQA, h_TD: Tensor, rope: RopeTable) -> None:
        probs_NTS, values_NSH, out_NTH = _attend(attention, h_TD, rope)
        out_NDH = attention.o_proj.weight.view(h_TD.shape[1], len(probs_NTS), -1).transpose(0, 1)
        gram_NHH = out_NDH.mT @ out_NDH
        # |W_o (v_s − out_t)|² = v·Gv − 2 out·Gv + out·G·out, for every pair of tokens.
        gv_NSH = values_NSH @ gram_NHH
        far_NTS = (gv_NSH * values_NSH).sum(-1)[:, None] - 2 * out_NTH @ gv_NSH.mT
        far_NTS = (far_NTS + ((out_NTH @ gram_NHH) * out_NTH).sum(-1)[..., None]).clamp_min(0)
        squares_NTS = probs_NTS.square()
        received_S = squares_NTS.sum((0, 1)).double()
        x_TX = F.pad(h_TD, (0, 1), value=1.0).double()
        self.query_XX += x_TX.T @ x_TX
        self.keys_XX += x_TX.T @ (received_S[:, None] * x_TX)
        self.tokens += len(x_TX)
        self.received += float(received_S.sum())
        self.cost_N += (squares_NTS * far_NTS).sum((1, 2)).double()
        self.square_N += squares_NTS.sum((1, 2)).double()
        mass_TS = probs_NTS.sum(0)
        for distance in range(len(mass_TS)):
            self.distance_T[distance] += float(mass_TS.diagonal(-distance).sum())

    def moments(self) -> Moments:
        query_XX, keys_XX = self.query_XX / self.tokens, self.keys_XX / self.received
        uniform_T = torch.arange(len(self.distance_T), 0, -1, dtype=torch.float64)
        seen_T = NEAR * self.distance_T / self.distance_T.sum() + (1 - NEAR) * uniform_T / uniform_T.sum()
        return Moments(
            query_XX=query_XX, keys_XX=(keys_XX + query_XX) / 2, heads_N=self.cost_N / self.square_N,
            still_P=_still(self.config, seen_T),
        )  # fmt: skip


def _attend(attention: GQA, h_TD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
    """Attention written out: probabilities [N, T, S], values and outputs of every query head [N, T, H]."""
    config = attention.config
    query_TNH = rotate(attention.q_proj(h_TD).unflatten(-1, (-1, config.head_dim)), rope)
    key_TGH = rotate(attention.k_proj(h_TD).unflatten(-1, (-1, config.head_dim)), rope)
    value_TGH = attention.v_proj(h_TD).unflatten(-1, (-1, config.head_dim))
    group = config.num_attention_heads // config.num_key_value_heads
    key_NSH, value_NSH = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (key_TGH, value_TGH))
    scores_NTS = attention.scale * query_TNH.transpose(0, 1) @ key_NSH.mT
    mask = causal_mask(len(h_TD), len(h_TD), h_TD.device)
    probs_NTS = scores_NTS.masked_fill(~mask, float("-inf")).softmax(-1)
    return probs_NTS, value_NSH, probs_NTS @ value_NSH


def _still(config: ModelConfig, share_T: Tensor) -> Tensor:
    frequency_P = torch.from_numpy(positions.frequencies(config.rope, config.attention.rope_dim)).double()
    angle_TP = torch.arange(len(share_T), dtype=torch.float64)[:, None] * frequency_P
    return (share_T[:, None] * torch.polar(torch.ones_like(angle_TP), -angle_TP)).sum(0)
