"""What training minimises: next-token loss, the losses of the MTP depths, router balance, and a pull on the logits.

The output head is the widest matrix of a small model, and its logits [X, V] would be the largest tensor of a step. They
are made for a few hundred tokens at a time, and turned into gradients before the next few are made.

Shapes: B batch, T tokens of a row, X = B · T tokens, C tokens of a chunk, D model, V vocabulary, E experts, K picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.config import MoEConfig
from shoal.errors import ConfigError
from shoal.model import Model, Routing
from shoal.model.precision import product_type
from shoal.train.batches import IGNORE

# Logits in memory at a time (64 MB in bfloat16), and of those, in float32 while they become gradients (2 MB).
CHUNK_LOGITS = 1 << 25
CACHED_LOGITS = 1 << 19
# Share of tokens that count below which the others (the questions, in tuning) are left out rather than weighed with 0.
SPARSE = 0.9


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights of the terms beside the next-token loss; 0 leaves a term out.

    Attributes:
        mtp_weight: λ of DeepSeek-V3 §2.2, divided among the MTP depths. Published: 0.3, in the last third 0.1.
        mtp_from: share of the steps before which the MTP depths rest and cost nothing. Published: 0.
        balance_weight: α of the sequence-wise balance loss, DeepSeek-V3 §2.1.2. Published: 0.0001.
        z_weight: of the mean square of log Σ exp(logits), which keeps logits from drifting (PaLM, arXiv 2204.02311 §5).
    """

    mtp_weight: float = 0.3
    mtp_from: float = 0.0
    balance_weight: float = 1e-4
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mtp_weight", "balance_weight", "z_weight"):
            if not 0.0 <= getattr(self, name) <= 100.0:
                raise ConfigError(f"losses.{name}", f"must lie between 0 and 100, got {getattr(self, name)!r}")
        if not 0.0 <= self.mtp_from <= 1.0:
            raise ConfigError("losses.mtp_from", f"must lie between 0 and 1, got {self.mtp_from!r}")

    def at(self, step: int, steps: int) -> LossSettings:
        """The settings of step `step` (from 0) of `steps`."""
        return replace(self, mtp_weight=0.0) if step < self.mtp_from * steps else self


class TextBatch(NamedTuple):
    """Rows of text, as `batches.Batch` but tensors.

    Attributes:
        targets_BT: the token after each one, or IGNORE where there is none (the end of a document).
        documents_BT: a number for each token; tokens see only those of the same document. None: a row is one document.
            Below 0 is padding, on whose routing nothing depends.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None = None


class Losses(NamedTuple):
    """What one forward pass costs.

    Attributes:
        total: what to differentiate.
        parts: its terms before weighting, detached scalars: `next` always, then `mtp`, `balance` and `z` where present.
        routings: where the tokens went, by layer index, MTP layers included, padding left out.
    """

    total: Tensor
    parts: dict[str, Tensor]
    routings: dict[int, Routing]


def language_loss(
    model: Model,
    batch: TextBatch,
    settings: LossSettings,
    *,
    num_targets: Tensor | int | None = None,
    num_rows: int | None = None,
) -> Losses:
    """Loss of a batch: next + λ · mean of the MTP depths + α · balance + z.

    Every token-wise term is a sum divided by the same count, as the paper writes them (a depth's few missing tokens at
    the ends make its mean a little smaller, not its tokens heavier).

    Args:
        num_targets: that count; by default the targets of this batch.
        num_rows: what the balance term, a sum over rows, is divided by; by default the rows of this batch. A step of
            several batches gives each of them the counts of the whole step; then totals, parts and gradients add up.
    """
    tokens_BT, targets_BT, documents_BT = batch
    states = model.states(tokens_BT, documents_BT=documents_BT)
    routings = dict(states.routings)
    hidden, targets = [states.hidden_BTD.flatten(0, 1)], [targets_BT.flatten()]
    if settings.mtp_weight > 0 and model.config.num_nextn_predict_layers:
        further = model.predict_further_over_text(states.hidden_BTD, tokens_BT, documents_BT=documents_BT)
        for depth, ahead in enumerate(further, start=1):
            routings.update(ahead.routings)
            hidden.append(ahead.hidden_BTD.flatten(0, 1))
            targets.append(targets_further(targets_BT, documents_BT, depth).flatten())

    head_VD = model.model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    count = (targets[0] != IGNORE).sum() if num_targets is None else torch.as_tensor(num_targets, device=head_VD.device)
    each = 1.0 / count.clamp(min=1).to(torch.promote_types(head_VD.dtype, torch.float32))
    depths = len(hidden) - 1
    weights = [
        each.expand(len(targets[0])),
        *((each * settings.mtp_weight / depths).expand(len(t)) for t in targets[1:]),
    ]
    total, loss_X, square_X = linear_cross_entropy(
        torch.cat(hidden), head_VD, torch.cat(targets), torch.cat(weights), settings.z_weight
    )
    first = len(targets[0])
    parts = {"next": loss_X[:first].sum() * each}
    if depths:
        parts["mtp"] = loss_X[first:].sum() * each / depths
    if settings.z_weight > 0:
        parts["z"] = square_X[:first].sum() * each
    real_BT = real_tokens(documents_BT)
    if settings.balance_weight > 0 and routings and model.config.moe is not None:
        rows = len(tokens_BT)
        balance = torch.stack([balance_loss(r, model.config.moe, rows, real_BT) for r in routings.values()]).sum()
        balance = balance * (rows / (num_rows or rows))
        total = total + settings.balance_weight * balance
        parts["balance"] = balance.detach()
    return Losses(total, parts, without_padding(routings, real_BT))


def real_tokens(documents_BT: Tensor | None) -> Tensor | None:
    """Which tokens are no padding; None if all are."""
    if documents_BT is None or bool((documents_BT >= 0).all()):
        return None
    return documents_BT >= 0


def without_padding(routings: dict[int, Routing], real_BT: Tensor | None) -> dict[int, Routing]:
    """Where the tokens of `real_BT` went. An MTP depth has a few less, at the end."""
    if real_BT is None:
        return routings
    out = {}
    for layer, routing in routings.items():
        real_T = real_BT[:, : len(routing.indices_TK) // len(real_BT)].flatten()
        out[layer] = Routing(*(part[real_T] for part in routing))
    return out


def targets_further(targets_BT: Tensor, documents_BT: Tensor | None, depth: int) -> Tensor:
    """Targets of MTP depth k, [B, T - k]: state i is asked for token i + k + 1, if its document still has one."""
    targets = targets_BT[:, depth:]
    if documents_BT is None:
        return targets
    return targets.masked_fill(documents_BT[:, depth:] != documents_BT[:, :-depth], IGNORE)


def balance_loss(routing: Routing, moe: MoEConfig, num_rows: int, real_BT: Tensor | None = None) -> Tensor:
    """Sequence-wise balance of one layer (DeepSeek-V3 §2.1.2, eq. 17-20), averaged over the rows of the batch.

    Σ_i f_i P_i for every row, where f_i = E / (K T) · (tokens that picked expert i) has no gradient and P_i is the mean
    over the row of the scores divided by their sum. 1 when even, E / K when all tokens pick the same experts. Counted
    are the picks as they were made, the router's bias included; the paper's eq. 18 counts the K largest scores without.
    """
    experts, picked = moe.n_routed_experts, moe.num_experts_per_tok
    scores_BTE = routing.scores_TE.view(num_rows, -1, experts)
    share_BTE = scores_BTE / scores_BTE.sum(-1, keepdim=True)
    picks_BTK = routing.indices_TK.reshape(num_rows, -1, picked)
    counted_BTK, length = torch.ones_like(picks_BTK, dtype=share_BTE.dtype), share_BTE.shape[1]
    if real_BT is None:
        share_BE = share_BTE.mean(1)
        scale: Tensor | float = experts / (picked * length)
    else:
        real_BT1 = real_BT[:, :length, None].to(share_BTE.dtype)
        counted_BTK, length_B1 = counted_BTK * real_BT1, real_BT1.sum(1).clamp(min=1)
        share_BE = (share_BTE * real_BT1).sum(1) / length_B1
        scale = experts / (picked * length_B1)
    counts_BE = torch.zeros_like(share_BE).scatter_add_(1, picks_BTK.flatten(1), counted_BTK.flatten(1))
    frequency_BE = counts_BE * scale
    balance_B: Tensor = (frequency_BE * share_BE).sum(-1)
    return balance_B.mean()


def linear_cross_entropy(
    hidden_XD: Tensor, head_VD: Tensor, targets_X: Tensor, weights_X: Tensor, z_weight: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ weight · (cross-entropy + z · logsumexp²) of the logits hidden headᵀ, which are never held all at once.

    Products run in autocast's type if that is on, everything else in float32 or wider.

    Args:
        targets_X: token ids, or IGNORE for tokens that count for nothing.
        weights_X: what each token's loss is multiplied by. No gradient.

    Returns:
        The weighted sum; and for each token, without gradient, its unweighted cross-entropy and its logsumexp² (0 where
        ignored).
    """
    counts_X = targets_X != IGNORE
    if 0 < int(counts_X.sum()) < SPARSE * len(targets_X):
        index_Y = counts_X.nonzero()[:, 0]
        total, *each = linear_cross_entropy(
            hidden_XD[index_Y], head_VD, targets_X[index_Y], weights_X[index_Y], z_weight
        )
        loss_X, square_X = (value_Y.new_zeros(len(targets_X)).index_copy_(0, index_Y, value_Y) for value_Y in each)
        return total, loss_X, square_X
    outputs: tuple[Tensor, Tensor, Tensor] = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_XD, head_VD, targets_X, weights_X, z_weight
    )
    return outputs


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients together with the loss: with p the softmax of a token's logits,

    d logits = weight · (p · (1 + 2 z · logsumexp) - onehot(target)),
    d hidden = d logits · head,  d head = Σ d logitsᵀ · hidden.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_XD: Tensor, head_VD: Tensor, targets_X: Tensor, weights_X: Tensor, z_weight: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, low = torch.promote_types(head_VD.dtype, torch.float32), product_type(head_VD)
        head_low_VD, counts_X = head_VD.to(low), targets_X != IGNORE
        weights_X = weights_X.to(wide) * counts_X
        grad_hidden = torch.empty_like(hidden_XD) if ctx.needs_input_grad[0] else None
        grad_head: Tensor | None = None
        loss_X, lse_X = weights_X.new_empty(len(targets_X)), weights_X.new_empty(len(targets_X))
        # One buffer for all chunks: fresh pages for each would cost more than the arithmetic on them.
        buffer_CV = head_low_VD.new_empty(min(_rows_of(CHUNK_LOGITS, head_VD), len(targets_X)), len(head_VD))
        part_VD = torch.empty_like(head_low_VD) if ctx.needs_input_grad[1] else None
        for rows in _chunks(len(targets_X), len(buffer_CV)):
            hidden_CD = hidden_XD[rows].to(low)
            logits_CV = torch.mm(hidden_CD, head_low_VD.T, out=buffer_CV[: len(hidden_CD)])
            loss_X[rows], lse_X[rows] = _to_gradients(logits_CV, targets_X[rows].clamp(min=0), wide, z_weight)
            # The token's weight goes to the narrow side of each product.
            weights_C1 = weights_X[rows][:, None]
            if grad_hidden is not None:
                grad_hidden[rows] = (logits_CV @ head_low_VD).to(wide) * weights_C1
            if part_VD is not None:
                torch.mm(logits_CV.T, (hidden_CD * weights_C1).to(low), out=part_VD)
                grad_head = part_VD.to(wide, copy=True) if grad_head is None else _add_to(grad_head, part_VD)
        loss_X, square_X = loss_X * counts_X, lse_X.square() * counts_X
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        ctx.mark_non_differentiable(loss_X, square_X)
        total = (weights_X * (loss_X + z_weight * square_X)).sum()
        return total, loss_X, square_X

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        # A loss that is differentiated as it is needs no pass over the head's gradient, nor a copy of it.
        if grad.device.type != "cpu" or float(grad) != 1.0:
            grad_hidden = None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype)
            grad_head = None if grad_head is None else grad_head * grad.to(grad_head.dtype)
        return grad_hidden, grad_head, None, None, None


def _to_gradients(logits_CV: Tensor, targets_C: Tensor, wide: torch.dtype, z_weight: float) -> tuple[Tensor, Tensor]:
    """Overwrite logits with the gradients of cross-entropy + z · logsumexp²; returns cross-entropies and logsumexps."""
    # A CPU does all passes over a few rows while they lie in its cache; elsewhere a launch costs more than a pass.
    step = _rows_of(CACHED_LOGITS, logits_CV.T) if logits_CV.device.type == "cpu" else len(logits_CV)
    losses, logsumexps = [], []
    for rows in _chunks(len(logits_CV), step):
        target_R1 = targets_C[rows, None]
        wide_RV = logits_CV[rows].to(wide)
        target_logit_R1, top_R1 = wide_RV.gather(1, target_R1), wide_RV.amax(-1, keepdim=True)
        p_RV = wide_RV.softmax(-1)  # in one pass; `exp` alone takes longer
        lse_R1 = top_R1 - p_RV.amax(-1, keepdim=True).log()
        if z_weight:
            p_RV.mul_(1 + 2 * z_weight * lse_R1)
        p_RV.scatter_add_(1, target_R1, p_RV.new_full(target_R1.shape, -1.0))
        logits_CV[rows] = p_RV
        losses.append((lse_R1 - target_logit_R1)[:, 0])
        logsumexps.append(lse_R1[:, 0])
    return torch.cat(losses), torch.cat(logsumexps)


def _add_to(sum_VD: Tensor, part_VD: Tensor) -> Tensor:
    """sum += part, of another type: on a CPU that makes a copy first, which is better small."""
    step = _rows_of(CACHED_LOGITS, part_VD.T) if part_VD.device.type == "cpu" else len(part_VD)
    for rows in _chunks(len(part_VD), step):
        sum_VD[rows] += part_VD[rows]
    return sum_VD


def _rows_of(logits: int, head_VD: Tensor) -> int:
    """How many rows make about so many logits: multiples of 16 keep the matrix kernels on their fast path."""
    return max(16, logits // len(head_VD) // 16 * 16)


def _chunks(num_tokens: int, step: int) -> Iterator[slice]:
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))
