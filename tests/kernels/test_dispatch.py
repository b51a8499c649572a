"""The choice of instruction set, the fallback, and what the Python face refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from shoal import kernels
from shoal.errors import ConfigError


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_scalar_is_always_there_and_last():
    assert kernels.available_isas()[-1] in ("scalar", "numpy")
    assert kernels.selected_isa() in kernels.available_isas()


@pytest.mark.parametrize("name", kernels.available_isas())
def test_the_setting_forces_one(name):
    done = _python("from shoal import kernels; print(kernels.selected_isa())", SHOAL_ISA=name)
    assert (done.stdout, done.returncode) == (f"{name}\n", 0), done.stderr


def test_without_the_setting_the_best_is_chosen():
    done = _python("from shoal import kernels; print(kernels.selected_isa())", SHOAL_ISA="")
    assert done.stdout.strip() == kernels.available_isas()[0], done.stderr


def test_an_unknown_name_is_an_error():
    before = kernels.selected_isa()
    with pytest.raises(ConfigError, match=r"SHOAL_ISA: 'mmx' is not available here; choose from .*"):
        kernels.select_isa("mmx")
    assert kernels.selected_isa() == before
    done = _python("from shoal import kernels; kernels.selected_isa()", SHOAL_ISA="mmx")
    assert done.returncode == 1
    assert "'mmx' is not available here" in done.stderr


def test_numpy_stands_in_with_one_warning():
    code = """
import sys
sys.modules["shoal.kernels._native"] = None  # what an absent module looks like to import
import numpy as np
from shoal import kernels
x = np.arange(6, dtype=np.float32).reshape(2, 3)
print(kernels.available_isas(), kernels.softmax(x).sum(), kernels.silu_mul(x, x)[0, 0])
y = kernels.rms_norm(x, x[0], 1e-6, out=x)
print(y is x, round(float(y[1, 2]), 4))
"""
    done = _python(code, SHOAL_ISA="")
    assert done.stdout == "['numpy'] 2.0 0.0\nTrue 2.4495\n", done.stderr
    assert done.stderr.count("RuntimeWarning") == 1


def test_importing_kernels_loads_no_extension():
    done = _python("import sys, shoal.kernels; print('shoal.kernels._native' in sys.modules)")
    assert done.stdout == "False\n"


def test_wrong_inputs_are_named():
    x = np.ones((2, 5), np.float32)
    with pytest.raises(TypeError, match="x: expected a float32 array, got float64"):
        kernels.softmax(np.ones((2, 5)))
    with pytest.raises(TypeError, match="x: expected a float32 array, got list"):
        kernels.softmax([1.0])
    with pytest.raises(ValueError, match="x: expected at least one axis"):
        kernels.softmax(np.array(1.0, np.float32))
    with pytest.raises(ValueError, match=r"out: shape \(5, 2\), expected \(2, 5\)"):
        kernels.softmax(x, out=x.T)
    with pytest.raises(ValueError, match="out: must be writeable with contiguous rows"):
        kernels.softmax(x, out=np.ones((5, 2), np.float32).T)
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out: must be writeable"):
        kernels.softmax(x, out=frozen)


def test_an_output_askew_over_its_input_is_right(isa):
    """The kernels allow y == x only; the face copies where the overlap is any other."""
    block = np.random.default_rng(0).normal(size=(6, 40)).astype(np.float32)
    expected = kernels.softmax(block[:-1].copy())
    kernels.softmax(block[:-1], out=block[1:])
    np.testing.assert_array_equal(block[1:], expected)


def test_the_binding_itself_checks_shapes(isa):
    native = pytest.importorskip("shoal.kernels._native")
    x, w = np.ones((2, 5), np.float32), np.ones(5, np.float32)
    with pytest.raises(ValueError, match="arrays differ in shape"):
        native.softmax(x, 1.0, np.ones((2, 6), np.float32))
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        native.softmax(x, 1.0, np.ones((5, 2), np.float32).T)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        native.rms_norm(x, w[:4], 1e-6, x)
    with pytest.raises(TypeError):  # no silent conversion
        native.rms_norm(x.astype(np.float64), w, 1e-6, x)
