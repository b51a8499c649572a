"""The middle of the perplexity: what a small reference model neither knows already nor finds strange.

Marion et al. 2023 (arXiv 2309.04564) found the middle of the distribution to prune best. The reference model is a proxy
that has read documents drawn at random; scores are its bits a byte over the beginning of each document. If the folder
was scored by a model of one's own (`shoal data prepare --entropy MODEL`), those scores are taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.data import entropy, store
from shoal.data.select.budget import Scores
from shoal.data.select.task import Task


def perplexity(task: Task) -> Scores:
    """Documents from the median outwards."""
    bits_N, model = _given(task), "attributes/surprise"
    if bits_N is None:
        bits_N, model = reference(task), "a proxy that read random documents"
    known = np.isfinite(bits_N) & task.pool.alive_N
    values_N = np.full(len(task.pool), -np.inf)
    ranks = np.argsort(np.argsort(bits_N[known], kind="stable"), kind="stable") / max(int(known.sum()) - 1, 1)
    values_N[known] = -np.abs(ranks - 0.5)
    reasons = {int(number): "too short to score" for number in np.flatnonzero(task.pool.alive_N & ~known)}
    return Scores(values_N=values_N, reasons=reasons, facts={"reference": model})


def reference(task: Task) -> NDArray[np.float64]:
    """Bits a byte of every document alive under a proxy that has read at random; NaN elsewhere."""
    found = task.journal.get("reference")
    if found is None:
        proxies = task.asked()
        learner = proxies(task.seed)
        order = np.random.default_rng([task.seed, 3]).permutation(task.alive)
        learner.read(order, proxies.tokens)
        found = task.journal.put("reference", {"bits": learner.surprise(task.alive).tolist()})
    bits_N = np.full(len(task.pool), np.nan)
    bits_N[task.alive] = found["bits"]
    return bits_N


def _given(task: Task) -> NDArray[np.float64] | None:
    folder = task.pool.folder
    if entropy.SCORES not in store.attribute_names(folder):
        return None
    columns = (store.read_attributes(folder, entropy.SCORES, n)["bits_per_byte"] for n in store.shard_numbers(folder))
    return np.array([value for column in columns for value in column], np.float64)
