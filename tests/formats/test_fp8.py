"""Block-scaled FP8 against a plain loop over torch's own float8."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from shoal.errors import FileError
from shoal.formats.fp8 import check_scale, dequantise, dequantise_bands, scale_shape

PATH = Path("m.safetensors")


def loop(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    fp8 = torch.from_numpy(weight.view(np.uint8)).view(torch.float8_e4m3fn).float().numpy()
    out = np.empty_like(fp8)
    for row in range(fp8.shape[0]):
        for col in range(fp8.shape[1]):
            out[row, col] = fp8[row, col] * np.float32(scale[row // block[0], col // block[1]])
    return out


def random_fp8(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32) * 100
    return values.astype(ml_dtypes.float8_e4m3fn)


@pytest.mark.parametrize(("shape", "block"), [((256, 128), (128, 128)), ((130, 200), (128, 128)), ((7, 5), (4, 2)),
                                              ((3, 3), (128, 128)), ((64, 33), (1, 32))])  # fmt: skip
def test_dequantise_is_the_plain_loop(shape: tuple[int, int], block: tuple[int, int]) -> None:
    weight = random_fp8(*shape)
    scale = np.random.default_rng(1).uniform(1e-3, 2, scale_shape(shape, block)).astype(np.float32)
    expected = loop(weight, scale, block)
    np.testing.assert_array_equal(dequantise(weight, scale, block), expected)
    for limit in (1, 4 * shape[1] * block[0] * 2, 1 << 30):
        bands = list(dequantise_bands(weight, scale, block, limit))
        np.testing.assert_array_equal(np.concatenate(bands), expected)
    assert len(list(dequantise_bands(weight, scale, block, 1))) == -(-shape[0] // block[0])


def test_scales_of_one_exponent_byte_are_powers_of_two() -> None:
    weight = random_fp8(200, 130)
    power = np.exp2(np.random.default_rng(2).integers(-12, 4, (2, 2))).astype(np.float32)
    as_bytes = power.astype(ml_dtypes.float8_e8m0fnu)
    np.testing.assert_array_equal(dequantise(weight, as_bytes), dequantise(weight, power))
    np.testing.assert_array_equal(dequantise(weight, as_bytes), loop(weight, power, (128, 128)))


@pytest.mark.parametrize(
    ("shape", "scale", "item"),
    [
        ((256, 128), ("F32", (1, 1)), "w.weight_scale_inv"),
        ((257, 128), ("F32", (2, 1)), "w.weight_scale_inv"),
        ((256, 128), ("F32", (2,)), "w.weight_scale_inv"),
        ((256, 128), ("F32", ()), "w.weight_scale_inv"),
        ((256, 128), ("I32", (2, 1)), "w.weight_scale_inv"),
        ((256,), ("F32", (2,)), "w.weight"),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(
    shape: tuple[int, ...], scale: tuple[str, tuple[int, ...]], item: str
) -> None:
    with pytest.raises(FileError) as caught:
        check_scale(PATH, "w.weight", shape, scale, (128, 128))
    assert caught.value.item == item


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8_E8M0"])
def test_scales_that_fit_pass(dtype: str) -> None:
    check_scale(PATH, "w.weight", (257, 128), (dtype, (3, 1)), (128, 128))
