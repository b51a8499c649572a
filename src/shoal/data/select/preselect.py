"""Predictive strength: PreSelect (Shum et al. 2025, arXiv 2503.00808).

A text is worth reading if models that are good at the target lose less on it: its strength is the share of pairs of
models whose order by loss on the text agrees with their order by quality (§3.1, eq. 1-2). The strongest and the weakest
texts of a sample teach a light classifier, which scores the whole pool (§3.2).

What is the paper's: the strength, the classifier on the two ends of a sample, losses by character rather than by token.
What is not: the paper takes six open models of 0.4 to 65 billion weights and orders them by benchmarks; here the models
are proxies that read different parts of the pool (one a cluster, and the pool at random), ordered by their loss on the
judging half of the target sample. Its classifier is fastText on 200 000 + 200 000 texts, here logistic regression on
hashed words and pairs of words on a quarter of the sample at each end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.budget import Scores
from shoal.data.select.classifier import examples, fit, score
from shoal.data.select.features import clusters, embed
from shoal.data.select.task import Task

MODELS = 5
SAMPLE = 2000  # documents whose strength is measured
END = 0.25  # of the sample, at each end


def preselect(task: Task) -> Scores:
    """Log-odds of being like the texts of most predictive strength."""
    rng = np.random.default_rng([task.seed, 4])
    sample = np.sort(rng.permutation(task.alive)[:SAMPLE])
    label_N = clusters(embed(task.pool, seed=task.seed), task.alive, MODELS - 1, task.seed)
    quality, losses = [], []
    for model in range(MODELS):
        found = task.journal.get(f"model-{model}")
        if found is None:
            proxies = task.asked()
            learner = proxies(task.seed)
            here = task.alive[label_N[task.alive] == model]
            here = here if len(here) else task.alive  # the last model's, and where there are fewer clusters
            learner.read(rng.permutation(here), proxies.tokens)
            found = {"quality": -learner.loss(), "losses": learner.surprise(sample).tolist()}
            task.journal.put(f"model-{model}", found)
        task.notice("models", model + 1, MODELS)
        quality.append(found["quality"])
        losses.append(found["losses"])
    strength = predictive_strength(np.array(quality), np.array(losses))
    known = np.flatnonzero(np.isfinite(strength))
    order = known[np.argsort(strength[known], kind="stable")]
    end = max(1, int(END * len(order)))
    best, worst = (examples(task.pool, sample[np.sort(part)]) for part in (order[-end:], order[:end]))
    parameters = fit(best, worst, np.ones(end), np.ones(end))
    facts = {"models": MODELS, "sample": len(sample), "quality": [round(one, 4) for one in quality]}
    return Scores(values_N=score(task.pool, parameters), facts=facts)


def predictive_strength(quality_M: NDArray[np.float64], losses_MN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of pairs of models of which the better one loses less on the text; equal losses do not agree."""
    better, worse = np.nonzero(quality_M[:, None] > quality_M[None, :])
    if not len(better):
        return np.zeros(losses_MN.shape[1])
    agree: NDArray[np.float64] = (losses_MN[better] < losses_MN[worse]).mean(axis=0)
    return np.where(np.isfinite(losses_MN).all(axis=0), agree, np.nan)
