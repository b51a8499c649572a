"""Stage one: the numbers of the reference model are what they are called, and the band cuts both tails."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.data import texts

from shoal import hub
from shoal.data import entropy, store
from shoal.data.clean import compression
from shoal.data.document import Document
from shoal.errors import UnknownModelError


def test_bits_and_entropy_against_plain_sums():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(7, 11)) * 4).astype(np.float32)
    targets = rng.integers(0, 11, 7)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    bits, uncertain = entropy._bits(logits.copy(), targets)
    np.testing.assert_allclose(bits, -np.log2(p[np.arange(7), targets]), rtol=1e-5)
    np.testing.assert_allclose(uncertain, -(p * np.log2(p)).sum(axis=1), rtol=1e-5)


@pytest.fixture(scope="module")
def llm():
    try:
        hub.resolve("smollm2-135m")
    except UnknownModelError:
        pytest.skip("SmolLM2 is not on this machine")
    return entropy.open_reference("smollm2-135m", threads=1)


def test_a_real_model_knows_repetition_from_prose_from_noise(llm):
    rng = random.Random(0)
    noise = " ".join("".join(rng.choices("bcdfghjklmnpqrstvwxz0123456789", k=7)) for _ in range(60))
    kinds = [("again and again " * 60), texts.english()[3], noise, "short"]
    rows = entropy.score_documents(llm, [Document(id="", text=text) for text in kinds])
    low, prose, high = (score.bits_per_byte for score, _ in rows[:3])
    assert low < 0.4 < 0.5 < prose < 2 < 3 < high
    assert rows[3] == (None, [])
    assert rows[1][0].tokens == sum(len(p) for p in [llm.tokenizer.encode(kinds[1])[:256]]) - 1
    one = entropy.score_documents(llm, [Document(id="", text=kinds[1])])[0]
    assert one == rows[1]  # what runs beside a passage changes nothing


def test_long_documents_are_scored_at_two_places(llm):
    text = " ".join(texts.english()[:6])
    assert len(text) > 2 * entropy.CHARACTERS
    [(score, passages)] = entropy.score_documents(llm, [Document(id="", text=text)])
    assert len(passages) == 2
    assert min(passages) - 1e-3 <= score.bits_per_byte <= max(passages) + 1e-3


def _folder(tmp_path, count=200):
    rng = random.Random(1)
    rows = [(text, 1.0 + rng.random()) for text in texts.english()[:count]]
    rows += [("x" * len(rows[0][0]), 0.01), ("".join(rng.choices("abcdefghijklmnopqrstuvwxyz0123", k=1500)), 9.0)]
    for shard in range(2):
        part = rows[shard::2]
        with store.document_writer(tmp_path, shard) as write:
            for i, (text, _) in enumerate(part):
                write(Document(id=str(i), text=text, metadata={"kind": "text"}))
        measures = {
            "characters": [len(text) for text, _ in part], "compression": [compression(text) for text, _ in part],
            "masked": [0] * len(part), "kind": ["text"] * len(part),
        }  # fmt: skip
        store.write_attributes(tmp_path, "measures", shard, measures)
        store.write_attributes(tmp_path, entropy.SCORES, shard, {"bits_per_byte": [bits for _, bits in part]})
    return rows


def test_the_band_cuts_both_tails(tmp_path):
    rows = _folder(tmp_path)
    limits = entropy.choose_band(tmp_path, (0.05, 0.95), [], with_model=True)
    reasons = [store.read_attributes(tmp_path, "band", shard)["band_reason"] for shard in range(2)]
    flat = [reasons[i % 2][i // 2] for i in range(len(rows))]
    assert flat[-2] in ("compressibility: repeats itself", "surprise: already known")
    assert flat[-1] in ("compressibility: noise", "surprise: noise")
    one = limits["bits_per_byte"]["text"]
    stored = np.array([bits for _, bits in rows], np.float32)
    for bits, reason in zip(stored, flat, strict=True):
        if bits < one["low"] or bits > one["high"]:
            assert reason is not None
    kept = sum(reason is None for reason in flat) / len(flat)
    assert 0.8 <= kept <= 0.95
    assert one["below"] == (stored < one["low"]).sum()


def test_small_groups_have_no_tails(tmp_path):
    _folder(tmp_path, count=4)
    assert entropy.choose_band(tmp_path, (0.4, 0.6), [], with_model=False) == {"compression": {}}
    assert set(store.read_attributes(tmp_path, "band", 0)["band_reason"]) == {None}


def test_compression():
    assert compression("") == 0
    assert compression("abc" * 1000) < 0.05 < 0.3 < compression(texts.english()[0]) < 0.7
