"""Token shards: what is written is what is read, and no lie in index or files goes unnoticed."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import ShardWriter, open_shards
from shoal.errors import ConfigError, FileError

DIGEST = "ab" * 32


def write(folder, documents, *, vocab_size=1000, shard_tokens=10, **rest):
    with ShardWriter(
        folder, vocab_size=vocab_size, tokenizer_digest=DIGEST, shard_tokens=shard_tokens, **rest
    ) as writer:
        for document in documents:
            writer.add(np.asarray(document))
    return folder


def three(folder):
    """Documents of 4, 8 and 3 tokens in two shards."""
    return write(folder, [range(4), range(10, 18), range(20, 23)])


def edit(folder, change):
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@given(
    documents=st.lists(st.lists(st.integers(0, 69_999), max_size=9), max_size=12),
    shard_tokens=st.integers(1, 20),
    small=st.booleans(),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_reads_what_was_written(tmp_path_factory, documents, shard_tokens, small, data):
    vocab_size = 65_536 if small else 70_000
    documents = [[token % vocab_size for token in document] for document in documents]
    folder = write(
        tmp_path_factory.mktemp("shards") / "it", documents, vocab_size=vocab_size, shard_tokens=shard_tokens
    )
    shards = open_shards(folder, vocab_size=vocab_size, tokenizer_digest=DIGEST)
    shards.verify()
    kept = [document for document in documents if document]
    all_tokens = [token for document in kept for token in document]
    numbers = [number for number, document in enumerate(kept) for _ in document]
    assert (shards.num_tokens, shards.num_documents) == (len(all_tokens), len(kept))
    start = data.draw(st.integers(0, len(all_tokens)))
    stop = data.draw(st.integers(start, len(all_tokens)))
    tokens, found = shards.read(start, stop)
    assert tokens.tolist() == all_tokens[start:stop]
    assert found.tolist() == numbers[start:stop]
    if start < stop:
        end = shards.document_end(start)
        assert end == sum(map(len, kept[: numbers[start] + 1]))
        assert shards.document_start(start) == end - len(kept[numbers[start]])


def test_files_are_plain_little_endian_numbers(tmp_path):
    folder = three(tmp_path / "d")
    names = ["index.json", "shard-00000.ends", "shard-00000.tokens", "shard-00001.ends", "shard-00001.tokens"]
    assert sorted(os.listdir(folder)) == names
    assert (folder / "shard-00001.tokens").read_bytes() == bytes([20, 0, 21, 0, 22, 0])
    assert np.fromfile(folder / "shard-00000.ends", "<u8").tolist() == [4, 12]


def test_provenance_is_kept(tmp_path):
    source = {"source": "a corpus", "seed": 3, "licences": ["PSF-2.0"]}
    assert open_shards(write(tmp_path / "d", [[1]], provenance=source)).provenance == source


def test_a_writer_that_was_interrupted_leaves_no_readable_folder_and_can_start_again(tmp_path):
    folder = tmp_path / "d"

    def source():
        yield [1, 2, 3]
        yield [4]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(folder, source(), shard_tokens=3)
    assert sorted(os.listdir(folder)) == ["shard-00000.ends", "shard-00000.tokens"]
    with pytest.raises(FileError, match="never finished"):
        open_shards(folder)
    assert open_shards(write(folder, [[5]])).read(0, 1)[0].tolist() == [5]


def test_never_writes_into_a_folder_of_somebody_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        write(tmp_path, [[1]])
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(FileError, match="not empty"):
        write(three(tmp_path / "d"), [[1]])


@pytest.mark.parametrize(
    ("tokens", "problem"), [([1, 1000], "1000 is no id"), ([-1], "-1 is no id"), ([0.5], "whole numbers")]
)
def test_refuses_what_is_no_token(tmp_path, tokens, problem):
    with pytest.raises(ConfigError, match=problem):
        write(tmp_path / "d", [tokens])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda index: index.update(format="other"), "no index of token shards"),
        (lambda index: index.update(version=2), "reads version 1"),
        (lambda index: index.update(vocab_size=-1), "vocab_size: must be a whole number"),
        (lambda index: index.update(vocab_size=True), "vocab_size: must be a whole number"),
        (lambda index: index.update(vocab_size=70_000), "dtype: is 'uint16'"),
        (lambda index: index.update(num_tokens=14), "num_tokens: says 14, its shards hold 15"),
        (lambda index: index.update(num_documents=4), "num_documents: says 4"),
        (lambda index: index.update(tokenizer_digest="xyz"), "tokenizer_digest: must be 64 hexadecimal"),
        (lambda index: index.update(provenance=[]), "provenance: must be an object"),
        (lambda index: index.update(shards=None), "shards: must be a list"),
        (lambda index: index["shards"][0].update(name="../shard-00000"), r"shards\[0\].name: must be 'shard-00000'"),
        (lambda index: index["shards"].reverse(), r"shards\[0\].name: must be 'shard-00000'"),
        (lambda index: index["shards"][1].update(tokens=1 << 63), r"shards\[1\].tokens: must be a whole number"),
        (lambda index: index["shards"][1].pop("ends_sha256"), r"shards\[1\]: must have exactly"),
        (lambda index: index["shards"][0].update(documents=3), r"shard-00000.ends: holds 16 bytes, .* promises 24"),
        (lambda index: index["shards"][0].update(tokens=13), r"shard-00000.tokens: holds 24 bytes, .* promises 26"),
    ],
)
def test_refuses_an_index_that_lies(tmp_path, change, problem):
    folder = three(tmp_path / "d")

    def consistent(index):
        change(index)
        if problem.startswith("shard-"):  # the totals agree with the lie, only the file does not
            for name, key in (("num_tokens", "tokens"), ("num_documents", "documents")):
                index[name] = sum(shard[key] for shard in index["shards"])

    edit(folder, consistent)
    with pytest.raises(FileError, match=problem):
        open_shards(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"format": NaN}'])
def test_refuses_an_index_that_is_none(tmp_path, text):
    folder = three(tmp_path / "d")
    (folder / "index.json").write_text(text)
    with pytest.raises(FileError, match=r"index\.json"):
        open_shards(folder)


@pytest.mark.parametrize("name", ["shard-00000.tokens", "shard-00001.ends"])
def test_refuses_files_that_are_missing_truncated_or_too_long(tmp_path, name):
    folder = three(tmp_path / "d")
    whole = (folder / name).read_bytes()
    for content in (whole[:-1], whole + b"\0\0", b""):
        (folder / name).write_bytes(content)
        with pytest.raises(FileError, match=f"{name}: holds {len(content)} bytes"):
            open_shards(folder)
    (folder / name).unlink()
    with pytest.raises(FileError, match=f"{name}: cannot be read"):
        open_shards(folder)


@pytest.mark.parametrize("ends", [[12, 12], [0, 12], [13, 12], [4, 11], [4, 2**63 + 12]])
def test_refuses_ends_that_do_not_divide_the_tokens(tmp_path, ends):
    folder = three(tmp_path / "d")
    np.asarray(ends, "<u8").tofile(folder / "shard-00000.ends")
    with pytest.raises(FileError, match="does not divide 12 tokens into 2 documents"):
        open_shards(folder)


def test_refuses_tokens_past_the_vocabulary_when_they_are_read(tmp_path):
    folder = three(tmp_path / "d")
    np.asarray([20, 1000, 22], "<u2").tofile(folder / "shard-00001.tokens")
    shards = open_shards(folder)
    assert shards.read(0, 13)[0].tolist()[-1] == 20
    with pytest.raises(FileError, match=r"shard-00001.tokens: token 1 is 1000, past the vocabulary of 1000"):
        shards.read(0, 14)


@pytest.mark.parametrize("name", ["shard-00000.tokens", "shard-00001.tokens", "shard-00000.ends"])
def test_verify_finds_a_flipped_bit(tmp_path, name):
    folder = write(tmp_path / "d", [range(4), range(10, 18), range(20, 23)])
    shards = open_shards(folder)
    shards.verify()
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    with (folder / name).open("r+b") as file:  # in place: the size stays
        file.write(data)
    with pytest.raises(FileError, match=f"{name}: is not the file"):
        shards.verify()


def test_refuses_another_tokenizer_or_a_smaller_model(tmp_path):
    folder = three(tmp_path / "d")
    with pytest.raises(FileError, match="tokenizer_digest: is abababababab…, this tokenizer is cdcdcdcdcdcd…"):
        open_shards(folder, tokenizer_digest="cd" * 32)
    with pytest.raises(FileError, match="vocab_size: is 1000, the model embeds only 999"):
        open_shards(folder, vocab_size=999)


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path):
    folder = three(tmp_path / "d")
    shards = open_shards(folder)
    os.truncate(folder / "shard-00000.tokens", 0)
    with pytest.raises(FileError, match="has changed its size"):
        shards.read(0, 1)


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(FileError, match="is no folder of token shards"):
        open_shards(tmp_path / "nothing")
