"""Weights that tuning reads but never changes, kept in 8 or 4 bits and widened where they are used.

Each row is cut into groups of 32 columns with a scale of their own (absmax rounding). Forward and backward widen one
matrix at a time, so the memory of a step does not grow with the model; the base of a 16 B model takes 9 GB in int4.

Shapes: E experts, O out, I in, T rows of activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import ConfigError
from shoal.formats.checkpoint import Array, Checkpoint, LazyTensor
from shoal.model.load import empty_model, fill, to_torch
from shoal.model.model import Model
from shoal.model.moe import StackedLinear

GROUP = 32
BITS = {"int8": 8, "int4": 4}
# What stays as it is: small, or read by rows (the embedding), or sensitive (the router).
KEPT = ("embed_tokens", "lm_head", "mlp.gate", "eh_proj")


class FrozenMatrix(nn.Module):
    """One matrix [O, I] or a stack [E, O, I] in `bits`; `widen(e)` gives the values of one matrix."""

    codes: Tensor
    scales: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__()
        self.shape, self.bits, self.dtype = shape, bits, dtype
        *stack, rows, cols = shape
        self.groups = -(-cols // GROUP)
        width = self.groups * GROUP
        self.register_buffer("codes", torch.empty(*stack, rows, width * bits // 8, dtype=torch.int8), persistent=False)
        self.register_buffer("scales", torch.empty(*stack, rows, self.groups, dtype=torch.float16), persistent=False)
        self.bias = bias

    @torch.no_grad()
    def fill(self, source: LazyTensor) -> None:
        """Read the tensor, one matrix of the stack at a time."""
        codes, scales = self.codes.view(-1, self.codes.shape[-1]), self.scales.view(-1, self.groups)
        at = 0
        for chunk in _row_chunks(source):
            rows = to_torch(chunk).float()
            codes[at : at + len(rows)], scales[at : at + len(rows)] = quantise(rows, self.bits)
            at += len(rows)
        source.release()

    def widen(self, expert: int | None = None) -> Tensor:
        """[O, I] in `dtype`."""
        codes, scales = (self.codes, self.scales) if expert is None else (self.codes[expert], self.scales[expert])
        return widen(codes, scales, self.bits, self.dtype)[:, : self.shape[-1]]

    @property
    def weight(self) -> Tensor:
        return self.widen()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, None)

    def linear(self, x: Tensor, expert: int | None) -> Tensor:
        """x W^T of one matrix; the backward pass widens W anew rather than keeping it."""
        out: Tensor = _Frozen.apply(x, self, expert)  # type: ignore[no-untyped-call]
        return out if self.bias is None else out + self.bias


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: FrozenMatrix, expert: int | None) -> Tensor:
        ctx.matrix, ctx.expert = matrix, expert
        return F.linear(x, matrix.widen(expert).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ ctx.matrix.widen(ctx.expert).to(grad.dtype), None, None


def quantise(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Float [O, I] to codes int8 [O, width · bits / 8] and scales float16 [O, groups]. Four bits: two codes a byte, the
    even column low."""
    high = 2 ** (bits - 1) - 1
    padded = F.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    scales = (padded.abs().amax(-1) / high).half()
    steps = scales.float().masked_fill(scales == 0, 1.0)
    codes = (padded / steps[..., None]).round().clamp(-high, high).to(torch.int8).flatten(1)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return codes, scales


def widen(codes: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantise`, [O, width]."""
    if bits == 4:
        codes = torch.stack(((codes << 4) >> 4, codes >> 4), dim=-1).flatten(1)
    values = codes.to(dtype).view(len(codes), -1, GROUP) * scales.to(dtype)[..., None]
    return values.flatten(1)


def load_base(checkpoint: Checkpoint, *, weights: str, dtype: torch.dtype) -> Model:
    """A model to tune adapters on, with every weight frozen.

    Args:
        weights: `keep` for all weights in `dtype`, `int8` or `int4` for the large matrices in that many bits.

    Raises:
        ConfigError: `weights` is unknown.
        FileError: a tensor is missing or damaged.
    """
    if weights != "keep" and weights not in BITS:
        raise ConfigError("base", f"{weights!r} is not one of keep, {', '.join(BITS)}")
    checkpoint.check_complete()
    with torch.device("meta"):
        model = Model(checkpoint.config).to(dtype)
    frozen: dict[str, FrozenMatrix] = {}
    if weights in BITS:
        frozen = _freeze(model, BITS[weights], dtype)
    model = empty_model(checkpoint.config, dtype=dtype) if not frozen else _materialise(model)
    for name, module in frozen.items():
        module.fill(checkpoint.tensors[f"{name}.weight"])
    for name, target in model.state_dict().items():
        fill(target, checkpoint.tensors[name])
    return model.requires_grad_(False)


def _freeze(model: Model, bits: int, dtype: torch.dtype) -> dict[str, FrozenMatrix]:
    """Put a frozen matrix in place of every large one; returns them by name."""
    out = {}
    for name, module in list(model.named_modules()):
        if not isinstance(module, (nn.Linear, StackedLinear)) or name.endswith(KEPT):
            continue
        bias = module.bias if isinstance(module, nn.Linear) else None
        parent, _, leaf = name.rpartition(".")
        with torch.device("cpu"):
            out[name] = FrozenMatrix(tuple(module.weight.shape), bits, dtype, bias)
        setattr(model.get_submodule(parent), leaf, out[name])
    return out


def _materialise(model: Model) -> Model:
    """Give memory to what is still on the meta device: everything but the frozen matrices."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="cpu")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=torch.float32))
    return model


def _row_chunks(source: LazyTensor) -> Iterator[Array]:
    for chunk in source.chunks():
        yield chunk.reshape(-1, chunk.shape[-1])
