"""A selection from beginning to end: pool, target, a method, the budget, a verdict, a page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.data import store, vocabulary
from shoal.data.document import text_hash
from shoal.data.pack import verdicts_digest
from shoal.data.run import Machine
from shoal.data.select import adversarial, classifier, dsir, perplexity, plain, preselect
from shoal.data.select.budget import Scores, fill
from shoal.data.select.corpus import FOLDER, Corpus, Pool, make_part, open_pool
from shoal.data.select.target import Target, overlaps, read_target, read_texts
from shoal.data.select.task import Journal, Proxies, Task
from shoal.errors import ConfigError
from shoal.formats.atomic import atomic_file
from shoal.formats.tokenizer import Tokenizer

METHODS: dict[str, Callable[[Task], Scores]] = {
    "random": plain.random,
    "heuristics": plain.heuristics,
    "dsir": dsir.dsir,
    "perplexity": perplexity.perplexity,
    "classifier": classifier.classifier,
    "preselect": preselect.preselect,
    "adversarial": adversarial.adversarial,
}
VERDICT = "select"
ROUNDS = 3
Notice = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What selections over one folder for one target share.

    Attributes:
        learn, judge: the halves of the target sample.
        held_out: what results are judged by in the end; None if it was not named.
        overlap: documents of the pool that hold a piece of `judge` or `held_out`, by number; they are out of the pool.
        key: of everything above.
    """

    folder: Path
    pool: Pool
    learn: Corpus
    judge: Corpus
    held_out: Corpus | None
    held_out_code: tuple[bool, ...]
    target: Target
    overlap: dict[int, str]
    tokenizer: Tokenizer
    key: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method keeps: `picked_N` of the pool's documents, at most `budget` tokens of them."""

    method: str
    share: float
    budget: int
    picked_N: NDArray[np.bool_]
    scores: Scores


def open_ground(
    folder: Path, targets: Sequence[Path], held_out: Sequence[Path] = (), *, seed: int = 0, drop_overlap: bool = False,
    text_field: str = "text", machine: Machine | None = None, notice: Notice = lambda *_: None,
) -> Ground:  # fmt: skip
    """Read pool, target and held-out set, and keep them apart.

    Documents of the pool that hold a piece of the held-out set or of the judging half leave the pool: with them inside,
    a method could be good at finding what it is judged by.

    Raises:
        FileError, ConfigError: something is missing, or target and held-out set overlap.
    """
    verdicts = [name for name in store.verdict_names(folder) if name != VERDICT]
    documents = read_texts(held_out, text_field) if held_out else []
    target = read_target(targets, documents, seed=seed, drop_overlap=drop_overlap, text_field=text_field)
    pool = open_pool(folder, verdicts, machine or Machine(workers=1), lambda *done: notice("number", *done))
    names = [text_hash(one.text) for one in (*target.learn, *target.judge, *documents)]
    key = _digest(vocabulary.digest(folder / "tokenizer"), verdicts_digest(folder, tuple(verdicts)), *verdicts, *names)
    journal = Journal(folder / FOLDER, key)
    found = journal.get("overlap")
    if found is None:
        pieces = overlaps(store.read_folder(folder), [*target.judge, *documents])
        found = journal.put("overlap", {str(number): reason for number, reason in pieces.items()})
    overlap = {int(number): reason for number, reason in found.items()}
    pool.alive_N[list(overlap)] = False
    if not pool.alive_N.any():
        raise ConfigError("folder", "no document is left to choose from")
    tokenizer = vocabulary.load_tokenizer(str(folder / "tokenizer"))
    learn, judge, last = (
        Corpus(parts=(make_part(side, tokenizer),)) for side in (target.learn, target.judge, documents)
    )
    return Ground(
        folder=folder, pool=pool, learn=learn, judge=judge, held_out=last if documents else None, target=target,
        held_out_code=tuple(one.metadata.get("kind") == "code" for one in documents), overlap=overlap,
        tokenizer=tokenizer, key=key,
    )  # fmt: skip


def choose(
    ground: Ground, method: str, share: float, *, seed: int = 0, rounds: int = ROUNDS, proxies: Proxies | None = None,
    notice: Notice = lambda *_: None,
) -> Choice:  # fmt: skip
    """Ask a method and fill the budget: `share` of the pool's tokens.

    Raises:
        ConfigError: no such method, or the budget holds not one document.
    """
    if method not in METHODS:
        raise ConfigError("method", f"must be one of {', '.join(METHODS)}, got {method!r}")
    pool, budget = ground.pool, int(share * ground.pool.tokens)
    if budget < int(pool.lengths_N[pool.alive_N].min()):
        raise ConfigError("share", f"{share:g} of {pool.tokens} tokens is less than the shortest document")
    settings = [method, str(budget), str(rounds), str(seed), "" if proxies is None else repr(proxies)]
    journal = Journal(ground.folder / FOLDER / f"{method}-{seed}", _digest(ground.key, *settings))
    task = Task(
        pool=pool, target=ground.learn, budget=budget, seed=seed, rounds=rounds, journal=journal, proxies=proxies,
        notice=notice,
    )  # fmt: skip
    scores = METHODS[method](task)
    values_N = np.where(pool.alive_N, scores.values_N, -np.inf)
    picked_N = fill(values_N, pool.lengths_N, budget) if scores.picked_N is None else scores.picked_N
    if not picked_N.any():
        raise ConfigError("share", f"no document that {method} wants fits into {budget} tokens")
    return Choice(method=method, share=share, budget=budget, picked_N=picked_N, scores=scores)


def write_choice(ground: Ground, choice: Choice, settings: dict[str, Any]) -> dict[str, Any]:
    """Write the verdict `select` of every shard and `selection.json`. Returns what the latter holds."""
    pool, first = ground.pool, 0
    beyond = f"{choice.method}: beyond {choice.share:.3g} of the tokens"
    for shard in store.shard_numbers(ground.folder):
        reasons: list[str | None] = []
        count = len(store.read_attributes(ground.folder, "measures", shard)["kind"])
        for number in range(first, first + count):
            if number in ground.overlap:
                reasons.append(f"held out: {ground.overlap[number]}")
            elif choice.picked_N[number] or not pool.alive_N[number]:
                reasons.append(None)
            else:
                said = choice.scores.reasons.get(number)
                reasons.append(f"{choice.method}: {said}" if said else beyond)
        values = choice.scores.values_N[first : first + len(reasons)]
        columns = {"select_score": np.where(np.isfinite(values), values, np.nan)}
        store.write_verdict(ground.folder, VERDICT, shard, reasons, columns)
        first += len(reasons)
    data = {"settings": settings, **describe(ground, choice), "facts": choice.scores.facts}
    with atomic_file(ground.folder / "selection.json") as out:
        out.write(json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
    return data


def describe(ground: Ground, choice: Choice) -> dict[str, Any]:
    """Plain numbers of a choice: budget, tokens and documents kept, and both by source."""
    pool, picked = ground.pool, choice.picked_N
    groups = {
        name: [int(pool.lengths_N[side & (pool.sources_N == name)].sum()) for side in (pool.alive_N, picked)]
        for name in sorted(set(pool.sources_N[pool.alive_N].tolist()))
    }
    return {
        "method": choice.method,
        "share": choice.share,
        "budget": choice.budget,
        "tokens": int(pool.lengths_N[picked].sum()),
        "documents": int(picked.sum()),
        "pool": {"tokens": pool.tokens, "documents": int(pool.alive_N.sum())},
        "target": {"learn": len(ground.learn), "judge": len(ground.judge), "left out": len(ground.target.overlap)},
        "overlap": len(ground.overlap),
        "sources": groups,
    }


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()
