"""Hashed n-gram importance resampling: DSIR (Xie et al. 2023, arXiv 2302.03169).

A document's weight is p(document) / q(document) for bags of hashed words and pairs of words, p fitted to the target and
q to the pool; documents are drawn by it without replacement (Gumbel top-k).

The paper's code adds 1e-8 to each bucket's share, which fits its targets of millions of words. With a sample of some
hundred documents most buckets of a document are unseen and each costs e^-18, so that the shortest documents win; one is
added to each count here instead (Laplace).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.budget import Scores, gumbel
from shoal.data.select.task import Task


def log_ratio(target_B: NDArray[np.float64], pool_B: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p - log q of each bucket, from counts."""
    p_B = (target_B + 1) / (target_B + 1).sum()
    q_B = (pool_B + 1) / (pool_B + 1).sum()
    ratio: NDArray[np.float64] = np.log(p_B) - np.log(q_B)
    return ratio


def dsir(task: Task) -> Scores:
    """log importance + Gumbel noise."""
    ratio_B = log_ratio(task.target.totals(), task.pool.totals(task.pool.alive_N))
    weights_N = task.pool.dot(ratio_B)
    return Scores(values_N=weights_N + gumbel(len(weights_N), task.seed))
