"""Planted copies are found over shards, with recall and precision stated, as datasketch finds them."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.data import texts

from shoal.data import store
from shoal.data.clean import signature_path
from shoal.data.document import Document
from shoal.data.duplicates import find_duplicates, write_duplicates
from shoal.data.signatures import BANDS, ROWS, SHINGLE, Signer, save
from shoal.errors import ConfigError, FileError


def planted(folder, pairs, per_shard=40):
    """Write texts to shards with their signatures; returns nothing but the files."""
    for shard, start in enumerate(range(0, len(pairs), per_shard)):
        signer = Signer(0)
        with store.document_writer(folder, shard) as write:
            for i, text in enumerate(pairs[start : start + per_shard], start):
                write(Document(id=str(i), text=text))
                signer.add(Document(id=str(i), text=text))
        save(signature_path(folder, shard), signer.finish())


@pytest.fixture(scope="module")
def corpus():
    """(texts, number of the original of each, share of words that were changed)."""
    rng = random.Random(7)
    originals = list(texts.english())
    rows = [(text, i, 0.0) for i, text in enumerate(originals)]
    for i in rng.sample(range(len(originals)), 40):
        rows.append((originals[i], i, 0.0))
    for share in (0.01, 0.03, 0.3, 0.6):
        rows += [(texts.edited(originals[i], share, rng), i, share) for i in rng.sample(range(len(originals)), 30)]
    head, tail = rows[: len(originals)], rows[len(originals) :]
    rng.shuffle(tail)
    return [*head, *tail]


def jaccard(left: str, right: str) -> float:
    from shoal.data.views import tokens

    def shingles(text):
        words = tokens(Document(id="", text=text))
        return {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}

    a, b = shingles(left), shingles(right)
    return len(a & b) / len(a | b)


def test_recall_and_precision(tmp_path, corpus):
    planted(tmp_path, [text for text, _, _ in corpus])
    found = find_duplicates(tmp_path, 0.7)
    first = [text for text, _, _ in corpus]
    exact = [
        i for i, (text, origin, share) in enumerate(corpus) if share == 0 and origin != i and text == first[origin]
    ]
    assert [found.how[i] for i in exact] == [1] * len(exact)  # recall of exact copies: 1
    same = [found.keeper[i] == found.keeper[corpus[i][1]] for i in range(len(corpus))]  # grouped with its original
    assert all(same[i] for i in exact)
    similar = [jaccard(text, first[origin]) for text, origin, _ in corpus]
    near = [i for i, (_, origin, share) in enumerate(corpus) if share > 0 and similar[i] >= 0.8 and origin != i]
    assert len(near) >= 30
    recall = np.mean([same[i] for i in near])
    assert recall >= 0.97
    flagged = [i for i in range(len(corpus)) if found.how[i] == 2]
    precision = np.mean([jaccard(first[i], first[found.keeper[i]]) >= 0.6 for i in flagged])
    assert precision >= 0.97
    assert not any(same[i] for i, (_, _, share) in enumerate(corpus) if share >= 0.3)


def test_agrees_with_datasketch(tmp_path, corpus):
    """The same candidates by another library's MinHash and bands; they may differ only near the threshold."""
    from datasketch import MinHash, MinHashLSH

    from shoal.data.views import tokens

    planted(tmp_path, [text for text, _, _ in corpus])
    ours = find_duplicates(tmp_path, 0.7)
    index, sketches = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS)), {}
    for i, (text, _, _) in enumerate(corpus):
        words = tokens(Document(id="", text=text))
        sketch = MinHash(num_perm=BANDS * ROWS, seed=3)
        sketch.update_batch([" ".join(words[at : at + SHINGLE]).encode() for at in range(len(words) - SHINGLE + 1)])
        best = max((sketch.jaccard(other) for other in map(sketches.__getitem__, index.query(sketch))), default=0.0)
        if abs(best - 0.7) > 0.12:  # three standard errors of 120 values
            assert (ours.how[i] > 0) == (best > 0.7), (i, best)
        index.insert(str(i), sketch)
        sketches[str(i)] = sketch


@pytest.mark.parametrize("budget", [40_000, 10_000])
def test_a_small_budget_changes_nothing(tmp_path, corpus, budget):
    planted(tmp_path, [text for text, _, _ in corpus], per_shard=64)
    whole, sliced = find_duplicates(tmp_path, 0.7), find_duplicates(tmp_path, 0.7, budget=budget)
    assert (whole.keeper == sliced.keeper).all()
    assert (whole.how == sliced.how).all()
    with pytest.raises(ConfigError, match=r"memory: .* documents need"):
        find_duplicates(tmp_path, 0.7, budget=1000)


def test_chains_have_one_keeper_and_threshold_zero_is_exact_only(tmp_path):
    rng = random.Random(3)
    chain = [texts.english()[0]]
    for _ in range(3):
        chain.append(texts.edited(chain[-1], 0.015, rng))
    planted(tmp_path, [texts.english()[5], *chain, texts.english()[5]], per_shard=2)
    found = find_duplicates(tmp_path, 0.7)
    assert found.keeper.tolist() == [0, 1, 1, 1, 1, 0]
    assert find_duplicates(tmp_path, 0).how.tolist() == [0, 0, 0, 0, 0, 1]
    write_duplicates(tmp_path, found)
    rows = [
        (d.attributes["duplicate_of"], d.attributes["duplicates_reason"])
        for d in store.read_folder(tmp_path, ["duplicates"])
    ]
    assert rows == [(None, None), (None, None), *[(1, "duplicate: near")] * 3, (0, "duplicate: exact")]
    assert [d.id for shard in store.shard_numbers(tmp_path) for d in store.read_kept(tmp_path, shard)] == ["0", "1"]


def test_short_documents_are_only_equal_if_equal(tmp_path):
    planted(tmp_path, ["one two", "one three", "one two", "", ""])
    assert find_duplicates(tmp_path, 0.7).keeper.tolist() == [0, 1, 0, 3, 3]


def test_damaged_signatures(tmp_path):
    planted(tmp_path, ["some text"])
    signature_path(tmp_path, 0).write_bytes(b"nonsense")
    with pytest.raises(FileError, match=r"00000\.npy"):
        find_duplicates(tmp_path, 0.7)
    np.save(signature_path(tmp_path, 0), np.zeros((1, 3)))
    with pytest.raises(FileError, match="not signatures"):
        find_duplicates(tmp_path, 0.7)
