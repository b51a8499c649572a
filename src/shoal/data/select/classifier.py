"""Logistic regression on hashed words and pairs of words, target against pool: the plain quality classifier of GPT-3
(arXiv 2005.14165, app. A) and of fastText filters, here without its random acceptance.

Shapes: N documents, F measures.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.budget import Scores
from shoal.data.select.corpus import BUCKETS, MEASURES, Corpus
from shoal.data.select.task import Task

STEPS, RATE, DECAY = 200, 0.05, 1e-4  # of Adam over all documents at once
NEGATIVES = 20_000  # documents of the pool that it learns from, at most


@dataclass(frozen=True)
class Examples:
    """Documents as sparse rows: log(1 + counts) at length 1, and what was measured about them where that is asked for.

    Attributes:
        rows, columns, values: place and value of everything that is not zero.
        count: documents.
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    values: NDArray[np.float64]
    count: int

    def odds(self, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds of each document under `fit`'s parameters."""
        products = np.bincount(self.rows, self.values * parameters[self.columns], self.count)
        return np.asarray(products + parameters[-1], np.float64)


def classifier(task: Task) -> Scores:
    """The most target-like documents first."""
    rng = np.random.default_rng([task.seed, 2])
    negatives = np.sort(rng.permutation(task.alive)[:NEGATIVES])
    wanted, others = examples(task.target, np.arange(len(task.target))), examples(task.pool, negatives)
    parameters = fit(wanted, others, np.ones(wanted.count), np.ones(others.count))
    return Scores(values_N=score(task.pool, parameters))


def score(corpus: Corpus, parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-odds of every document of a corpus, without measures."""
    lengths_N = np.maximum(np.sqrt(corpus.squares()), 1e-9)
    return np.asarray(corpus.dot(parameters[:BUCKETS], log=True) / lengths_N + parameters[-1], np.float64)


def examples(corpus: Corpus, numbers: NDArray[np.int64], yardstick: Corpus | None = None) -> Examples:
    """Some documents of a corpus.

    Args:
        yardstick: append `MEASURES`, by its mean and deviation, a tenth as long as words.
    """
    rows, columns, values = [], [], []
    for row, (buckets, counts) in enumerate(corpus.bags(numbers.tolist())):
        value = np.log1p(np.asarray(counts, np.float64))
        rows.append(np.full(len(buckets), row))
        columns.append(buckets.astype(np.int64))
        values.append(value / max(float(np.sqrt((value**2).sum())), 1e-9))
    if yardstick is not None:
        mean, deviation = yardstick.measures_NF.mean(axis=0), yardstick.measures_NF.std(axis=0) + 1e-6
        measured_NF = 0.1 * np.clip((corpus.measures_NF[numbers] - mean) / deviation, -3, 3)
        rows.append(np.repeat(np.arange(len(numbers)), len(MEASURES)))
        columns.append(np.tile(BUCKETS + np.arange(len(MEASURES)), len(numbers)))
        values.append(measured_NF.ravel().astype(np.float64))
    return Examples(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), len(numbers))


def fit(
    wanted: Examples, others: Examples, wanted_N: NDArray[np.float64], others_N: NDArray[np.float64],
    start: NDArray[np.float64] | None = None, *, steps: int = STEPS, decay: float = DECAY,
) -> NDArray[np.float64]:  # fmt: skip
    """Logistic regression, wanted against others, documents weighed within their side, the sides alike.

    Adam over everything at once, so that nothing is drawn; its pull to zero is part of the gradient, which makes it
    strong where the data say little.

    Args:
        start: parameters to go on from.

    Returns:
        a weight for each bucket, for each measure, and the bias.
    """
    sides = [(wanted, 1.0, 0.5 * wanted_N / wanted_N.sum()), (others, 0.0, 0.5 * others_N / others_N.sum())]
    parameters = np.zeros(BUCKETS + len(MEASURES) + 1) if start is None else start.copy()
    first, second = np.zeros_like(parameters), np.zeros_like(parameters)
    for step in range(1, steps + 1):
        gradient = decay * parameters
        gradient[-1] = 0
        for side, label, weights in sides:
            error = (1 / (1 + np.exp(-np.clip(side.odds(parameters), -30, 30))) - label) * weights
            gradient[:-1] += np.bincount(side.columns, side.values * error[side.rows], len(parameters) - 1)
            gradient[-1] += error.sum()
        first += 0.1 * (gradient - first)
        second += 0.01 * (gradient**2 - second)
        parameters -= RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return parameters
