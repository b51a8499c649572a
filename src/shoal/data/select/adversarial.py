"""Adversarial and active selection: weights that fool a discriminator, a budget that follows measured gain.

Every document has a weight, at first the same. In each round

1. a discriminator (logistic regression over hashed words, pairs of words and measures such as compressibility; with a
   hidden layer it remembered small samples instead) learns to tell the target's documents from the pool's by weight,
   and the weights move to fool it: log w ← log w + rate · (log-odds - diversity · crowding). That is mirror ascent of
   the generator's side of the game of Goodfellow et al. 2014 (arXiv 1406.2661), in the form where the generator
   re-weighs what there is (as AdaGAN does, arXiv 1701.02386). Crowding is the log of the weight around a document over
   its own, so that a family of near copies gets the weight of one;
2. the budget goes to the documents of most weight times factor. The factor belongs to a stratum, a cluster in the
   region that the weights have reached, and says what earlier rounds have learned: it moves budget between strata;
3. a proxy reads what was picked and is judged on the other half of the target sample. From there a copy of it reads a
   little of each stratum, of what was not picked first: how much less it loses for a token is that stratum's gain;
4. the strata's factors move by the gains (exponentiated gradient, as in DoReMi, arXiv 2305.10429).

The pick of the round whose proxy lost least is the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data.select.budget import Scores, fill
from shoal.data.select.classifier import NEGATIVES, examples, fit
from shoal.data.select.features import clusters, crowding, embed
from shoal.data.select.task import Learner, Task

STRATA = 8
RATE, LIMIT = 1.0, 3.0  # of an update, and the odds (in deviations from the median) that count at most
DIVERSITY = 0.5
PROBE = 0.06  # of a proxy's tokens that it reads of each stratum
STEP = 0.5  # how far gains of one deviation move a stratum's log factor
REACH = 3  # budgets
Weights = NDArray[np.float64]


def adversarial(task: Task) -> Scores:
    """The pick of the best round; see the module's docstring."""
    views = _Views(task)
    rounds: list[dict[str, Any]] = []
    state: dict[str, Any] = {"log_weights": [0.0] * len(views.alive), "factors": [0.0] * STRATA, "strata": None}
    for number in range(task.rounds):
        found = task.journal.get(f"round-{number}")
        if found is None:
            found = task.journal.put(f"round-{number}", _round(task, views, state))
        state = found["state"]
        rounds.append(found["report"] | {"picked": found["picked"]})
        task.notice("rounds", number + 1, task.rounds)
    best = min(range(len(rounds)), key=lambda number: rounds[number]["loss"])
    picked_N = np.zeros(len(task.pool), bool)
    picked_N[rounds[best]["picked"]] = True
    values_N = np.full(len(task.pool), -np.inf)
    values_N[views.alive] = state["log_weights"]
    told = [{key: value for key, value in one.items() if key != "picked"} for one in rounds]
    return Scores(values_N=values_N, picked_N=picked_N, facts={"rounds": told, "best": best})


class _Views:
    """What stays the same over the rounds: both sides as the discriminator sees them, and what weighs them.

    Attributes:
        alive: numbers of the pool's documents; everything here is in their order.
        sample: places among them that the discriminator learns from: all, or as many as fit into memory.
        vectors_ND: of the pool's documents, for clusters and crowding.
    """

    def __init__(self, task: Task) -> None:
        pool, target = task.pool, task.target
        self.alive = task.alive
        self.lengths_N = pool.lengths_N[self.alive]
        self.vectors_ND = embed(pool, seed=task.seed)[self.alive]
        rng = np.random.default_rng([task.seed, 10])
        self.sample = np.sort(rng.permutation(len(self.alive))[:NEGATIVES])
        self.sampled = examples(pool, self.alive[self.sample], yardstick=pool)
        self._pool = pool
        self.target = examples(target, np.arange(len(target)), yardstick=pool)

    def odds(self, parameters: Weights) -> Weights:
        """The discriminator's log-odds of every document, some thousand documents in memory at a time."""
        if len(self.sample) == len(self.alive):
            return self.sampled.odds(parameters)
        blocks = (self.alive[at : at + NEGATIVES] for at in range(0, len(self.alive), NEGATIVES))
        return np.concatenate([examples(self._pool, one, yardstick=self._pool).odds(parameters) for one in blocks])


def _round(task: Task, views: _Views, state: dict[str, Any]) -> dict[str, Any]:
    """One round from the state that the last one left. Returns the new state, the pick and what to tell."""
    log_weights, told = _fool(views, np.array(state["log_weights"]))
    weights = _normal(log_weights)
    strata = np.array(_strata(task, views, weights) if state["strata"] is None else state["strata"])
    factors = np.array(state["factors"])
    order = log_weights + factors[strata]
    picked = fill(order, views.lengths_N, task.budget)
    proxies = task.asked()
    learner = proxies(task.seed)
    learner.read(views.alive[picked], proxies.tokens)
    loss = learner.loss()
    gains = _gains(task, views, learner, loss, strata, order, picked)
    budgets = np.bincount(strata, views.lengths_N * picked, STRATA)
    factors = factors + _moves(gains, budgets)
    mass = np.bincount(strata, weights, STRATA)
    report = {
        **told, "loss": loss, "documents": int(picked.sum()), "tokens": int(views.lengths_N[picked].sum()),
        "strata": [
            {"documents": int((strata == one).sum()), "tokens": int(views.lengths_N[strata == one].sum()),
             "weight": float(mass[one]), "budget": int(budgets[one]), "gain": gains[one], "factor": float(factors[one]),
             "example": int(views.alive[_heaviest(strata == one, weights)]) if (strata == one).any() else None}
            for one in range(STRATA)
        ],
    }  # fmt: skip
    new = {"log_weights": log_weights.tolist(), "factors": factors.tolist(), "strata": strata.tolist()}
    return {"state": new, "report": report, "picked": views.alive[picked].tolist()}


def _fool(views: _Views, log_weights: Weights) -> tuple[Weights, dict[str, Any]]:
    """A turn of the game: the discriminator learns, the weights move to where it sees the target."""
    weights = _normal(log_weights)
    parameters = fit(views.target, views.sampled, np.ones(views.target.count), weights[views.sample])
    odds = views.odds(parameters)
    told = float((views.target.odds(parameters) > 0).mean() / 2 + (weights * (odds < 0)).sum() / 2)
    middle = np.median(odds)
    scaled = np.clip((odds - middle) / (1.5 * np.median(np.abs(odds - middle)) + 1e-9), -LIMIT, LIMIT)
    log_weights = log_weights + RATE * (scaled - DIVERSITY * crowding(views.vectors_ND, weights))
    log_weights -= log_weights.max()
    weights = _normal(log_weights)
    # How many documents of equal weight would be as uneven: 1 / Σ w².
    return log_weights, {"told_apart": told, "effective": float(1 / (weights**2).sum())}


def _normal(log_weights: Weights) -> Weights:
    weights = np.exp(log_weights - log_weights.max())
    normal: Weights = weights / weights.sum()
    return normal


def _strata(task: Task, views: _Views, weights: Weights) -> NDArray[np.int64]:
    """Clusters of the documents; centres are learned from those that carry weight, so that strata tell them apart."""
    rng = np.random.default_rng([task.seed, 9])
    half = 0.5 * weights + 0.5 / len(weights)
    drawn = rng.choice(len(weights), size=min(4000, len(weights)), p=half / half.sum())
    return clusters(views.vectors_ND, np.unique(drawn), STRATA, task.seed)


def _gains(
    task: Task, views: _Views, learner: Learner, loss: float, strata: NDArray[np.int64], order: Weights,
    picked: NDArray[np.bool_],
) -> list[float | None]:  # fmt: skip
    """Nats that a million tokens of each stratum take off the judging half's loss, by a short probe; None: not probed.

    Probed are strata with a document among the heaviest that fill `REACH` budgets.
    """
    tokens = max(1, int(PROBE * task.asked().tokens))
    near = np.bincount(strata[fill(order, views.lengths_N, REACH * task.budget)], minlength=STRATA) > 0
    out: list[float | None] = []
    for one in range(STRATA):
        here = np.flatnonzero(strata == one)
        if not near[one]:
            out.append(None)
            continue
        first = here[np.lexsort((-order[here], picked[here]))]  # what was not picked before what was, the best first
        enough = int(np.searchsorted(np.cumsum(views.lengths_N[first]), tokens)) + 1
        probe = learner.fork()
        probe.read(views.alive[first[:enough]], tokens)
        out.append((loss - probe.loss()) / tokens * 1e6)
    return out


def _moves(gains: list[float | None], budgets: NDArray[Any]) -> Weights:
    """By how much each stratum's log factor moves: its gain less the mean, by the deviation, at most two."""
    known = np.array([one is not None for one in gains])
    moves = np.zeros(len(gains))
    if known.sum() < 2:
        return moves
    values = np.array([one for one in gains if one is not None])
    share = np.maximum(budgets[known], 1) / np.maximum(budgets[known], 1).sum()
    moves[known] = STEP * np.clip((values - (share * values).sum()) / (values.std() + 1e-9), -2, 2)
    return moves


def _heaviest(here: NDArray[np.bool_], weights: Weights) -> int:
    """The heaviest document of a stratum: what it is like."""
    return int(np.argmax(np.where(here, weights, -1)))
