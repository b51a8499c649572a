"""Folders in the compressed-tensors layout, written here bit by bit from its description, read by Shoal and packed for
the engine. Where the package compressed-tensors itself is installed, it is the judge too."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from shoal.config import GQAConfig, ModelConfig
from shoal.engine.packing import pack_tensor, packing_for
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.compressed_tensors import pack_rows, parse_compression, unpack_rows
from shoal.formats.hf_config_write import to_hf
from shoal.formats.hf_folder import open_folder
from shoal.formats.layout import expected_tensors

CONFIG = ModelConfig(
    model_type="llama", vocab_size=48, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
    attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=32),
)  # fmt: skip
MODULE = "model.layers.0.mlp.down_proj"  # [128, 256]
ROWS, COLS = 128, 256


# ---- a writer as plain as possible


def bits_to_words(codes: list[int], bits: int) -> list[int]:
    """One row: code + 2^(bits-1), least significant bit first, into signed 32-bit words."""
    number = sum((code + (1 << (bits - 1))) << (bits * i) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(-(-len(codes) * bits // 32))]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def packed(codes: Any, bits: int) -> Any:
    return np.array([bits_to_words(row.tolist(), bits) for row in codes], np.int32)


def weights(**changes: Any) -> dict[str, Any]:
    return {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **changes}


def write(
    folder: Path, parts: dict[str, Any], args: dict[str, Any], layout: str = "pack-quantized", **quantization: Any
) -> Path:
    """A tiny llama whose down projection is stored as `parts`."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in expected_tensors(CONFIG).items()}
    del tensors[f"{MODULE}.weight"]
    tensors.update({f"{MODULE}.{part}": value for part, value in parts.items()})
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    group = {"targets": ["Linear"], "weights": args, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
              "ignore": ["lm_head"], **quantization}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**to_hf(CONFIG), "quantization_config": config}))
    return folder


def down(checkpoint: Checkpoint) -> LazyTensor:
    return checkpoint.tensors[f"{MODULE}.weight"]


def engine_rows(tensor: LazyTensor) -> Any:
    """What the engine's packed form stands for."""
    matrix = pack_tensor(tensor, packing_for(tensor, "auto"))
    out = np.empty(tensor.shape, np.float32)
    for row in range(len(out)):
        matrix.row(row, out[row])
    return out


# ---- bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("cols", [1, 7, 32, 45])
def test_packing_is_one_stream_of_bits(bits: int, cols: int) -> None:
    low = -(1 << (bits - 1))
    codes = np.random.default_rng(bits).integers(low, -low, (5, cols)).astype(np.int8)
    codes[0], codes[1] = low, -low - 1
    words = pack_rows(codes, bits)
    np.testing.assert_array_equal(words, packed(codes, bits))
    np.testing.assert_array_equal(unpack_rows(words, bits, cols), codes)


# ---- every way to store a matrix

SCALE_TYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
CASES: dict[str, tuple[dict[str, Any], str, str, bool]] = {  # args, layout, dtype, exact in the engine
    "int4 group": (weights(), "pack-quantized", "I4_G32", True),
    "int4 large group": (weights(group_size=128), "pack-quantized", "I4_G128", True),
    "int4 small group": (weights(group_size=16), "pack-quantized", "I4_G16", False),
    "int4 channel": (weights(strategy="channel", group_size=None), "pack-quantized", "I4_CHANNEL", True),
    "int4 zero points": (weights(symmetric=False), "pack-quantized", "U4_G32", True),
    "int4 channel zero points": (
        weights(symmetric=False, strategy="channel", group_size=None), "pack-quantized", "U4_CHANNEL", True),
    "int3": (weights(num_bits=3, group_size=64), "pack-quantized", "I3_G64", True),
    "int6": (weights(num_bits=6, group_size=64), "pack-quantized", "I6_G64", True),
    "int6 zero points": (weights(num_bits=6, symmetric=False), "pack-quantized", "U6_G32", True),
    "int8 group": (weights(num_bits=8), "pack-quantized", "I8_G32", True),
    "int8 group zero points": (weights(num_bits=8, symmetric=False), "pack-quantized", "U8_G32", False),
    "int8 channel": (weights(num_bits=8, strategy="channel", group_size=-1), "int-quantized", "I8_CHANNEL", True),
    "int8 tensor": (weights(num_bits=8, strategy="tensor", group_size=None), "naive-quantized", "I8_TENSOR", True),
    "int8 zero points": (weights(num_bits=8, symmetric=False), "int-quantized", "U8_G32", False),
    "fp8 channel": (weights(num_bits=8, type="float", strategy="channel", group_size=None), "float-quantized",
                    "F8_E4M3", False),
    "fp8 block": (weights(num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 128]),
                  "float-quantized", "F8_E4M3", False),
}  # fmt: skip


def stored(args: dict[str, Any], layout: str, scale_type: Any = np.float32) -> tuple[dict[str, Any], Any]:
    """Random parts, and the float64 matrix they stand for."""
    rng, bits = np.random.default_rng(3), args["num_bits"]
    rows, cols = {"tensor": (ROWS, COLS), "channel": (1, COLS), "group": (1, args["group_size"]),
                  "block": tuple(args.get("block_structure") or (0, 0))}[args["strategy"]]  # fmt: skip
    groups = (-(-ROWS // rows), -(-COLS // cols))
    scales = (rng.integers(1, 64, groups) * 2.0**-9).astype(scale_type)
    zeros = np.zeros(groups)
    if args["type"] == "float":
        codes = rng.normal(size=(ROWS, COLS)).astype(ml_dtypes.float8_e4m3fn)
        parts: dict[str, Any] = {"weight": codes}
    else:
        codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), (ROWS, COLS)).astype(np.int8)
        shape = np.array([ROWS, COLS], np.int64)
        packs = layout == "pack-quantized"
        parts = {"weight_packed": packed(codes, bits), "weight_shape": shape} if packs else {"weight": codes}
        if not args["symmetric"]:
            zeros = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), groups).astype(np.int8)
            parts["weight_zero_point"] = packed(zeros.T, bits).T.copy() if packs else zeros
    parts["weight_scale"] = scales
    wide = [np.repeat(np.repeat(np.asarray(a, np.float64), rows, 0), cols, 1)[:ROWS, :COLS] for a in (scales, zeros)]
    return parts, (codes.astype(np.float64) - wide[1]) * wide[0]


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_is_read(tmp_path: Path, name: str) -> None:
    args, layout, dtype, exact = CASES[name]
    parts, expected = stored(args, layout)
    tensor = down(open_folder(write(tmp_path / "m", parts, args, layout)))
    assert (tensor.dtype, tensor.shape, tensor.codes is not None) == (dtype, (ROWS, COLS), exact)
    np.testing.assert_array_equal(tensor.read(), expected)
    if exact:
        np.testing.assert_array_equal(engine_rows(tensor), expected)
    else:  # quantised anew in the engine's own groups of 32, with 8 bits
        assert packing_for(tensor, "auto") == "q8"
        groups = np.abs(expected.reshape(ROWS, -1, 32)).max(axis=2)
        error = np.abs(engine_rows(tensor) - expected).reshape(ROWS, -1, 32).max(axis=2)
        assert (error <= groups / 127 * 0.51 + groups * 2.0**-11).all()


@pytest.mark.parametrize("scale_type", SCALE_TYPES)
def test_scales_of_every_type(tmp_path: Path, scale_type: str) -> None:
    parts, expected = stored(weights(), "pack-quantized", SCALE_TYPES[scale_type])
    np.testing.assert_array_equal(down(open_folder(write(tmp_path / "m", parts, weights()))).read(), expected)


def test_scales_without_their_trailing_axis(tmp_path: Path) -> None:
    args, layout, _, _ = CASES["int8 channel"]
    parts, expected = stored(args, layout)
    parts["weight_scale"] = parts["weight_scale"].reshape(-1)
    np.testing.assert_array_equal(down(open_folder(write(tmp_path / "m", parts, args, layout))).read(), expected)


def test_bands_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, expected = stored(weights(symmetric=False), "pack-quantized")
    monkeypatch.setattr("shoal.formats.compressed_tensors._BAND_VALUES", 3 * COLS)
    tensor = down(open_folder(write(tmp_path / "m", parts, weights(symmetric=False))))
    assert [len(chunk) for chunk in tensor.chunks()] == [3] * 42 + [2]
    np.testing.assert_array_equal(tensor.read(), expected)


def test_other_packings_are_still_to_be_had(tmp_path: Path) -> None:
    parts, expected = stored(weights(), "pack-quantized")
    tensor = down(open_folder(write(tmp_path / "m", parts, weights())))
    row = np.empty(COLS, np.float32)
    pack_tensor(tensor, "f32").row(5, row)
    np.testing.assert_array_equal(row, expected[5])


def test_activation_ranges_are_left_alone(tmp_path: Path) -> None:
    args, layout, _, _ = CASES["int8 channel"]
    parts, _ = stored(args, layout)
    parts["input_scale"] = np.ones(1, np.float32)
    folder = write(tmp_path / "m", parts, args, layout, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert down(open_folder(folder)).dtype == "I8_CHANNEL"


# ---- config.json


def scheme_of(module: str, *groups: tuple[list[str], dict[str, Any]]) -> str | None:
    config = {"format": "pack-quantized", "config_groups": {
        f"g{i}": {"targets": targets, "weights": args} for i, (targets, args) in enumerate(groups)}}  # fmt: skip
    scheme = parse_compression(config).scheme(module)
    return scheme and scheme.dtype


def test_the_most_specific_target_decides() -> None:
    groups = [
        (["Linear"], weights()),
        (["re:.*\\.down_proj$"], weights(num_bits=8)),
        ([MODULE], weights(num_bits=6)),
    ]
    for order in itertools.permutations(groups):
        assert scheme_of(MODULE, *order) == "I6_G32"
        assert scheme_of("model.layers.1.mlp.down_proj", *order) == "I8_G32"
        assert scheme_of("model.layers.1.mlp.up_proj", *order) == "I4_G32"
    assert scheme_of("model.layers.1.mlp.up_proj", *groups[1:]) is None


def test_older_spellings() -> None:
    assert scheme_of("a", (["Linear"], {"num_bits": 8})) == "I8_TENSOR"
    assert scheme_of("a", (["Linear"], {"num_bits": 8, "group_size": -1})) == "I8_CHANNEL"
    assert scheme_of("a", (["Linear"], {"num_bits": 4, "group_size": 64})) == "I4_G64"
    block = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x128"}
    assert scheme_of("a", (["Linear"], block)) == "F8_E4M3"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": "marlin-24"}, "format"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparsity_config"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"config_groups": {}}, "config_groups"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": weights()}}}, "config_groups.g"),
        ({"config_groups": {"g": {"targets": [1], "weights": weights()}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": weights()}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["re:(a+)+$"], "weights": weights()}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["re:" + ".*a" * 9], "weights": weights()}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["re:" + "a" * 501], "weights": weights()}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"targets": ["Linear"], "weights": 8}}}, "config_groups.g.weights"),
        *(
            ({"config_groups": {"g": {"targets": ["Linear"], "weights": weights(**{field: value})}}},
             f"config_groups.g.weights.{field}")
            for field, value in [("num_bits", 9), ("num_bits", True), ("type", "nf4"), ("symmetric", 1),
                                 ("strategy", "tensor_group"), ("group_size", 0), ("group_size", "32"),
                                 ("actorder", "group")]
        ),
        ({"config_groups": {"g": {"targets": [], "weights": weights(type="float")}}},
         "config_groups.g.weights.num_bits"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named(change: dict[str, Any], named: str) -> None:
    good = {"format": "pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": weights()}}}
    parse_compression(good)
    with pytest.raises(ConfigError) as caught:
        parse_compression({**good, **change})
    assert caught.value.field == f"quantization_config.{named}"


def test_empty_settings_are_no_settings() -> None:
    parse_compression({
        "format": "pack-quantized", "config_groups": {"g": {"targets": ["Linear"], "weights": weights()}},
        "sparsity_config": {}, "transform_config": {}, "kv_cache_scheme": None,
    })  # fmt: skip


# ---- damage


def damaged(change: Callable[[dict[str, Any]], object]) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        parts, _ = stored(weights(symmetric=False), "pack-quantized")
        change(parts)
        return parts

    return make


DAMAGE: dict[str, tuple[Callable[[], dict[str, Any]], str, str]] = {
    "no scale": (damaged(lambda p: p.pop("weight_scale")), "weight_scale", "is missing"),
    "no shape": (damaged(lambda p: p.pop("weight_shape")), "weight_shape", "is missing"),
    "no zero points": (damaged(lambda p: p.pop("weight_zero_point")), "weight_zero_point", "is missing"),
    "narrow codes": (damaged(lambda p: p.update(weight_packed=p["weight_packed"][:, :-1].copy())), "weight_packed",
                     r"is I32 \[128, 31\]; config.json asks for I32 \[128, 32\]"),
    "codes of another type": (damaged(lambda p: p.update(weight_packed=p["weight_packed"].view(np.uint32))),
                              "weight_packed", "is U32"),
    "few scales": (damaged(lambda p: p.update(weight_scale=p["weight_scale"][:, :4].copy())), "weight_scale",
                   r"is F32 \[128, 4\]; config.json asks for F32 \[128, 8\]"),
    "whole scales": (damaged(lambda p: p.update(weight_scale=p["weight_scale"].astype(np.int32))), "weight_scale",
                     "is I32"),
    "long zero points": (damaged(lambda p: p.update(weight_zero_point=np.zeros((128, 8), np.int32))),
                         "weight_zero_point", r"asks for I32 \[16, 8\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_when_the_folder_is_opened(tmp_path: Path, name: str) -> None:
    make, part, problem = DAMAGE[name]
    folder = write(tmp_path / "m", make(), weights(symmetric=False))
    with pytest.raises(FileError, match=problem) as caught:
        open_folder(folder)
    assert caught.value.item == f"{MODULE}.{part}"


@pytest.mark.parametrize(
    ("part", "value", "problem"),
    [
        ("weight_shape", np.array([128, 255]), r"is \[128, 255\]; config.json asks for \[128, 256\]"),
        ("weight_scale", np.full((128, 8), np.nan, np.float32), "not finite"),
    ],
)
def test_damage_in_the_values_is_found_when_they_are_read(tmp_path: Path, part: str, value: Any, problem: str) -> None:
    parts, _ = stored(weights(), "pack-quantized")
    tensor = down(open_folder(write(tmp_path / "m", {**parts, part: value}, weights())))
    assert tensor.codes is not None
    for read in (tensor.read, lambda: list(tensor.codes())):
        with pytest.raises(FileError, match=problem) as caught:
            read()
        assert caught.value.item == f"{MODULE}.{part}"


def test_a_scale_beyond_the_packed_layout(tmp_path: Path) -> None:
    parts, _ = stored(weights(), "pack-quantized")
    parts["weight_scale"] = np.full((128, 8), 1e6, np.float32)
    with pytest.raises(FileError, match="exceeds 65504"):
        engine_rows(down(open_folder(write(tmp_path / "m", parts, weights()))))


def test_codes_that_no_target_covers(tmp_path: Path) -> None:
    parts, _ = stored(weights(), "pack-quantized")
    groups = {"g": {"targets": ["re:.*self_attn.*"], "weights": weights()}}
    with pytest.raises(FileError, match="no target of quantization_config") as caught:
        open_folder(write(tmp_path / "m", parts, weights(), config_groups=groups))
    assert caught.value.item == f"{MODULE}.weight_packed"


def test_codes_without_any_quantization_config(tmp_path: Path) -> None:
    parts, _ = stored(weights(), "pack-quantized")
    folder = write(tmp_path / "m", parts, weights())
    (folder / "config.json").write_text(json.dumps(to_hf(CONFIG)))
    with pytest.raises(FileError, match="no target of quantization_config"):
        open_folder(folder)


def test_columns_that_the_group_does_not_divide(tmp_path: Path) -> None:
    parts, _ = stored(weights(), "pack-quantized")
    parts["weight_scale"] = parts["weight_scale"][:, :3].copy()
    with pytest.raises(FileError, match="256 columns, no multiple of the group of 96"):
        open_folder(write(tmp_path / "m", parts, weights(group_size=96)))


def test_a_matrix_without_codes_among_quantised_ones(tmp_path: Path) -> None:
    """A float matrix is read as it is, whether or not the ignore list says so."""
    plain = np.ones((ROWS, COLS), np.float32)
    tensor = down(open_folder(write(tmp_path / "m", {"weight": plain}, weights())))
    np.testing.assert_array_equal(tensor.read(), plain)


# ---- the package itself


@pytest.mark.parametrize("name", [name for name in CASES if "zero points" not in name or "int4" in name])
def test_the_package_agrees(name: str) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    torch = pytest.importorskip("torch")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args, layout, _, _ = CASES[name]
    parts, expected = stored(args, layout)
    as_torch = {key: _to_torch(torch, value) for key, value in parts.items()}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    theirs = compressors.BaseCompressor.get_value_from_registry(layout).decompress(as_torch, scheme)["weight"]
    np.testing.assert_array_equal(theirs.float().numpy(), expected)


def _to_torch(torch: Any, value: Any) -> Any:
    if value.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(value.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(np.ascontiguousarray(value))
