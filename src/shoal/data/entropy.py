"""Stage one of selection: how much a text surprises a small reference model, how well it compresses, the band between.

The low tail is what the model (or a compressor) already knows: boilerplate, licences, tables that repeat. The high tail
is what nobody can learn: noise, keys, broken text. Both tails go; what lies between informs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.data import store
from shoal.data.document import Document
from shoal.data.streams import arrow

if TYPE_CHECKING:
    from shoal.engine.llm import LLM

SCORES, VERDICT = "surprise", "band"
PASSAGE = 256  # tokens of a passage
PASSAGES = 2  # of a document: its beginning and its middle
CHARACTERS = 10 * PASSAGE  # cut out before tokenizing, which is more than a passage holds
TOGETHER = 4  # passages that go through the engine at once
LEAST_TOKENS = 16  # shorter passages say nothing
REASONS = (
    None, "compressibility: repeats itself", "compressibility: noise", "surprise: already known", "surprise: noise",
)  # fmt: skip
LEAST_GROUP = 20  # documents of a kind and size, below which no tail is cut


@dataclass(frozen=True)
class Surprise:
    """What the reference model made of one passage, or of a document's passages together.

    Attributes:
        bits_per_byte: -log2 of the probability it gave to the text, over the UTF-8 bytes.
        bits_per_token: the same over the tokens.
        entropy: bits of its own uncertainty about each next token, in the mean. Where `bits_per_token` is far above it,
            the model was sure and wrong.
        tokens: how many were predicted.
    """

    bits_per_byte: float
    bits_per_token: float
    entropy: float
    tokens: int


def open_reference(model: str, threads: int | None = None) -> LLM:
    """The reference model in int8, with room for the passages that run together."""
    from shoal.engine import LLM

    return LLM(model, weights="q8", threads=threads, max_context=PASSAGE, cache_tokens=TOGETHER * PASSAGE)


def surprise(llm: LLM, text: str) -> Surprise | None:
    """Score one passage; None if it is too short. The model sees nothing before it."""
    ids = llm.tokenizer.encode(text)[:PASSAGE]
    if len(ids) < LEAST_TOKENS:
        return None
    bits, entropy = _bits(llm.logits(ids)[:-1], np.array(ids[1:]))
    size = sum(len(llm.tokenizer.token_bytes(token)) for token in ids[1:])
    return Surprise(float(bits.sum()) / max(size, 1), float(bits.mean()), float(entropy.mean()), len(bits))


def _bits(logits_TV: NDArray[np.float32], targets_T: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """-log2 p of each target, and the entropy of each row in bits."""
    top_T = logits_TV.max(axis=1)
    logits_TV -= top_T[:, None]
    chosen_T = logits_TV[np.arange(len(targets_T)), targets_T]
    weights_TV = np.exp(logits_TV)
    total_T = weights_TV.sum(axis=1, dtype=np.float64)
    mean_T = np.einsum("tv,tv->t", weights_TV, logits_TV, dtype=np.float64) / total_T
    log_T = np.log(total_T)
    return (log_T - chosen_T) / math.log(2), (log_T - mean_T) / math.log(2)


def score_documents(llm: LLM, documents: Sequence[Document]) -> list[tuple[Surprise | None, list[float]]]:
    """For each document its surprise over all passages (None: too short), and the bits a byte of each passage.

    Passages run together in the engine; its results do not depend on what runs beside them.
    """
    passages = [(number, text) for number, one in enumerate(documents) for text in _passages(one.text)]
    with ThreadPoolExecutor(TOGETHER) as pool:
        scores = list(pool.map(lambda item: surprise(llm, item[1]), passages))
    found: list[list[Surprise]] = [[] for _ in documents]
    for (number, _), score in zip(passages, scores, strict=True):
        if score is not None:
            found[number].append(score)
    return [(_together(scores), [round(one.bits_per_byte, 4) for one in scores]) for scores in found]


def score_shard(llm: LLM, folder: Path, shard: int, verdicts: Sequence[str]) -> dict[str, Any]:
    """Write `attributes/surprise` for one shard; documents that a verdict has dropped already get nulls."""
    rows: list[tuple[Surprise | None, list[float]]] = []
    for batch in _batches(store.read_shard(folder, shard, verdicts)):
        wanted = [one for one in batch if store.reason_of(one, verdicts) is None]
        scores = iter(score_documents(llm, wanted))
        rows += [next(scores) if store.reason_of(one, verdicts) is None else (None, []) for one in batch]
    names = ("bits_per_byte", "bits_per_token", "entropy", "tokens")
    pyarrow = arrow()
    columns = {
        name: pyarrow.array([None if s is None else round(getattr(s, name), 4) for s, _ in rows], pyarrow.float32())
        for name in names
    }
    columns["scored_tokens"] = columns.pop("tokens")
    columns["passages"] = pyarrow.array([passages for _, passages in rows], pyarrow.list_(pyarrow.float32()))
    store.write_attributes(folder, SCORES, shard, columns)
    return {"scored": sum(s is not None for s, _ in rows), "tokens": sum(s.tokens for s, _ in rows if s is not None)}


def choose_band(
    folder: Path, band: tuple[float, float], verdicts: Sequence[str], *, with_model: bool
) -> dict[str, Any]:
    """Write the verdict `attributes/band`: reasons for what lies below or above the quantiles `band`.

    Compressibility is compared among documents of a kind and size (a short text compresses less whatever it says), the
    model's bits a byte among documents of a kind.

    Returns:
        by measure and group: the limits and how many were cut on either side.
    """
    shards = store.shard_numbers(folder)
    columns = [_columns(folder, shard, verdicts, with_model) for shard in shards]
    groups, kinds, compression, bits, alive = (np.concatenate(one) for one in zip(*columns, strict=True))
    cut = np.zeros(len(groups), np.int8)  # 1 and 2 below and above by compressibility, 3 and 4 by surprise
    limits = {"compression": _cut(cut, compression, groups, alive, band, 1)}
    if with_model:
        limits["bits_per_byte"] = _cut(cut, bits, kinds, alive & ~np.isnan(bits), band, 3)
    start = 0
    for shard, (first, *_) in zip(shards, columns, strict=True):
        stop = start + len(first)
        store.write_verdict(folder, VERDICT, shard, [REASONS[number] for number in cut[start:stop].tolist()])
        start = stop
    return limits


def _columns(folder: Path, shard: int, verdicts: Sequence[str], with_model: bool) -> tuple[NDArray[Any], ...]:
    """(kind and size, kind, compression, bits a byte, not dropped yet) of a shard's documents."""
    measures = store.read_attributes(folder, "measures", shard)
    kinds = np.array(measures["kind"], "U8")
    sizes = np.array([count.bit_length() for count in measures["characters"]], "U2")
    compression = np.array(measures["compression"], np.float32)
    bits = np.full(len(kinds), np.nan, np.float32)
    if with_model:
        bits = np.array(store.read_attributes(folder, SCORES, shard)["bits_per_byte"], np.float32)  # None becomes NaN
    alive = np.ones(len(kinds), bool)
    for name in verdicts:
        alive &= np.array([one is None for one in store.read_attributes(folder, name, shard)[f"{name}_reason"]], bool)
    return np.char.add(np.char.add(kinds, "/"), sizes), kinds, compression, bits, alive


def _cut(
    cut: NDArray[np.int8], values: NDArray[Any], groups: NDArray[Any], alive: NDArray[np.bool_],
    band: tuple[float, float], number: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    limits: dict[str, dict[str, float]] = {}
    for group in np.unique(groups[alive]).tolist():
        here = np.flatnonzero(alive & (groups == group))
        if len(here) < LEAST_GROUP:
            continue
        low, high = np.quantile(values[here], band, method="inverted_cdf")
        below, above = here[values[here] < low], here[values[here] > high]
        cut[below] = np.where(cut[below], cut[below], number)
        cut[above] = np.where(cut[above], cut[above], number + 1)
        limits[group] = {"low": float(low), "high": float(high), "below": len(below), "above": len(above)}
    return limits


def _passages(text: str) -> Iterator[str]:
    """Pieces of a text from which passages are taken: its beginning and, if it is long enough, its middle."""
    yield text[:CHARACTERS]
    if len(text) >= 2 * CHARACTERS:
        for part in range(1, PASSAGES):
            start = len(text) * part // PASSAGES
            yield text[start : start + CHARACTERS]


def _together(scores: Sequence[Surprise]) -> Surprise | None:
    tokens = sum(one.tokens for one in scores)
    if not tokens:
        return None
    bits = sum(one.bits_per_token * one.tokens for one in scores)
    size = sum(one.bits_per_token * one.tokens / one.bits_per_byte for one in scores if one.bits_per_byte > 0)
    entropy = sum(one.entropy * one.tokens for one in scores) / tokens
    return Surprise(bits / max(size, 1), bits / tokens, entropy, tokens)


def _batches(documents: Iterator[Document], count: int = 32) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for document in documents:
        batch.append(document)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch
