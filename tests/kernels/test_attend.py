"""Attention over cached keys, 16 queries at a time."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from shoal.kernels import packed
from shoal.kernels import reference_packed as reference

DTYPES = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}
# Queries, keys, key width, value width: one, odd, around blocks of 4, 8 and 64 keys, around every vector width.
SHAPES = [
    (1, 1, 2, 1),
    (2, 7, 16, 5),
    (3, 8, 6, 8),
    (4, 9, 64, 64),
    (5, 63, 10, 33),
    (7, 64, 48, 15),
    (8, 65, 128, 128),
    (9, 130, 96, 17),
    (13, 201, 40, 31),
    (16, 40, 576, 512),
]


def _inputs(kind, shape, random, spread=1.0):
    """Queries, keys and values of the cache's type, and the last key that each query sees: all, some or one."""
    queries, keys, key_width, value_width = shape
    parts = [random((n, w), seed, spread) for seed, (n, w) in enumerate(((queries, key_width), (keys, key_width)))]
    parts[0] = parts[0] * np.float32(key_width**-0.5)
    values = random((keys, value_width), 2, 1.0)
    last_key = np.random.default_rng(3).integers(0, keys, queries).astype(np.int32)
    last_key[-1] = keys - 1
    return *(np.ascontiguousarray(a).astype(DTYPES[kind]) for a in (*parts, values)), last_key


def _softmax_attention(queries, keys, values, last_key):
    """The definition, all keys at once and in double precision: result, and weighted magnitude of the values."""
    scores = queries.astype(np.float64) @ keys.T.astype(np.float64)
    scores[np.arange(keys.shape[0]) > last_key[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights @ values.astype(np.float64), weights @ np.abs(values.astype(np.float64))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(isa, kind, shape, random):
    inputs = _inputs(kind, shape, random)
    ours, truth = packed.attend(*inputs), reference.attend(*inputs)
    np.testing.assert_allclose(ours.top, truth.top, rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours.total, truth.total, rtol=1e-5)
    error, magnitude = np.abs(ours.result() - truth.result()), _softmax_attention(*inputs)[1]
    # In bf16 a weight may round the other way now and then, by 2^-8 of itself.
    assert (error <= (1e-5 if kind == "f32" else 2.0**-8) * magnitude).all()
    assert np.median(error / np.maximum(magnitude, 1e-30)) < 1e-5


@pytest.mark.parametrize("kind", DTYPES)
def test_reference_is_softmax_attention(kind, random):
    for shape in SHAPES:
        inputs = _inputs(kind, shape, random)
        truth, magnitude = _softmax_attention(*inputs)
        error = np.abs(reference.attend(*inputs).result() - truth)
        assert (error <= (1e-6 if kind == "f32" else 2.0**-8) * magnitude).all()


@pytest.mark.parametrize("kind", DTYPES)
def test_a_query_does_not_depend_on_its_neighbours(isa, kind, random):
    """Bit for bit, whatever lane it stands in and whatever else the block holds."""
    queries, keys, values, last_key = _inputs(kind, (16, 150, 34, 21), random)
    whole = packed.attend(queries, keys, values, last_key).result()
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_array_equal(packed.attend(queries[order], keys, values, last_key[order]).result(), whole[order])
    for q in range(16):
        alone = packed.attend(queries[q : q + 1], keys, values, last_key[q : q + 1])
        np.testing.assert_array_equal(alone.result()[0], whole[q])


@pytest.mark.parametrize("kind", DTYPES)
def test_blocks_may_come_in_several_calls(isa, kind, random):
    queries, keys, values, last_key = _inputs(kind, (6, 150, 20, 19), random)
    whole = packed.attend(queries, keys, values, last_key)
    state = None
    for first in range(0, 150, 64):
        block = slice(first, first + 64)
        state = packed.attend(queries, keys[block], values[block], last_key, first, state)
    for name in ("top", "total", "out"):
        np.testing.assert_array_equal(getattr(state, name), getattr(whole, name))


@pytest.mark.parametrize("kind", DTYPES)
def test_hidden_keys_weigh_exactly_nothing(isa, kind, random):
    """Also where a whole block lies beyond a query, before or after the keys that it sees."""
    queries, keys, values, last_key = _inputs(kind, (10, 100, 20, 19), random)
    last_key[:] = [0, 1, 30, 62, 63, 64, 65, 98, 99, -1]
    whole = packed.attend(queries, keys, values, last_key)
    assert all(np.isfinite(a).all() for a in (whole.top, whole.total, whole.out))
    for q, last in enumerate(last_key[:-1]):
        row = slice(q, q + 1)
        short = packed.attend(queries[row], keys[: last + 1], values[: last + 1], last_key[row])
        if (last + 1) % 2 == 0 or kind == "f32":
            np.testing.assert_array_equal(whole.result()[q], short.result()[0])
        else:  # the last key then pairs with a hidden one rather than with nothing
            np.testing.assert_allclose(whole.result()[q], short.result()[0], rtol=1e-5, atol=1e-6)
    # What a lane holds that has seen nothing yet, its first key wipes out.
    first = packed.attend(queries[9:], keys, values, last_key[9:])
    later = packed.attend(queries[9:], keys, values, np.array([299], np.int32), 200, first)
    np.testing.assert_array_equal(
        later.result(), packed.attend(queries[9:], keys, values, np.array([299], np.int32), 200).result()
    )


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("first_key", [0, 64, 10**6, 2**30])
def test_positions_far_from_zero(isa, kind, first_key, random):
    queries, keys, values, last_key = _inputs(kind, (5, 60, 16, 16), random)
    expected = packed.attend(queries, keys, values, last_key).result()
    ours = packed.attend(queries, keys, values, last_key + np.int32(first_key), first_key).result()
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("kind", DTYPES)
def test_values_inside_the_keys_and_strides(isa, kind, random):
    """The absorbed form of MLA: the latent is the head of the key; rows lie apart in a page, off vector boundaries."""
    queries, keys, _, last_key = _inputs(kind, (12, 77, 36, 1), random)
    page = np.full((77, 45), 1e4, keys.dtype)
    page[:, 3:39] = keys
    inside = page[:, 3:39]
    ours = packed.attend(queries, inside, inside[:, :29], last_key)
    expected = packed.attend(queries, keys, keys[:, :29].copy(), last_key)
    np.testing.assert_array_equal(ours.result(), expected.result())


@pytest.mark.parametrize("kind", DTYPES)
def test_extremes(isa, kind):
    dtype = DTYPES[kind]
    queries = np.array([[0.0, 0.0], [2e4, 0.0], [-2e4, 0.0], [1e-30, 0.0]], dtype)
    keys = np.zeros((70, 2), dtype)
    keys[:, 0] = np.arange(70)
    values = (np.arange(70)[:, None] * np.ones(20)).astype(dtype)
    last_key = np.full(4, 69, np.int32)
    y = packed.attend(queries, keys, values, last_key).result()
    np.testing.assert_allclose(y[[0, 3]], 34.5, rtol=2e-3)
    np.testing.assert_array_equal(y[1], np.full(20, 69, np.float32))
    np.testing.assert_array_equal(y[2], np.zeros(20, np.float32))
    huge = (values.astype(np.float32) * np.float32(1e35)).astype(dtype)
    assert np.isfinite(packed.attend(queries, keys, huge, last_key).result()).all()
    values[10, 0] = np.nan
    hidden = np.array([9, 10, 9, 9], np.int32)
    y = packed.attend(queries, keys[:12], values[:12], hidden).result()
    assert np.isnan(y[1, 0]) and np.isfinite(y[:, 1:]).all()


def test_wrong_inputs_are_named(isa, random):
    queries, keys, values, last_key = _inputs("f32", (3, 10, 8, 4), random)
    with pytest.raises(TypeError, match="expected three float32 or three bfloat16 arrays"):
        packed.attend(queries, keys, values.astype(ml_dtypes.bfloat16), last_key)
    with pytest.raises(TypeError, match="expected three float32 or three bfloat16 arrays"):
        packed.attend(*(a.astype(np.float64) for a in (queries, keys, values)), last_key)
    with pytest.raises(ValueError, match="queries: 17 with 17 last keys, expected at most 16 pairs"):
        packed.attend(np.ones((17, 8), np.float32), keys, values, np.zeros(17, np.int32))
    with pytest.raises(ValueError, match="queries: 3 with 2 last keys"):
        packed.attend(queries, keys, values, last_key[:2])
    odd = [a.astype(ml_dtypes.bfloat16) for a in (queries[:, :7], keys[:, :7], values)]
    with pytest.raises(ValueError, match="keys: 7 columns, expected an even number with bfloat16"):
        packed.attend(*odd, last_key)


def test_the_binding_itself_checks_shapes(isa):
    native = pytest.importorskip("shoal.kernels._native")
    lane, last = np.zeros(16, np.float32), np.zeros(16, np.int32)

    def call(queries=(8, 16), keys=(10, 8), values=(10, 4), out=(3, 4), last_key=last, top=lane):
        arrays = [np.zeros(shape, np.float32) for shape in (queries, keys, values)]
        native.attend_f32(*arrays, last_key, 0, top, lane, np.zeros(out, np.float32))

    call()
    for wrong, problem in [
        ({"queries": (9, 16)}, "queries do not fit the keys"),
        ({"queries": (16, 8)}, "queries do not fit the keys"),
        ({"keys": (65, 8), "values": (65, 4)}, "at most 64 keys"),
        ({"values": (9, 4)}, "at most 64 keys, and as many values"),
        ({"out": (3, 5)}, r"out must be \[at most 16 queries, value width\]"),
        ({"out": (17, 4)}, r"out must be \[at most 16 queries, value width\]"),
        ({"last_key": last[:15]}, "have 16 lanes"),
        ({"top": lane[:15]}, "have 16 lanes"),
    ]:
        with pytest.raises(ValueError, match=problem):
            call(**wrong)
    arrays = [np.zeros(shape, np.uint16) for shape in ((7, 16), (10, 7), (10, 4))]
    with pytest.raises(ValueError, match="bf16 keys must have an even width"):
        native.attend_bf16(*arrays, last, 0, lane, lane, np.zeros((3, 4), np.float32))


@pytest.mark.benchmark
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1024, 576, 512), (16, 1024, 576, 512), (4, 1024, 64, 64)], ids=str)
def test_benchmark(isa, kind, shape, random, speed):
    queries, keys, values, last_key = _inputs(kind, shape, random)
    speed(
        f"attend {isa} {kind} {shape}",
        keys.nbytes + values.nbytes,
        lambda: packed.attend(queries, keys, values, last_key),
    )
