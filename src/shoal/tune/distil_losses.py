"""What distillation minimises, a few hundred tokens at a time, so that logits over the vocabulary are never all held.

Shapes: X tokens, C tokens of a chunk, D model, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_LOGITS = 1 << 24
TINY = 1e-8


def kept_divergence(hidden_XD: Tensor, head_VD: Tensor, ids_XK: Tensor, logprobs_XK: Tensor) -> Tensor:
    """Σ over tokens of KL(teacher‖student), with everything the teacher did not keep counted as one more token.

    A plain sum over the kept tokens would be lowest for a student that puts no probability elsewhere; the bucket of the
    rest makes it zero exactly where the student agrees.
    """

    def part(hidden_CD: Tensor, ids_CK: Tensor, logprobs_CK: Tensor) -> Tensor:
        student_CV = _log_softmax(hidden_CD, head_VD)
        student_CK = student_CV.gather(1, ids_CK)
        teacher_CK = logprobs_CK.exp()
        rest_C = (1 - teacher_CK.sum(1)).clamp(min=0.0)
        student_rest_C = (1 - student_CK.exp().sum(1)).clamp(min=TINY).log()
        kept_C = (teacher_CK * (logprobs_CK - student_CK)).sum(1)
        return (kept_C + rest_C * (rest_C.clamp(min=TINY).log() - student_rest_C)).sum()

    return _sum(part, head_VD, hidden_XD, ids_XK, logprobs_XK)


def reverse_divergence(hidden_XD: Tensor, head_VD: Tensor, teacher_XV: Tensor) -> Tensor:
    """Σ over tokens of KL(student‖teacher) over the whole vocabulary, from the teacher's log-probabilities.

    Over the student's own samples this is what makes it give up what the teacher would not say (MiniLLM, arXiv
    2306.08543; GKD, arXiv 2306.13649).
    """

    def part(hidden_CD: Tensor, teacher_CV: Tensor) -> Tensor:
        student_CV = _log_softmax(hidden_CD, head_VD)
        return (student_CV.exp() * (student_CV - teacher_CV)).sum()

    return _sum(part, head_VD, hidden_XD, teacher_XV)


def _log_softmax(hidden_CD: Tensor, head_VD: Tensor) -> Tensor:
    return F.log_softmax(F.linear(hidden_CD, head_VD.to(hidden_CD.dtype)).float(), dim=-1)


def _sum(part: object, head_VD: Tensor, *rows: Tensor) -> Tensor:
    """The sum of `part` over chunks of rows; each chunk's logits are made again for the backward pass."""
    step = max(16, CHUNK_LOGITS // len(head_VD))
    total = rows[0].new_zeros((), dtype=torch.float32)
    for chunk in zip(*(torch.split(row, step) for row in rows), strict=True):
        total = total + checkpoint(part, *chunk, use_reentrant=False)
    return total
