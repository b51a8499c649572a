"""Low-rank adapters beside the packed weights: bfloat16 factors that a step adds to the rows that belong to them.

A matrix stays packed as it is; y += scale · B (A x) is added for the rows of an adapter, so requests of several
adapters and of none run in one step (as S-LoRA does on GPUs, arXiv 2311.03285). Attention, dense and shared
feed-forward layers and routed experts can have factors. MLA's W^kv_b runs absorbed, in two halves per head, and so do
its factors: keys go through B_kᵀ and come out of Aᵀ, values go through A and come out of B_v.

Shapes: E matrices of a stack, O out, I in, R rank, N heads, H nope, V value head, C latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from shoal.config import MLAConfig, ModelConfig
from shoal.engine.plan import Plan
from shoal.errors import FileError
from shoal.formats.adapter import WEIGHTS, Adapter, Floats, LowRank, check_adapter, own_ranks, single_expert
from shoal.formats.layout import expected_tensors

Bits = NDArray[np.uint16]


class Factors(NamedTuple):
    """What an adapter adds to one matrix or stack, as the engine takes it.

    Attributes:
        a: bfloat16 [ΣR, I]; b: bfloat16 [ΣR, O], B transposed.
        pieces: int32 [E, 3]: of each matrix, where its directions begin in a and in b, and how many they are.
        scales: float32 [E].
    """

    a: Bits
    b: Bits
    pieces: NDArray[np.int32]
    scales: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedAdapter:
    """An adapter ready for the engine: factors by the names of `Plan.adaptable`."""

    factors: Mapping[str, Factors]

    @property
    def nbytes(self) -> int:
        arrays = {id(array): array.nbytes for one in self.factors.values() for array in (one.a, one.b)}
        return sum(arrays.values())

    def attach(self, plan: Plan, number: int) -> None:
        """Make it adapter `number` of a plan; not while a step runs."""
        for name, one in self.factors.items():
            plan.engine.adapt(plan.adaptable[name], number, one.a, one.b, one.pieces, one.scales)


def pack_adapter(adapter: Adapter, plan: Plan) -> PackedAdapter:
    """Raises FileError where the adapter does not fit the model, or adapts what only a merge can (router, output head);
    names the module."""
    check_adapter(adapter, plan.config)
    factors: dict[str, Factors] = {}
    singles: dict[str, dict[int, LowRank]] = {}
    for target, part in adapter.parts.items():
        if not any(own_ranks(part)):
            continue
        single = single_expert(target)
        if single is not None:
            singles.setdefault(single[0], {})[single[1]] = part
            continue
        for name, one in _factors(target, part, plan.config):
            if name not in plan.adaptable:
                problem = "cannot be adapted beside the model; merge the adapter into it instead"
                raise FileError(adapter.path / WEIGHTS, problem, item=target)
            factors[name] = one
    shapes = expected_tensors(plan.config)
    for name, experts in singles.items():
        if name in factors:
            raise FileError(adapter.path / WEIGHTS, "is adapted twice, as a stack and by single experts", item=name)
        factors[name] = _stack([experts.get(e) for e in range(shapes[f"{name}.weight"][0])])
    for name, one in factors.items():  # bfloat16 reaches as far as float32, but the last value rounds to infinity
        if not all(np.isfinite(bits.view(ml_dtypes.bfloat16)).all() for bits in (one.a, one.b)):
            raise FileError(adapter.path / WEIGHTS, "holds a value that bfloat16 does not reach", item=name)
    return PackedAdapter(factors=factors)


def _factors(target: str, part: LowRank, config: ModelConfig) -> Iterator[tuple[str, Factors]]:
    if target.endswith(".kv_b_proj") and isinstance(config.attention, MLAConfig):
        yield f"{target}/keys", _absorbed_keys(part, config.attention)
        yield f"{target}/values", _absorbed_values(part, config.attention)
    elif target.endswith(".experts.gate_up_proj"):
        both, module = _stack(_each(part)), target.removesuffix("gate_up_proj")
        half = both.b.shape[1] // 2
        yield f"{module}gate_proj", both._replace(b=np.ascontiguousarray(both.b[:, :half]))
        yield f"{module}up_proj", both._replace(b=np.ascontiguousarray(both.b[:, half:]))
    else:
        yield target, _stack(_each(part))


def _each(part: LowRank) -> list[LowRank | None]:
    """The matrices of a stack, without the zeros that gave them equal ranks; None where nothing is left."""
    return [
        LowRank(a=part.a[e : e + 1, :rank], b=part.b[e : e + 1, :, :rank], scale=part.scale) if rank else None
        for e, rank in enumerate(own_ranks(part))
    ]


def _stack(parts: list[LowRank | None]) -> Factors:
    there = [part for part in parts if part is not None]
    assert there, "nothing but zeros"
    ranks = np.array([0 if part is None else part.rank for part in parts], np.int32)
    starts = (np.cumsum(ranks) - ranks).astype(np.int32)
    return Factors(
        a=_bits(np.concatenate([part.a[0] for part in there])),
        b=_bits(np.concatenate([part.b[0].T for part in there])),
        pieces=np.ascontiguousarray(np.stack([starts, starts, ranks], axis=1)),
        scales=np.array([0 if part is None else part.scale for part in parts], np.float32),
    )


def _absorbed_keys(part: LowRank, mla: MLAConfig) -> Factors:
    """Of the stack [N, C, H] that carries queries into the latent space."""
    heads, rank = mla.num_attention_heads, part.rank
    b_NOR = part.b[0].reshape(heads, -1, rank)[:, : mla.qk_nope_head_dim]
    first = np.arange(heads) * rank
    return Factors(
        a=_bits(b_NOR.transpose(0, 2, 1).reshape(heads * rank, -1)), b=_bits(part.a[0]),
        pieces=_pieces(first, 0 * first, rank), scales=np.full(heads, part.scale, np.float32),
    )  # fmt: skip


def _absorbed_values(part: LowRank, mla: MLAConfig) -> Factors:
    """Of the stack [N, V, C] that brings weighted latents back."""
    heads, rank = mla.num_attention_heads, part.rank
    b_NOR = part.b[0].reshape(heads, -1, rank)[:, mla.qk_nope_head_dim :]
    first = np.arange(heads) * rank
    return Factors(
        a=_bits(part.a[0]), b=_bits(b_NOR.transpose(0, 2, 1).reshape(heads * rank, -1)),
        pieces=_pieces(0 * first, first, rank), scales=np.full(heads, part.scale, np.float32),
    )  # fmt: skip


def _pieces(in_a: NDArray[np.int_], in_b: NDArray[np.int_], rank: int) -> NDArray[np.int32]:
    return np.stack([in_a, in_b, np.full(len(in_a), rank)], axis=1).astype(np.int32)


def _bits(values: Floats) -> Bits:
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
