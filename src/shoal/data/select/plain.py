"""The two baselines that do not look at the target: chance, and chance among what heuristic rules let through."""

from __future__ import annotations

import numpy as np

from shoal.data import store
from shoal.data.rules import judge, rules_for
from shoal.data.select.budget import Scores
from shoal.data.select.task import Task


def random(task: Task) -> Scores:
    """Documents in an order that the seed decides."""
    return Scores(values_N=np.random.default_rng([task.seed, 1]).random(len(task.pool)))


def heuristics(task: Task) -> Scores:
    """The same order, without what the rules of `auto` object to: Gopher's for text, those for code."""
    rules = rules_for(("auto",))
    values = random(task).values_N
    reasons: dict[int, str] = {}
    for number, document in enumerate(store.read_folder(task.pool.folder)):
        if task.pool.alive_N[number]:
            kind = "code" if document.metadata.get("kind") == "code" else "text"
            reason = judge(document, rules[kind])
            if reason is not None:
                reasons[number] = reason
    values[list(reasons)] = -np.inf
    return Scores(values_N=values, reasons=reasons, facts={"objected": len(reasons)})
