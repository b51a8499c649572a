from __future__ import annotations

import numpy as np
import pytest

from shoal import kernels
from shoal.kernels import reference


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_matches_reference(isa, shape, spread, random):
    gate, up = random(shape, 0, spread), random(shape, 1, 1.0)
    y = kernels.silu_mul(gate, up)
    np.testing.assert_allclose(y, reference.silu_mul(gate, up), rtol=2e-6, atol=1e-30)


def test_reference_is_the_formula():
    y = reference.silu_mul(np.array([[np.log(3.0)]], np.float32), np.array([[2.0]], np.float32))
    np.testing.assert_allclose(y, [[2 * np.log(3.0) * 0.75]], rtol=1e-6)


def test_extremes(isa):
    gate = np.array([[-1e30, -200.0, -0.0, 0.0, 200.0, 1e30, np.inf, np.nan]], np.float32)
    y = kernels.silu_mul(gate, np.full_like(gate, 2.0))
    np.testing.assert_array_equal(y, np.array([[0, 0, 0, 0, 400.0, 2e30, np.inf, np.nan]], np.float32))


def test_fused_halves_odd_addresses_and_in_place(isa, random, odd_byte):
    gate_up = random((3, 2 * 37), 4, 2.0)
    gate, up = gate_up[:, :37], gate_up[:, 37:]
    expected = kernels.silu_mul(gate.copy(), up.copy())
    np.testing.assert_array_equal(kernels.silu_mul(gate, up), expected)
    np.testing.assert_array_equal(kernels.silu_mul(odd_byte(gate), odd_byte(up)), expected)
    np.testing.assert_array_equal(kernels.silu_mul(gate.reshape(3, 1, 37), up.reshape(3, 1, 37)), expected[:, None])
    assert kernels.silu_mul(gate, up, out=gate) is gate
    np.testing.assert_array_equal(gate, expected)


def test_different_shapes_are_refused(isa):
    with pytest.raises(ValueError, match=r"up: shape \(2, 4\), expected \(2, 5\)"):
        kernels.silu_mul(np.ones((2, 5), np.float32), np.ones((2, 4), np.float32))


@pytest.mark.benchmark
@pytest.mark.parametrize("cols", [1408, 18432])
def test_benchmark(isa, cols, random, speed):
    gate, up = random((16, cols), 0, 1.0), random((16, cols), 1, 1.0)
    y = np.empty((16, cols), np.float32)
    speed(f"silu_mul {isa} 16x{cols}", 3 * y.nbytes, lambda: kernels.silu_mul(gate, up, out=y))
