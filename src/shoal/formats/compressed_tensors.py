"""compressed-tensors, the quantised folders that vLLM, SGLang and transformers read (vllm-project on GitHub).

`quantization_config` in `config.json` holds groups; a group says how the weights of its `targets` are stored. On disk
the matrix `NAME.weight` [R, C] becomes

    pack-quantized    NAME.weight_packed int32 [R, ceil(C · bits / 32)]: codes + 2^(bits-1), each row one dense stream
                      of bits, lowest first; NAME.weight_shape [2]; NAME.weight_zero_point likewise, packed along R
    int-quantized     NAME.weight int8 [R, C], NAME.weight_zero_point int8 (also called naive-quantized)
    float-quantized   NAME.weight float8 [R, C]

and always NAME.weight_scale: one scale for the tensor, a row (channel), a group of columns or a block.

    weight = (code - zero point) · scale

Letters: R rows, C columns, W packed words, G groups of a row, P and Q blocks along rows and columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import ConfigError, FileError
from shoal.formats import fp8
from shoal.formats.checkpoint import CodeTriple
from shoal.formats.safetensors import SafetensorsFile

Codes = NDArray[np.int8]
Floats = NDArray[np.float32]

METHOD = "compressed-tensors"
FIELD = "quantization_config"
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
# Ranges of activations and of the cache, for readers that quantise those too.
ACTIVATION_PARTS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale",
                    "q_scale")  # fmt: skip
_SCALE_DTYPES = ("F32", "BF16", "F16")
_BAND_VALUES = 1 << 24  # weights given out at a time
_MAX_SCALE = 65504.0  # of the packed layout, which keeps scales in float16
_NIBBLES = ((np.arange(256)[:, None] >> np.array([0, 4])) & 15).astype(np.int8) - np.int8(8)


@dataclass(frozen=True, kw_only=True)
class WeightScheme:
    """How the weights of a group are stored. `block` is the rows and columns that share a scale; 0 means all."""

    bits: int
    floats: bool
    symmetric: bool
    block: tuple[int, int]
    label: str  # G128, CHANNEL, …

    @property
    def dtype(self) -> str:
        """`I4_G128`; `U` where there are zero points."""
        return "F8_E4M3" if self.floats else f"{'I' if self.symmetric else 'U'}{self.bits}_{self.label}"

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        return fp8.scale_shape(shape, self.full_block(shape))

    def full_block(self, shape: tuple[int, int]) -> tuple[int, int]:
        return self.block[0] or max(shape[0], 1), self.block[1] or max(shape[1], 1)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """`quantization_config`: which scheme the weights of a module have."""

    exact: Mapping[str, WeightScheme]
    patterns: tuple[tuple[re.Pattern[str], WeightScheme], ...]
    linear: WeightScheme | None  # of every module of class Linear

    def scheme(self, module: str) -> WeightScheme | None:
        """The most specific target decides: an exact name, then a pattern, then the class."""
        if module in self.exact:
            return self.exact[module]
        return next((scheme for pattern, scheme in self.patterns if pattern.match(module)), self.linear)


# ---- config.json


def parse_compression(raw: Mapping[str, Any]) -> Compression:
    """Read a `quantization_config` whose quant_method is compressed-tensors. ConfigError for what is not understood."""
    layout = raw.get("format")
    if layout not in (*FORMATS, "mixed-precision"):
        raise ConfigError(f"{FIELD}.format", f"{layout!r} is not one of {', '.join(FORMATS)}")
    for key in ("sparsity_config", "transform_config"):
        value = raw.get(key)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            raise ConfigError(f"{FIELD}.{key}", "is not supported")
    groups = raw.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{FIELD}.config_groups", "must be an object with at least one group")
    exact: dict[str, WeightScheme] = {}
    patterns: list[tuple[re.Pattern[str], WeightScheme]] = []
    linear = None
    for key, group in groups.items():
        where = f"{FIELD}.config_groups.{key}"
        if not isinstance(group, Mapping) or not isinstance(group.get("targets"), list):
            raise ConfigError(where, "must be an object with targets and weights")
        if group.get("weights") is None:
            continue
        if group.get("format") not in (*FORMATS, None):
            raise ConfigError(f"{where}.format", f"{group['format']!r} is not one of {', '.join(FORMATS)}")
        scheme = _scheme(f"{where}.weights", group["weights"])
        for target in group["targets"]:
            if not isinstance(target, str):
                raise ConfigError(f"{where}.targets", f"must be names, got {target!r}")
            if target == "Linear":
                linear = linear or scheme
            elif target.startswith("re:"):
                patterns.append((_pattern(where, target.removeprefix("re:")), scheme))
            else:
                exact.setdefault(target, scheme)
    return Compression(exact=exact, patterns=tuple(patterns), linear=linear)


def _pattern(where: str, text: str) -> re.Pattern[str]:
    """Compile a target. A pattern that could take for ever on some name (nested repetition) is refused."""
    if len(text) > 500 or re.search(r"\)[*+{]", text) or len(re.findall(r"(?<!\\)[*+{]", text)) > 5:
        raise ConfigError(f"{where}.targets", f"{text[:80]!r} is too involved a pattern")
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(f"{where}.targets", f"{text[:80]!r} is no regular expression: {error}") from error


def _scheme(where: str, raw: Any) -> WeightScheme:
    if not isinstance(raw, Mapping):
        raise ConfigError(where, "must be an object")
    bits, kind, symmetric = raw.get("num_bits", 8), raw.get("type", "int"), raw.get("symmetric", True)
    if kind not in ("int", "float"):
        raise ConfigError(f"{where}.type", f"{kind!r} is neither int nor float")
    if type(bits) is not int or not (bits == 8 if kind == "float" else 1 <= bits <= 8):
        raise ConfigError(f"{where}.num_bits", f"{bits!r} is not supported for {kind}")
    if not isinstance(symmetric, bool):
        raise ConfigError(f"{where}.symmetric", f"must be true or false, got {symmetric!r}")
    if raw.get("actorder") in ("group", "dynamic"):
        raise ConfigError(f"{where}.actorder", "columns in another order are not supported")
    block, label = _block(where, raw)
    return WeightScheme(bits=bits, floats=kind == "float", symmetric=symmetric or kind == "float", block=block,
                        label=label)  # fmt: skip


def _block(where: str, raw: Mapping[str, Any]) -> tuple[tuple[int, int], str]:
    """Rows and columns that share a scale (0: all), and a label."""
    size, strategy = raw.get("group_size"), raw.get("strategy")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return (0, 0), "TENSOR"
    if strategy == "channel":
        return (1, 0), "CHANNEL"
    if strategy == "group":
        if type(size) is not int or not 1 <= size <= 1 << 20:
            raise ConfigError(f"{where}.group_size", f"must be a whole number, got {size!r}")
        return (1, size), f"G{size}"
    if strategy == "block":
        block = raw.get("block_structure")
        if isinstance(block, str):  # older files: "128x128"
            block = [int(n) if n.isdigit() else n for n in block.split("x")]
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(n) is int and 1 <= n <= 1 << 20 for n in block)
        ):
            raise ConfigError(f"{where}.block_structure", f"must be two whole numbers, got {block!r}")
        return (block[0], block[1]), f"B{block[0]}X{block[1]}"
    raise ConfigError(f"{where}.strategy", f"{strategy!r} is not one of tensor, channel, group, block")


# ---- tensors


def unpack_rows(packed_RW: NDArray[np.int32], bits: int, cols: int) -> Codes:
    """int32 [R, W] → codes int8 [R, C]: undoes `pack_rows`."""
    rows = packed_RW.shape[0]
    raw = np.ascontiguousarray(packed_RW).view(np.uint8)
    if bits == 8:
        return np.asarray(raw[:, :cols] ^ np.uint8(128)).view(np.int8)
    if bits == 4:
        pairs: NDArray[np.int16] = np.take(_NIBBLES.view(np.int16).reshape(-1), raw)
        return pairs.view(np.int8)[:, :cols]
    stream = np.unpackbits(raw, axis=1, bitorder="little")[:, : cols * bits].reshape(rows, cols, bits)
    codes = np.packbits(stream, axis=2, bitorder="little")[:, :, 0].astype(np.int16)
    return (codes - (1 << (bits - 1))).astype(np.int8)


def pack_rows(codes_RC: Codes, bits: int) -> NDArray[np.int32]:
    """Codes int8 [R, C] → int32 [R, W], each row one stream of `bits` bits a code, lowest first, padded with zeros."""
    rows, cols = codes_RC.shape
    words = -(-cols * bits // 32)
    out = np.zeros((rows, 4 * words), np.uint8)
    shifted = (codes_RC.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    if bits == 8:
        out[:, :cols] = shifted
    elif bits == 4:
        out[:, : -(-cols // 2)] = shifted[:, ::2]
        out[:, : cols // 2] |= shifted[:, 1::2] << 4
    else:
        stream = np.unpackbits(shifted[:, :, None], axis=2, count=bits, bitorder="little").reshape(rows, cols * bits)
        packed = np.packbits(stream, axis=1, bitorder="little")
        out[:, : packed.shape[1]] = packed
    return out.view(np.int32)


class StoredMatrix:
    """One quantised matrix [R, C] among a folder's tensors; `names` are those that belong to it.

    Raises:
        FileError: a part is missing or has another type or shape than `config.json` says.
    """

    def __init__(
        self, shards: Mapping[str, SafetensorsFile], name: str, shape: tuple[int, int], scheme: WeightScheme
    ) -> None:
        self.shape = shape
        self.scheme = scheme
        self._shards = shards
        self._module = name.removesuffix(".weight")
        self.packed = f"{name}_packed" in shards
        self._main = f"{name}_packed" if self.packed else name
        self.source = shards[self._main].path
        self.names = {self._main}
        rows, cols = shape
        groups = scheme.scale_shape(shape)
        if self.packed and scheme.floats:
            raise FileError(self.source, "is packed, but config.json says float", item=self._main)
        if self.packed:
            self._need("weight_packed", ("I32",), (rows, -(-cols * scheme.bits // 32)))
            self._need("weight_shape", ("I64", "I32"), (2,))
        else:
            self._need("weight", ("F8_E4M3",) if scheme.floats else ("I8",), shape)
        if scheme.block[1] and cols % scheme.block[1] and not scheme.floats:
            raise FileError(
                self.source, f"has {cols} columns, no multiple of the group of {scheme.block[1]}", item=name
            )
        loose: list[tuple[int, ...]] = [(rows,)] if groups[1] == 1 and groups[0] == rows else []
        loose += [(1,), ()] if groups == (1, 1) else []
        self._need("weight_scale", _SCALE_DTYPES, groups, *loose)
        if not scheme.symmetric and self.packed and groups[0] == rows:
            self._need("weight_zero_point", ("I32",), (-(-rows * scheme.bits // 32), groups[1]))
        elif not scheme.symmetric:
            self._need("weight_zero_point", ("I8",), groups, *loose)
        elif f"{self._module}.weight_zero_point" in shards:  # written by some although it is zero
            self.names.add(f"{self._module}.weight_zero_point")

    def _need(self, part: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> None:
        name = f"{self._module}.{part}"
        if name not in self._shards:
            raise FileError(self.source, "is missing; config.json asks for it", item=name)
        file = self._shards[name]
        entry = file.entries[name]
        if entry.dtype not in dtypes or entry.shape not in shapes:
            problem = f"is {entry.dtype} {list(entry.shape)}; config.json asks for {dtypes[0]} {list(shapes[0])}"
            raise FileError(file.path, problem, item=name)
        self.names.add(name)

    def _part(self, part: str) -> NDArray[Any]:
        name = f"{self._module}.{part}"
        return self._shards[name].view(name)

    def _check_shape(self) -> None:
        if self.packed and tuple(int(n) for n in self._part("weight_shape")) != self.shape:
            found = [int(n) for n in self._part("weight_shape")]
            problem = f"is {found}; config.json asks for {list(self.shape)}"
            raise FileError(self.source, problem, item=f"{self._module}.weight_shape")

    def scales(self) -> Floats:
        """float32 [P, Q]."""
        scales = self._part("weight_scale").astype(np.float32).reshape(self.scheme.scale_shape(self.shape))
        if not np.isfinite(scales).all():
            raise FileError(self.source, "holds a scale that is not finite", item=f"{self._module}.weight_scale")
        return scales

    def _zeros(self) -> Codes | None:
        """int8 [P, Q], or None where all are zero."""
        if self.scheme.symmetric:
            return None
        groups = self.scheme.scale_shape(self.shape)
        stored = self._part("weight_zero_point")
        if stored.dtype == np.int32:
            return np.asarray(unpack_rows(np.ascontiguousarray(stored.T), self.scheme.bits, self.shape[0]).T)
        return np.asarray(stored.reshape(groups), np.int8)

    @property
    def has_codes(self) -> bool:
        """True if `codes` can say it all: whole numbers, and scales that cover multiples of 32 columns of a row."""
        rows, cols = self.scheme.block
        whole = not self.scheme.floats and (self.scheme.symmetric or self.scheme.bits < 8)
        return whole and rows in (0, 1) and cols % 32 == 0

    def codes(self) -> CodeTriple:
        """Codes int8 [R, C], scales float32 [R, G] and, where codes are unsigned, minima float32 [R, G].

        weight = scale · code (+ minimum). With zero points and at most 4 bits, codes are 0 … 2^bits - 1 and the minimum
        is -scale · zero; with more bits the zero point is taken off the code, and there is no minimum.
        """
        assert self.has_codes
        self._check_shape()
        rows = self.shape[0]
        codes, scales, zeros = self._codes(0, rows), self.scales(), self._zeros()
        scales = np.ascontiguousarray(np.broadcast_to(scales, (rows, scales.shape[1])))
        if np.abs(scales).max(initial=0) > _MAX_SCALE:
            raise FileError(self.source, f"exceeds {_MAX_SCALE}", item=f"{self._module}.weight_scale")
        self.release()
        if zeros is None:
            return codes, scales, None
        zeros = np.broadcast_to(zeros, scales.shape)
        if self.scheme.bits > 4:
            wide = codes.reshape(rows, scales.shape[1], -1) - zeros[:, :, None]
            return wide.reshape(self.shape), scales, None
        offset = np.int8(1 << (self.scheme.bits - 1))
        return codes + offset, scales, -scales * (zeros.astype(np.float32) + offset)

    def _codes(self, start: int, stop: int) -> Codes:
        if self.packed:
            return unpack_rows(self._part("weight_packed")[start:stop], self.scheme.bits, self.shape[1])
        return self._part("weight")[start:stop]

    def chunks(self) -> Iterator[Floats]:
        """The weights as float32, some rows at a time."""
        self._check_shape()
        rows, cols = self.shape
        block = self.scheme.full_block(self.shape)
        if self.scheme.floats:
            yield from fp8.dequantise_bands(self._part("weight"), self.scales(), block)
            return self.release()
        scales, zeros = self.scales(), self._zeros()
        step = max(block[0], _BAND_VALUES // max(cols, 1) // block[0] * block[0])
        for start in range(0, rows, step):
            values = self._codes(start, start + step).astype(np.float32)
            first, last = start // block[0], math.ceil(min(start + step, rows) / block[0])
            if zeros is not None:
                values -= _spread(zeros[first:last], block, values.shape)
            values *= _spread(scales[first:last], block, values.shape)
            yield values
        return self.release()

    def release(self) -> None:
        self._shards[self._main].release(self._main)


def _spread(groups_PQ: NDArray[Any], block: tuple[int, int], shape: tuple[int, ...]) -> NDArray[Any]:
    """[P, Q] repeated over its blocks: [R, C]."""
    rows = np.repeat(groups_PQ, block[0], axis=0)[: shape[0]] if block[0] > 1 else groups_PQ
    return np.repeat(rows, block[1], axis=1)[:, : shape[1]] if rows.shape[1] > 1 else rows
