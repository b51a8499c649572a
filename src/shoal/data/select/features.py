"""Documents as short vectors: random projections of their hashed words; clusters of them, and how crowded they stand.

Shapes: N documents, B buckets, D dimensions.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.corpus import BUCKETS, Corpus

WIDTH = 256  # of the projection
BLOCK = 512  # documents projected at once
LEARNED = 8000  # documents that cluster centres are learned from, at most
TURNS = 20
CLOSE, CROWD = 0.8, 20_000
Vectors = NDArray[np.float32]


def embed(corpus: Corpus, *, seed: int = 0) -> Vectors:
    """[N, D]: tf-idf of hashed words under a random projection (Achlioptas 2003), at length 1."""
    signs = np.random.default_rng([seed, 5]).integers(0, 2, (BUCKETS, WIDTH), np.int8)
    projection_BD = (2 * signs - 1).astype(np.float32) * _idf(corpus)[:, None]
    out = np.zeros((len(corpus), WIDTH), np.float32)
    for start in range(0, len(corpus), BLOCK):
        numbers = range(start, min(start + BLOCK, len(corpus)))
        dense_NB = np.zeros((len(numbers), BUCKETS), np.float32)
        for row, (buckets, counts) in enumerate(corpus.bags(numbers)):
            dense_NB[row, buckets] = np.log1p(counts)
        out[start : start + len(numbers)] = dense_NB @ projection_BD
    out /= np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-6)
    return out


def _idf(corpus: Corpus) -> NDArray[np.float32]:
    seen = np.zeros(BUCKETS)
    for part in corpus.parts:
        seen += np.bincount(part.buckets, minlength=BUCKETS)
    return np.log((1 + len(corpus)) / (1 + seen)).astype(np.float32)


def clusters(vectors_ND: Vectors, alive: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """A cluster of `count` for every document: k-means by cosine, begun by k-means++, learned from those alive."""
    rng = np.random.default_rng([seed, 6])
    learned = vectors_ND[np.sort(rng.permutation(alive)[:LEARNED])]
    count = max(1, min(count, len(learned)))
    centres = learned[rng.integers(len(learned))][None]
    for _ in range(1, count):
        away = np.maximum(1 - (learned @ centres.T).max(axis=1), 1e-9).astype(np.float64)
        centres = np.vstack([centres, learned[rng.choice(len(learned), p=away / away.sum())]])
    for _ in range(TURNS):
        label = (learned @ centres.T).argmax(axis=1)
        for one in np.unique(label):
            total = learned[label == one].sum(axis=0)
            centres[one] = total / max(float(np.linalg.norm(total)), 1e-6)
    return np.asarray((vectors_ND @ centres.T).argmax(axis=1), np.int64)


def crowding(vectors_ND: Vectors, weights_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """log of how much weight stands close to each document, itself included, over its own weight: 0 if it stands alone.

    Close begins at a cosine of 0.8 and counts in full at 1. Among more than `CROWD` documents only the heaviest count.
    """
    heavy = np.sort(np.argsort(-weights_N, kind="stable")[:CROWD])
    heavy = heavy[weights_N[heavy] > 0]
    words, weights = vectors_ND[heavy], weights_N[heavy].astype(np.float32)
    out = np.zeros(len(weights_N))
    for start in range(0, len(heavy), BLOCK):
        close = np.clip((words[start : start + BLOCK] @ words.T - CLOSE) / (1 - CLOSE), 0, 1)
        rows = heavy[start : start + BLOCK]
        out[rows] = np.log(np.maximum((close @ weights) / weights[start : start + BLOCK], 1))
    return out
