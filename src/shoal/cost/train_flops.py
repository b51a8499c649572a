"""Operations of training, counted from a model's configuration: forward by part, backward, and what is computed twice.

Letters: D hidden_size, N heads, H nope, R rope, V value head, S sequence length. One multiply-add is two operations.
As in `model_cost`, only matrix products count. The backward pass of a product is two products of the same size.
Attention counts the pairs that a causal mask leaves, (S + 1) / 2 keys a query; a kernel that computes the masked half
too does work that nobody asked for, and shows as lower utilisation. MLA is counted as training runs it, expanded:
keys and values of every head are made from the latents (DeepSeek-V2, arXiv 2405.04434 §2.1).
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from shoal.config import MLAConfig, ModelConfig
from shoal.cost.model_cost import part_of
from shoal.formats.layout import expected_tensors


@dataclass(frozen=True, kw_only=True)
class TrainFlops:
    """Operations for one token of training, by part.

    Attributes:
        forward: by part; `mtp` holds the MTP layers' own products, `mtp_head` the output head that each applies again.
        backward: two products for each of the forward pass.
        recompute: the layers' forward pass once more, with activation checkpointing.
    """

    forward: dict[str, float]
    backward: float
    recompute: float

    @property
    def model(self) -> float:
        """What the mathematics asks for: the count behind "model FLOPs utilisation"."""
        return sum(self.forward.values()) + self.backward

    @property
    def hardware(self) -> float:
        """What is really computed."""
        return self.model + self.recompute


def train_flops(
    config: ModelConfig, sequence_length: int, *, checkpointing: bool = False, causal: bool = True, mtp: bool = True
) -> TrainFlops:
    """Count one token of training in sequences of `sequence_length`.

    Args:
        causal: False counts masked pairs too.
        mtp: False leaves the MTP depths out, which rest for part of a run (`losses.mtp_from`).
    """
    forward = forward_flops(config, sequence_length, causal=causal)
    if not mtp:
        forward = {part: count for part, count in forward.items() if not part.startswith("mtp")}
    total = sum(forward.values())
    layers = total - forward["head"] - forward.get("mtp_head", 0.0)
    return TrainFlops(forward=forward, backward=2 * total, recompute=layers if checkpointing else 0.0)


def forward_flops(config: ModelConfig, sequence_length: int, *, causal: bool = True) -> dict[str, float]:
    """The forward pass by part, a token. Depth k of MTP sees S - k tokens; the difference is left out."""
    flops: Counter[str] = Counter()
    for name, shape in expected_tensors(config).items():
        part = part_of(config, name)
        if len(shape) < 2 or part in ("embedding", "head"):
            continue
        size = math.prod(shape)
        if ".mlp.experts." in name and config.moe is not None:
            size = size // config.moe.n_routed_experts * config.moe.num_experts_per_tok
        flops[part] += 2 * size
    head = 2.0 * config.vocab_size * config.hidden_size
    pairs = attention_flops_per_pair(config) * ((sequence_length + 1) / 2 if causal else sequence_length)
    depths = config.num_nextn_predict_layers
    out = {part: float(count) for part, count in flops.items()}
    out |= {"attention_over_sequence": config.num_hidden_layers * pairs, "head": head}
    if depths:
        out["mtp"] += depths * pairs
        out["mtp_head"] = depths * head
    return out


def attention_flops_per_pair(config: ModelConfig) -> float:
    """One query and one key in one layer, all heads: the score and the weighted value."""
    attention = config.attention
    if isinstance(attention, MLAConfig):
        return 2.0 * attention.num_attention_heads * (attention.qk_head_dim + attention.v_head_dim)
    return 4.0 * attention.num_attention_heads * attention.head_dim
