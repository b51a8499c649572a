"""What training minimises: next-token loss, the losses of the MTP depths, router balance, and a pull on the logits.

The output head is the widest matrix of a small model, and its logits [X, V] would be the largest tensor of a step. They
are made for a few hundred tokens at a time, and turned into gradients before the next few are made.

Shapes: B batch, T tokens of a row, X = B · T tokens, C tokens of a chunk, D model, V vocabulary, E experts, K picked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shoal.config import MoEConfig
from shoal.errors import ConfigError
from shoal.model import Model, Routing
from shoal.train.batches import IGNORE

# Logits in memory at a time: 64 MB in float32.
CHUNK_LOGITS = 1 << 24
# Share of tokens that count below which the others are left out rather than multiplied by 0.
SPARSE = 0.9


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights of the terms beside the next-token loss; 0 leaves a term out.

    Attributes:
        mtp_weight: λ of DeepSeek-V3 §2.2, divided among the MTP depths. Published: 0.3, in the last third 0.1.
        balance_weight: α of the sequence-wise balance loss, DeepSeek-V3 §2.1.2. Published: 0.0001.
        z_weight: of the mean square of log Σ exp(logits), which keeps logits from drifting (PaLM, arXiv 2204.02311 §5).
    """

    mtp_weight: float = 0.3
    balance_weight: float = 1e-4
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mtp_weight", "balance_weight", "z_weight"):
            if not 0.0 <= getattr(self, name) <= 100.0:
                raise ConfigError(name, f"must lie between 0 and 100, got {getattr(self, name)!r}")


class TextBatch(NamedTuple):
    """Rows of text, as `batches.Batch` but tensors.

    Attributes:
        targets_BT: the token after each one, or IGNORE where there is none (the end of a document).
        documents_BT: a number for each token; tokens see only those of the same document. None: a row is one document.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    documents_BT: Tensor | None = None


class Losses(NamedTuple):
    """What one forward pass costs.

    Attributes:
        total: what to differentiate.
        parts: its terms before weighting, detached scalars: `next` always, then `mtp`, `balance` and `z` where present.
        routings: where the tokens went, by layer index, MTP layers included.
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
    if settings.balance_weight > 0 and routings and model.config.moe is not None:
        rows = len(tokens_BT)
        balance = torch.stack([balance_loss(r, model.config.moe, rows) for r in routings.values()]).sum()
        balance = balance * (rows / (num_rows or rows))
        total = total + settings.balance_weight * balance
        parts["balance"] = balance.detach()
    return Losses(total, parts, routings)


def targets_further(targets_BT: Tensor, documents_BT: Tensor | None, depth: int) -> Tensor:
    """Targets of MTP depth k, [B, T - k]: state i is asked for token i + k + 1, if its document still has one."""
    targets = targets_BT[:, depth:]
    if documents_BT is None:
        return targets
    return targets.masked_fill(documents_BT[:, depth:] != documents_BT[:, :-depth], IGNORE)


def balance_loss(routing: Routing, moe: MoEConfig, num_rows: int) -> Tensor:
    """Sequence-wise balance of one layer (DeepSeek-V3 §2.1.2, eq. 17-20), averaged over the rows of the batch.

    Σ_i f_i P_i for every row, where f_i = E / (K T) · (tokens that picked expert i) has no gradient and P_i is the mean
    over the row of the scores divided by their sum. 1 when even, E / K when all tokens pick the same experts.
    """
    experts, picked = moe.n_routed_experts, moe.num_experts_per_tok
    scores_BTE = routing.scores_TE.view(num_rows, -1, experts)
    share_BE = (scores_BTE / scores_BTE.sum(-1, keepdim=True)).mean(1)
    picks_BX = routing.indices_TK.reshape(num_rows, -1)
    ones = torch.ones_like(picks_BX, dtype=share_BE.dtype)
    counts_BE = torch.zeros_like(share_BE).scatter_add_(1, picks_BX, ones)
    frequency_BE = counts_BE * (experts / (picked * scores_BTE.shape[1]))
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
        wide = torch.promote_types(head_VD.dtype, torch.float32)
        head_low_VD = head_VD.to(_product_type(head_VD))
        weights_X = torch.where(targets_X == IGNORE, 0.0, weights_X.to(wide))
        grad_hidden = torch.zeros_like(hidden_XD) if ctx.needs_input_grad[0] else None
        grad_head = torch.zeros_like(head_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        loss_X, square_X = weights_X.new_zeros(len(targets_X)), weights_X.new_zeros(len(targets_X))
        for rows in _chunks(targets_X, len(head_VD)):
            hidden_CD = hidden_XD[rows].to(head_low_VD.dtype)
            logits_CV = (hidden_CD @ head_low_VD.T).to(wide)
            target_C1 = targets_X[rows].clamp(min=0)[:, None]
            target_logit_C = logits_CV.gather(1, target_C1)[:, 0]
            logp_CV = torch.log_softmax(logits_CV, dim=-1)
            del logits_CV
            loss_C = -logp_CV.gather(1, target_C1)[:, 0]
            lse_C = target_logit_C + loss_C
            counts_C = targets_X[rows] != IGNORE
            loss_X[rows], square_X[rows] = loss_C * counts_C, lse_C.square() * counts_C
            if grad_hidden is None and grad_head is None:
                continue
            d_CV = logp_CV.exp_()
            if z_weight:
                d_CV.mul_((1 + 2 * z_weight * lse_C)[:, None])
            d_CV.scatter_add_(1, target_C1, d_CV.new_full((len(d_CV), 1), -1.0))
            d_CV = d_CV.to(head_low_VD.dtype)
            # The token's weight goes to the narrow side of each product.
            weights_C1 = weights_X[rows][:, None]
            if grad_hidden is not None:
                grad_hidden[rows] = ((d_CV @ head_low_VD).to(wide) * weights_C1).to(grad_hidden.dtype)
            if grad_head is not None:
                grad_head += d_CV.T @ (hidden_CD * weights_C1).to(head_low_VD.dtype)
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(head_VD.dtype))
        ctx.mark_non_differentiable(loss_X, square_X)
        total = (weights_X * (loss_X + z_weight * square_X)).sum()
        return total, loss_X, square_X

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        return (
            None if grad_hidden is None else grad_hidden * grad.to(grad_hidden.dtype),
            None if grad_head is None else grad_head * grad,
            None,
            None,
            None,
        )


def _product_type(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    # float64 is for checking gradients: autocast leaves it alone, and so do we.
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _chunks(targets_X: Tensor, vocabulary: int) -> Iterator[slice | Tensor]:
    """All tokens in turn; where many count for nothing, as the questions in tuning, only those that count."""
    step = max(16, CHUNK_LOGITS // vocabulary // 16 * 16)
    counts_X = targets_X != IGNORE
    if float(counts_X.float().mean()) < SPARSE:
        yield from torch.split(counts_X.nonzero()[:, 0], step)
        return
    for start in range(0, len(targets_X), step):
        yield slice(start, min(start + step, len(targets_X)))
