"""The container reader: what well-formed files hold, and that every kind of damage is named, cheaply."""

import resource
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import ConfigError, FileError
from shoal.formats.gguf import open_gguf, read_gguf
from shoal.formats.gguf_file import MAX_ARRAY_ITEMS
from shoal.formats.gguf_writer import write_model

HUGE = 1 << 63
U8, I32, BOOL, STRING, ARRAY = 0, 5, 7, 8, 9


def text(value, length=None):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def array(kind, count, items=b""):
    return struct.pack("<IQ", kind, count) + items


def entry(name="t", dims=(32,), kind=0, offset=0, num_dims=None):
    count = len(dims) if num_dims is None else num_dims
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)


def container(pairs=(), entries=(), data=b"", *, magic=b"GGUF", version=3, n_pairs=None, n_entries=None, order="<"):
    counts = (len(entries) if n_entries is None else n_entries, len(pairs) if n_pairs is None else n_pairs)
    head = magic + struct.pack(f"{order}IQQ", version, *counts) + b"".join(pairs) + b"".join(entries)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def save(tmp_path):
    def write(raw):
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_reads_values_and_tensors(save, version):
    pairs = [
        pair("small", U8, b"\x07"),
        pair("negative", I32, struct.pack("<i", -5)),
        pair("yes", BOOL, b"\x01"),
        pair("half", 12, struct.pack("<d", 0.5)),
        pair("big", 10, struct.pack("<Q", 1 << 40)),
        pair("words", ARRAY, array(STRING, 3, text("a") + text("") + text("Ġü"))),
        pair("flags", ARRAY, array(BOOL, 2, b"\x00\x01")),
        pair("none", ARRAY, array(I32, 0)),
        pair("bytes", STRING, text(b"\xff\x00")),
    ]
    data = np.arange(12, dtype=np.float32).tobytes()
    file = read_gguf(save(container(pairs, [entry("m", (4, 3))], data, version=version)))
    assert dict(file.fields) == {
        "small": 7,
        "negative": -5,
        "yes": True,
        "half": 0.5,
        "big": 1 << 40,
        "words": ["a", "", "Ġü"],
        "flags": [False, True],
        "none": [],
        "bytes": "\udcff\x00",
    }
    assert file.tensors["m"].shape == (3, 4)
    assert np.array_equal(file.stored("m").view(np.float32), np.arange(12).reshape(3, 4))
    assert not file.stored("m").flags.writeable


F32_ROW = bytes(128)
DAMAGED = {
    "empty": (b"", "does not begin with 'GGUF'"),
    "three bytes": (b"GGU", "does not begin with 'GGUF'"),
    "zip": (b"PK\x03\x04" + bytes(100), "does not begin with 'GGUF'"),
    "half a header": (b"GGUF\x03\x00\x00\x00\x01", "inside the header"),
    "version 1": (container(version=1), "GGUF version 1"),
    "version 4": (container(version=4), "GGUF version 4"),
    "big endian": (container(order=">"), "big-endian"),
    "2^63 pairs": (container(n_pairs=HUGE), f"claims {HUGE} key-value pairs"),
    "2^64-1 tensors": (container(n_entries=(1 << 64) - 1), "more than the file can hold"),
    "pairs past the end": (container([pair("a", U8, b"1")], n_pairs=2), "key 1: a key is empty"),
    "key of 2^63": (container([text("k", HUGE) + bytes(20)]), "exceeds the limit"),
    "key past the end": (container([text("k", 60000) + bytes(20)]), "truncated or damaged"),
    "key not UTF-8": (container([pair(b"\xff", U8, b"1")]), "not valid UTF-8"),
    "key twice": (container([pair("twin", U8, b"1")] * 2), "twin: appears twice"),
    "string of 2^63": (container([pair("s", STRING, text("x", HUGE))]), "s: a string of"),
    "string past the end": (container([pair("s", STRING, text("x", 5000))]), "s: needs 5000 bytes"),
    "unknown value type": (container([pair("odd", 13, bytes(8))]), "odd: has unknown value type 13"),
    "boolean of 2": (container([pair("b", BOOL, b"\x02")]), "b: holds a boolean"),
    "array of 2^63": (container([pair("a", ARRAY, array(U8, HUGE))]), "a: is an array of"),
    "array past the end": (container([pair("a", ARRAY, array(I32, 1000))]), "a: needs 4000 bytes"),
    "array of arrays": (container([pair("a", ARRAY, array(ARRAY, 1, array(U8, 1, b"1")))]), "array of arrays"),
    "array of unknown": (container([pair("a", ARRAY, array(99, 1, bytes(8)))]), "array of unknown type 99"),
    "too many strings": (container([pair("a", ARRAY, array(STRING, 1 << 20))]), "claims 1048576 strings"),
    "strings past the end": (
        container([pair("a", ARRAY, array(STRING, 3, text("x") + text("y", HUGE) + bytes(16)))]),
        "a: string 1 of 3 runs past the end",
    ),
    "no dimensions": (container([], [entry(dims=())], F32_ROW), "t: has 0 dimensions"),
    "five dimensions": (container([], [entry(dims=(2,) * 5)], F32_ROW), "t: has 5 dimensions"),
    "2^32-1 dimensions": (container([], [entry(num_dims=(1 << 32) - 1)], F32_ROW), "t: has 4294967295 dimensions"),
    "a dimension of 0": (container([], [entry(dims=(32, 0))], F32_ROW), "impossible dimensions [32, 0]"),
    "product overflows": (container([], [entry(dims=(1 << 32, 1 << 32))], F32_ROW), "impossible dimensions"),
    "a dimension of 2^63": (container([], [entry(dims=(HUGE,))], F32_ROW), "impossible dimensions"),
    "unknown type": (container([], [entry(kind=77)], F32_ROW), "t: is stored as unknown type 77"),
    "known, unsupported type": (container([], [entry(dims=(256,), kind=10)], F32_ROW), "stored as Q2_K"),
    "half a block": (container([], [entry(dims=(33,), kind=2)], F32_ROW), "no whole number of Q4_0 blocks"),
    "unaligned offset": (container([], [entry(offset=8)], bytes(256)), "not a multiple of the alignment 32"),
    "offset past the end": (container([], [entry(offset=1 << 62)], F32_ROW), "probably incomplete"),
    "truncated data": (container([], [entry()], bytes(100)), "t: ends at byte"),
    "tensor twice": (container([], [entry(), entry(offset=128)], bytes(256)), "t: appears twice"),
    "overlap": (container([], [entry(), entry("u", offset=96)], bytes(256)), "u: shares bytes with t"),
    "name too long": (container([], [entry("n" * 65)], F32_ROW), "exceeds the limit of 64"),
    "alignment 0": (container([pair("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment 48": (container([pair("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment true": (container([pair("general.alignment", BOOL, b"\x01")]), "power of two"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(save, name):
    raw, message = DAMAGED[name]
    path = save(raw)
    with pytest.raises(FileError) as error:
        read_gguf(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FileError, match="cannot be read"):
            read_gguf(path)


def test_claims_of_a_sparse_file_cost_no_memory(tmp_path):
    """The bytes exist (as a hole of 8 GB), so only our own limits stand between the claim and the allocation."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    claims = [
        pair("a", ARRAY, array(U8, 1 << 32)),
        pair("s", STRING, text("", 1 << 32)),
        pair("a", ARRAY, array(STRING, 1 << 28)),
        pair("a", ARRAY, array(12, MAX_ARRAY_ITEMS + 1)),
    ]
    for index, claim in enumerate(claims):
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(container([claim]))
        with path.open("r+b") as stream:
            stream.truncate(8 << 30)
        with pytest.raises(FileError, match=r"limit|can hold"):
            read_gguf(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kilobytes


def test_a_file_cut_short_after_opening_is_an_error_not_a_crash(save):
    path = save(container([], [entry(dims=(1 << 20,))], bytes(4 << 20)))
    file = read_gguf(path)
    with path.open("r+b") as stream:
        stream.truncate(4096)
    with pytest.raises(FileError, match="cut short"):
        file.stored("t")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, make_config, make_weights, as_tensors, vocabulary):
    """A whole deepseek2 file with a short vocabulary, so that damage often meets the metadata."""
    path = tmp_path_factory.mktemp("fuzz") / "valid.gguf"
    config = make_config("deepseek_v2", num_hidden_layers=2)
    fields = {**vocabulary, "general.sampling.temp": 0.7}
    write_model(config, as_tensors(make_weights(config)), fields, path, dtype="Q4_0")
    data_start = min(info.offset for info in read_gguf(path).tensors.values())
    return path.read_bytes(), data_start


def open_and_read(path):
    """Open a damaged model and read all of it; returns whether it was accepted."""
    try:
        checkpoint = open_gguf(path)
        for tensor in checkpoint.tensors.values():
            tensor.read()
    except (FileError, ConfigError):
        return False
    return True


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_truncation_is_always_noticed(tmp_path, small_model, data):
    raw, _ = small_model
    keep = data.draw(st.integers(0, len(raw) - 33))  # the last tensor may be followed by padding
    path = tmp_path / "cut.gguf"
    path.write_bytes(raw[:keep])
    assert not open_and_read(path)


@FUZZ
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # scales may become infinite
def test_flipped_bytes_give_a_model_or_a_clear_error(tmp_path, small_model, data):
    raw, data_start = small_model
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, data_start - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "flipped.gguf"
    path.write_bytes(damaged)
    open_and_read(path)


@FUZZ
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overwritten_numbers_give_a_model_or_a_clear_error(tmp_path, small_model, data):
    """Eight bytes at once, with the values that break arithmetic."""
    raw, data_start = small_model
    damaged = bytearray(raw)
    at = data.draw(st.integers(24, data_start - 8))
    value = data.draw(st.sampled_from([0, 1, HUGE - 1, HUGE, (1 << 64) - 1, 1 << 32, (1 << 31) - 1, 1 << 40]))
    damaged[at : at + 8] = struct.pack("<Q", value)
    path = tmp_path / "numbers.gguf"
    path.write_bytes(damaged)
    open_and_read(path)
