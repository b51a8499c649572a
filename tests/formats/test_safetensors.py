"""The safetensors reader and writer, with the `safetensors` package as the judge in both directions."""

from __future__ import annotations

import json
import random
import resource
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from shoal.errors import FileError
from shoal.formats.safetensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    SafetensorsFile,
    TensorSpec,
    array_spec,
    write_safetensors,
    write_sharded,
)

TORCH_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def random_bits(dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = TORCH_TYPES[dtype]
    count = int(np.prod(shape)) * kind.itemsize
    raw = torch.randint(0, 2 if dtype == "BOOL" else 256, (count,), dtype=torch.uint8)
    return raw.view(kind).reshape(shape)


def file_of(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_every_dtype_of_the_reference_writer_reads_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: random_bits(name, (3, 4)) for name in DTYPES}
    tensors |= {"scalar": random_bits("F32", ()), "empty": random_bits("BF16", (0, 7)), "odd": random_bits("U8", (5,))}
    safetensors.torch.save_file(tensors, tmp_path / "m.safetensors", metadata={"who": "reference"})
    ours = SafetensorsFile(tmp_path / "m.safetensors")
    assert ours.metadata == {"who": "reference"}
    assert ours.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        view = ours.view(name)
        assert view.shape == tuple(tensor.shape)
        assert view.dtype == DTYPES.get(name, view.dtype)
        assert view.tobytes() == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_dtype_we_write_reads_bit_for_bit_in_the_reference(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays = {}
    for name, dtype in DTYPES.items():
        top = 2 if name == "BOOL" else 256
        arrays[name] = rng.integers(0, top, 15 * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(3, 5)
    arrays["scalar"] = np.float32(3.5).reshape(())
    arrays["empty"] = np.empty((0, 4), np.float16)
    write_safetensors(tmp_path / "m.safetensors", [array_spec(name, array) for name, array in arrays.items()])
    theirs = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert theirs.keys() == arrays.keys()
    for name, array in arrays.items():
        assert tuple(theirs[name].shape) == array.shape
        assert theirs[name].dtype == TORCH_TYPES.get(name, theirs[name].dtype)
        assert theirs[name].reshape(-1).view(torch.uint8).numpy().tobytes() == array.tobytes()


def test_view_is_the_file_itself(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", [array_spec("a", np.arange(6, dtype=np.float32))])
    ours = SafetensorsFile(tmp_path / "m.safetensors")
    view = ours.view("a")
    assert not view.flags.owndata
    assert not view.flags.writeable
    ours.release("a")
    np.testing.assert_array_equal(view, np.arange(6))


def test_unaligned_data_is_still_read(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], [0, 1]), "b": entry("F32", [2], [1, 9])}
    path = file_of(tmp_path / "m.safetensors", header, b"\7" + np.array([1.5, -2], np.float32).tobytes())
    view = SafetensorsFile(path).view("b")
    assert view.flags.aligned
    np.testing.assert_array_equal(view, [1.5, -2])


def test_written_tensors_are_aligned_whatever_their_order(tmp_path: Path) -> None:
    arrays = {"byte": np.ones(3, np.uint8), "half": np.ones(5, ml_dtypes.bfloat16), "wide": np.ones(3, np.float32)}
    write_safetensors(tmp_path / "m.safetensors", [array_spec(name, array) for name, array in arrays.items()])
    entries = SafetensorsFile(tmp_path / "m.safetensors").entries
    assert all(place.begin % DTYPES[place.dtype].itemsize == 0 for place in entries.values())


ONE = {"a": entry()}
DATA = bytes(8)
BAD_FILES = {
    **{f"{n} bytes": bytes(n) for n in range(8)},
    "header length 2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "header over 100 MB": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "header past the end": (1000).to_bytes(8, "little") + b"{}",
}
# header, data, and the item that the message must name
BAD_HEADERS: dict[str, tuple[object, bytes, str | None]] = {
    "empty header": (b"", b"", None),
    "array": (b"[]", b"", None),
    "leading space": (b' {"a":1}', b"", None),
    "bad JSON": (b'{"a":', b"", None),
    "bad UTF-8": (b'{"\xff":1}', b"", None),
    "nested too deep": (b'{"a":' + b"[" * 200_000, b"", None),
    "huge number": (b'{"a":' + b"1" * 10_000 + b"}", b"", None),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA, None),
    "duplicate key": (b'{"a":{},"a":{}}', b"", None),
    "duplicate inner key": (b'{"a":{"dtype":"F32","dtype":"F32"}}', b"", None),
    "entry is no object": ({"a": 3}, b"", "a"),
    "entry lacks a key": ({"a": {"dtype": "F32", "shape": [2]}}, DATA, "a"),
    "entry has another key": ({"a": {**entry(), "x": 1}}, DATA, "a"),
    "unknown dtype": ({"a": entry("F4")}, DATA, "a"),
    "dtype is a list": ({"a": entry(["F32"])}, DATA, "a"),
    "shape is a string": ({"a": entry(shape="2")}, DATA, "a"),
    "shape is negative": ({"a": entry(shape=[-2])}, DATA, "a"),
    "shape is a float": ({"a": entry(shape=[2.0])}, DATA, "a"),
    "shape is a flag": ({"a": entry(shape=[True, 2])}, DATA, "a"),
    "shape has 100 axes": ({"a": entry(shape=[1] * 99 + [2])}, DATA, "a"),
    "size and shape differ": ({"a": entry(shape=[3])}, DATA, "a"),
    "product overflows 64 bits": ({"a": entry("U8", [1 << 32, 1 << 32], [0, 0])}, b"", "a"),
    "product overflows to zero": ({"a": entry("F32", [1 << 62], [0, 0])}, b"", "a"),
    "one axis over 64 bits": ({"a": entry("F32", [1 << 70], [0, 8])}, DATA, "a"),
    "offsets backwards": ({"a": entry(offsets=[8, 0])}, DATA, "a"),
    "offsets negative": ({"a": entry(offsets=[-8, 0])}, DATA, "a"),
    "offsets of three": ({"a": entry(offsets=[0, 8, 8])}, DATA, "a"),
    "past the end": ({"a": entry("U8", [1 << 40], [0, 1 << 40])}, DATA, "a"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "b"),
    "same place": ({"a": entry(), "b": entry()}, DATA, "b"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "b"),
    "hole at the start": ({"a": entry(offsets=[4, 12])}, bytes(12), "a"),
    "bytes left over": (ONE, bytes(9), None),
    "metadata is a list": ({"__metadata__": [], **ONE}, DATA, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"a": 1}, **ONE}, DATA, "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(FileError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_hostile_headers_are_refused_and_the_tensor_named(tmp_path: Path, name: str) -> None:
    header, data, item = BAD_HEADERS[name]
    path = file_of(tmp_path / "bad.safetensors", header, data)
    tracemalloc.start()
    with pytest.raises(FileError, match=r"bad\.safetensors") as caught:
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.item == item
    assert peak < 30_000_000  # nothing was allocated by what the file claims


def test_a_missing_file_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_random_damage_is_refused_whenever_the_reference_refuses(tmp_path: Path) -> None:
    rng = random.Random(7)
    tensors = {f"layer.{i}": np.arange(i + 1, dtype=np.float32) for i in range(5)}
    good = safetensors.numpy.save(tensors, {"format": "pt"})
    header_end = 8 + int.from_bytes(good[:8], "little")
    refused = 0
    for number in range(400):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            bad[rng.randrange(header_end)] = rng.choice(b'0123456789[]{}",:-.eF\0\xff ')
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(bad)
        try:
            reference = safetensors.numpy.load(bytes(bad))
        except Exception:
            reference = None
        try:
            file = SafetensorsFile(path)
            ours = {name: file.view(name) for name in file.entries}
        except FileError:
            refused += 1
            continue
        assert reference is not None, f"{bytes(bad[:header_end])!r}"
        assert {name: array.tobytes() for name, array in ours.items()} == {
            name: array.tobytes() for name, array in reference.items()
        }
    assert refused > 100


@pytest.mark.timeout(30)
def test_a_hundred_thousand_entries(tmp_path: Path) -> None:
    count = 100_000
    header = {f"t{i}": entry("U8", [1], [i, i + 1]) for i in range(count)}
    path = file_of(tmp_path / "m.safetensors", header, bytes(i % 251 for i in range(count)))
    ours = SafetensorsFile(path)
    assert len(ours.entries) == count
    assert ours.view("t77777")[0] == 77777 % 251
    del header["t500"]  # one hole among them
    with pytest.raises(FileError, match="hole") as caught:
        SafetensorsFile(file_of(tmp_path / "hole.safetensors", header, bytes(count)))
    assert caught.value.item == "t501"


def test_a_file_that_shrinks_after_opening_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, [array_spec("a", np.ones(4, np.float32)), array_spec("b", np.ones(1 << 20, np.float32))])
    ours = SafetensorsFile(path)
    with path.open("r+b") as file:
        file.truncate(ours.entries["b"].begin + 4096)
    np.testing.assert_array_equal(ours.view("a"), np.ones(4))
    with pytest.raises(FileError, match="shrunk") as caught:
        ours.view("b")
    assert caught.value.item == "b"


def test_chunks_are_joined_and_converted(tmp_path: Path) -> None:
    rows = np.random.default_rng(3).standard_normal((7, 6)).astype(np.float32)
    spec = TensorSpec("a", "BF16", (7, 6), lambda: iter([rows[:3], rows[3:4], rows[4:]]))
    seen: list[int] = []
    write_safetensors(tmp_path / "m.safetensors", [spec], progress=seen.append)
    theirs = safetensors.torch.load_file(tmp_path / "m.safetensors")["a"]
    assert torch.equal(theirs, torch.from_numpy(rows).to(torch.bfloat16))
    assert sum(seen) == spec.nbytes


def test_a_value_too_large_for_float16_is_an_error_that_names_it(tmp_path: Path) -> None:
    array = np.array([1, 70000], ml_dtypes.bfloat16)
    with pytest.raises(FileError, match=r"big: holds .* float16 cannot store"):
        write_safetensors(tmp_path / "m.safetensors", [TensorSpec("big", "F16", (2,), lambda: iter([array]))])
    assert list(tmp_path.iterdir()) == []
    # an infinity that was there before is the model's own business
    array[1] = np.inf
    write_safetensors(tmp_path / "m.safetensors", [TensorSpec("big", "F16", (2,), lambda: iter([array]))])
    assert safetensors.numpy.load_file(tmp_path / "m.safetensors")["big"][1] == np.inf


@pytest.mark.parametrize("rows", [1, 3])
def test_wrong_chunks_leave_no_file(tmp_path: Path, rows: int) -> None:
    spec = TensorSpec("a", "F32", (2, 2), lambda: iter([np.zeros((rows, 2), np.float32)]))
    with pytest.raises(ValueError, match="a: the chunks hold"):
        write_safetensors(tmp_path / "m.safetensors", [spec])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", [300, 3_000_000])
def test_a_disk_that_fills_up_is_a_file_error_and_leaves_nothing(tmp_path: Path, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(FileError, match=r"m\.safetensors: cannot be written: File too large"):
            write_safetensors(tmp_path / "m.safetensors", [array_spec("a", np.ones(count, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_no_such_folder_is_a_file_error(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be written: No such file"):
        write_safetensors(tmp_path / "none" / "m.safetensors", [array_spec("a", np.ones(4, np.float32))])


def test_shards_and_index(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((10, 10), i, np.float32) for i in range(5)}
    specs = [array_spec(name, array) for name, array in arrays.items()]
    write_sharded(tmp_path, specs, max_shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert index["weight_map"] == {
        "t0": "model-00001-of-00003.safetensors",
        "t1": "model-00001-of-00003.safetensors",
        "t2": "model-00002-of-00003.safetensors",
        "t3": "model-00002-of-00003.safetensors",
        "t4": "model-00003-of-00003.safetensors",
    }
    for name, shard in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / shard)[name], arrays[name])


def test_one_shard_has_no_index(tmp_path: Path) -> None:
    write_sharded(tmp_path, [array_spec("a", np.ones(4, np.float32))])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
