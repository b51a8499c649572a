"""Embeddings against the hidden states of transformers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.conftest import LLAMA, V2, V3, open_tiny, tiny

from shoal.errors import RequestError


@pytest.mark.parametrize("case", [V2, V3, LLAMA], ids=["v2", "v3", "llama"])
@pytest.mark.parametrize("length", [1, 7, 300])
def test_vectors_are_those_of_transformers(case: dict[str, Any], length: int) -> None:
    hf, checkpoint = tiny(case)
    llm = open_tiny(checkpoint)
    ids = random.Random(length).choices(range(97), k=length)
    with torch.no_grad():
        states = hf.model(torch.tensor([ids])).last_hidden_state[0].numpy().astype(np.float64)
    for pooling, expected in (("mean", states.mean(axis=0)), ("last", states[-1])):
        vector = llm.embed([ids], pooling=pooling)[0]
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=2e-4)
        assert vector.dtype == np.float32


def test_order_and_company_change_nothing_and_answers_stay_as_they_are() -> None:
    llm = open_tiny(tiny(V2)[1])
    texts = [random.Random(n).choices(range(97), k=n) for n in (3, 400, 64, 1)]
    before = llm.logits(texts[0])
    alone = [llm.embed([text])[0] for text in texts]
    np.testing.assert_array_equal(llm.embed(texts), alone)
    np.testing.assert_array_equal(llm.embed(texts[::-1])[::-1], alone)
    np.testing.assert_array_equal(llm.logits(texts[0]), before)


def test_weights_are_shared_with_the_model() -> None:
    llm = open_tiny(tiny(V3)[1])
    before = dict(llm._core.plan.weights)
    llm.embed([[1, 2]])
    after = llm._core.plan.weights
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)


def test_texts_too_short_and_too_long_are_refused() -> None:
    llm = open_tiny(tiny(V2)[1], max_context=100)
    for ids in ([], [1] * 101):
        with pytest.raises(RequestError):
            llm.embed([ids])
    assert llm.embed([]).shape == (0, llm.config.hidden_size)
