"""Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467): scale to unit RMS, then by a learned weight.

    y = r w x      r = 1 / sqrt(mean(x²) + eps)      dx = r w dy - x r³ mean(w dy x)      dw = Σ over rows of r dy x

Shapes: X rows, all leading axes as one; D width; R rows that a core keeps close.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shoal.model.precision import product_type

# Values in float32 at a time, 1 MB: every pass over them but the first reads a core's cache.
CACHED = 1 << 18


class RMSNorm(nn.Module):
    """Maps x [..., D] to the same shape, computed in float32 or wider.

    Returned in the type that products run in (autocast's, else x's own), as products are what follows.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            out: Tensor = _Norm.apply(x, self.weight, self.eps, product_type(x))  # type: ignore[no-untyped-call]
            return out
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight).to(product_type(x))

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class _Norm(torch.autograd.Function):
    """The same by hand for training on a CPU: a few rows at a time, and nothing kept but x and r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float, low: torch.dtype) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_XD = x.reshape(-1, x.shape[-1])
        y_XD, r_X1 = torch.empty_like(x_XD, dtype=low), x_XD.new_empty(len(x_XD), 1, dtype=wide)
        for rows in _rows(x_XD):
            x_RD = x_XD[rows].to(wide)
            r_X1[rows] = torch.rsqrt(x_RD.square().mean(-1, keepdim=True) + eps)
            y_XD[rows] = (x_RD * r_X1[rows]).mul_(weight_D)
        ctx.save_for_backward(x_XD, weight_D, r_X1)
        return y_XD.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x_XD, weight_D, r_X1 = ctx.saved_tensors
        d_y_XD, d_x_XD = d_y.reshape(x_XD.shape), torch.empty_like(x_XD)
        weight_wide_D = weight_D.to(r_X1.dtype)
        d_weight_D = torch.zeros_like(weight_wide_D) if ctx.needs_input_grad[1] else None
        for rows in _rows(x_XD):
            x_RD, d_y_RD, r_R1 = x_XD[rows].to(r_X1.dtype), d_y_XD[rows].to(r_X1.dtype), r_X1[rows]
            product_RD = d_y_RD * x_RD
            if d_weight_D is not None:
                d_weight_D.addmv_(product_RD.T, r_R1[:, 0])
            pull_R1 = torch.mv(product_RD, weight_wide_D)[:, None] * (r_R1**3 / x_XD.shape[-1])
            scaled_RD = torch.mul(d_y_RD, weight_wide_D, out=product_RD).mul_(r_R1)
            d_x_XD[rows] = scaled_RD.addcmul_(x_RD, pull_R1, value=-1)
        return d_x_XD.view(d_y.shape), None if d_weight_D is None else d_weight_D.to(weight_D.dtype), None, None


def _rows(x_XD: Tensor) -> Iterator[slice]:
    step = max(1, CACHED // x_XD.shape[-1])
    for start in range(0, len(x_XD), step):
        yield slice(start, start + step)
