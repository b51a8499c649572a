from __future__ import annotations

import numpy as np
import pytest

from shoal import kernels
from shoal.kernels import reference


def test_matches_reference(isa, shape, random):
    x, weight = random(shape, 0, 3.0), random(shape[-1:], 1, 1.0)
    y = kernels.rms_norm(x, weight, 1e-6)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, reference.rms_norm(x, weight, 1e-6), rtol=2e-6, atol=1e-30)


def test_reference_is_the_formula():
    y = reference.rms_norm(np.array([[3.0, 4.0]], np.float32), np.array([1.0, 2.0], np.float32), 0.0)
    np.testing.assert_allclose(y, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


def test_eps_rules_a_row_of_zeros(isa):
    x, weight = np.zeros((2, 19), np.float32), np.ones(19, np.float32)
    assert not kernels.rms_norm(x, weight, 1e-6).any()
    tiny = np.full((1, 19), 1e-4, np.float32)
    np.testing.assert_allclose(kernels.rms_norm(tiny, weight, 1e-2), tiny / np.sqrt(1e-8 + 1e-2), rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(isa, random):
    x, weight = random((9, 201), 2, 1.0), random((201,), 3, 1.0)
    whole = kernels.rms_norm(x, weight, 1e-6)
    for row in range(9):
        np.testing.assert_array_equal(kernels.rms_norm(x[row], weight, 1e-6), whole[row])


def test_odd_addresses_in_place_and_leading_axes(isa, random, odd_byte):
    x, weight = random((2, 3, 37), 4, 1.0), random((37,), 5, 1.0)
    expected = kernels.rms_norm(x, weight, 1e-6)
    np.testing.assert_array_equal(kernels.rms_norm(odd_byte(x), odd_byte(weight), 1e-6), expected)
    backwards = kernels.rms_norm(x[::-1, :, ::-1], weight[::-1], 1e-6)
    np.testing.assert_allclose(backwards, expected[::-1, :, ::-1], rtol=2e-6)
    y = np.ascontiguousarray(x)
    assert kernels.rms_norm(y, weight, 1e-6, out=y) is y
    np.testing.assert_array_equal(y, expected)


def test_wrong_weight_is_refused(isa):
    with pytest.raises(ValueError, match=r"weight: shape \(4,\), expected \(5,\)"):
        kernels.rms_norm(np.ones((2, 5), np.float32), np.ones(4, np.float32), 1e-6)


@pytest.mark.benchmark
@pytest.mark.parametrize("cols", [576, 2048, 7168])
def test_benchmark(isa, cols, random, speed):
    x, weight = random((64, cols), 0, 1.0), np.ones(cols, np.float32)
    y = np.empty((64, cols), np.float32)
    speed(f"rms_norm {isa} 64x{cols}", 2 * y.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6, out=y))
