"""What the kernel tests share: the `isa` fixture and the shapes every kernel must bear."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

from shoal import kernels

F32 = npt.NDArray[np.float32]

# Rows × columns: nothing, one, odd, one short of and one past each vector width, and a real model's width.
SHAPES = [
    (0, 5),
    (1, 1),
    (2, 3),
    (3, 7),
    (1, 8),
    (2, 9),
    (5, 15),
    (1, 16),
    (2, 17),
    (3, 33),
    (4, 63),
    (2, 129),
    (1, 7168),
]


@pytest.fixture(params=kernels.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test that asks for it runs once per instruction set of this machine, scalar always among them."""
    before = kernels.selected_isa()
    kernels.select_isa(request.param)
    assert kernels.selected_isa() == request.param
    yield request.param
    kernels.select_isa(before)


@pytest.fixture(params=SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def _random(shape: tuple[int, ...], seed: int, spread: float) -> F32:
    """Normal numbers, laid out so that neither the start nor the rows fall on a vector boundary."""
    block = np.random.default_rng(seed).normal(0, spread, (*shape[:-1], shape[-1] + 3)).astype(np.float32)
    return block[..., 1:-2]


def _odd_byte(a: F32) -> F32:
    """The same values starting at an odd address, as a tensor in a mapped file may."""
    raw = np.empty(a.nbytes + 1, np.uint8)
    out = np.frombuffer(raw, np.float32, a.size, 1).reshape(a.shape)
    out[...] = a
    return out


@pytest.fixture
def random() -> Callable[[tuple[int, ...], int, float], F32]:
    return _random


@pytest.fixture
def odd_byte() -> Callable[[F32], F32]:
    return _odd_byte


@pytest.fixture
def speed() -> Callable[[str, int, Callable[[], object]], None]:
    """speed(label, bytes moved, call) prints microseconds and GB/s, the best of several runs."""

    def measure(label: str, moved: int, call: Callable[[], object]) -> None:
        best = float("inf")
        for _ in range(7):
            start = time.perf_counter()
            for _ in range(20):
                call()
            best = min(best, (time.perf_counter() - start) / 20)
        print(f"{label}: {best * 1e6:.1f} us, {moved / best / 1e9:.1f} GB/s")

    return measure
