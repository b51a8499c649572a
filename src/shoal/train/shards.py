"""Tensors that several processes hold in pieces (DTensor), seen from one of them.

Shapes: F rows, D columns of a matrix.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mesh_of(tensor: Tensor) -> Any:
    """The mesh of processes that a tensor is cut over, or None if it is a plain one."""
    # Whoever has a DTensor has imported its module, which takes a while that a process alone need not spend.
    module = sys.modules.get("torch.distributed.tensor")
    return tensor.device_mesh if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor: the same memory. A plain tensor is its own piece."""
    return tensor if mesh_of(tensor) is None else tensor.to_local()  # type: ignore[attr-defined]


def by_mesh(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those that are cut over the same processes together: operators on lists take no others."""
    out: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        out.setdefault(mesh_of(tensor), []).append(tensor)
    return list(out.values())


def rounds(matrices: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in the groups that `on_whole_matrices` takes: as many matrices as processes, anything else singly.

    Matrices of a size come together, so that processes get equal work.
    """
    cut = [matrix for matrix in matrices if _is_cut(matrix)]
    yield from ([matrix] for matrix in matrices if not _is_cut(matrix))
    for same in by_mesh(sorted(cut, key=lambda matrix: matrix.shape)):
        size = mesh_of(same[0]).size()
        yield from (same[start : start + size] for start in range(0, len(same), size))


def on_whole_matrices(like: Sequence[Tensor], pieces: list[Tensor], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """`work` on whole matrices of which every process has rows, each matrix done by one; our rows of the results.

    Matrix i goes to process i: one exchange brings its rows there, another takes the results home. Stacks of matrices
    [E, F, D] are cut between matrices and need none.

    Args:
        like: a round of `rounds`.
        pieces: this process's rows of what to work on.
    """
    if not _is_cut(like[0]):
        return [work(piece) if piece.numel() else piece for piece in pieces]
    mesh = mesh_of(like[0])
    group, size, mine = mesh.get_group(), mesh.size(), mesh.get_local_rank()
    height, width = like[mine].shape if mine < len(like) else (0, 0)
    sent = [piece.numel() for piece in pieces] + [0] * (size - len(pieces))
    # Rows are dealt out as torch.chunk does: the first processes have more, the last may have none.
    share = -(-height // size)
    got = [max(0, min(share, height - share * rank)) * width for rank in range(size)]
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    whole = flat.new_empty(sum(got))
    dist.all_to_all_single(whole, flat, got, sent, group=group)
    if mine < len(like):
        whole = work(whole.view(height, width)).reshape(-1).contiguous()
    dist.all_to_all_single(flat, whole, sent, got, group=group)
    return [part.view_as(piece) for part, piece in zip(torch.split(flat, sent[: len(pieces)]), pieces, strict=True)]


def _is_cut(tensor: Tensor) -> bool:
    """Whether rows of a matrix lie with several processes."""
    mesh = mesh_of(tensor)
    return mesh is not None and tensor.dim() == 2 and mesh.size() > 1
