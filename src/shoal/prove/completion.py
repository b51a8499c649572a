"""Code completion as editors ask for it: a file is cut off at the start of a line, and the model writes that line.

Exact match is the share of lines that are right up to white space at their ends; BLEU is sacrebleu's corpus BLEU over
words and marks.

Shapes: B cases, P tokens of a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shoal.data.select.corpus import Corpus
from shoal.errors import ConfigError, MissingExtraError
from shoal.formats.tokenizer import Tokenizer
from shoal.model import Model, new_cache
from shoal.prove.proxy import autocast

ANSWER = 24  # tokens that a model may write
LEAST = 8  # characters of a line that is asked for
_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Prompts of equal length, [B, P], and the lines that follow them."""

    prompts_BP: NDArray[np.int64]
    lines: tuple[str, ...]


def make_cases(corpus: Corpus, wanted: Sequence[int], tokenizer: Tokenizer, *, prompt: int, count: int) -> Cases:
    """Up to `count` cases from the wanted documents, as many from each as it takes, at places that hashing spreads out.

    A place is a token with which a line begins, after at least `prompt` tokens; the line must have `LEAST` characters
    and fit into `ANSWER` tokens. Raises ConfigError if there is none.
    """
    rng = np.random.default_rng(12)
    prompts, lines = [], []
    each = -(-count // max(len(wanted), 1))
    for number in wanted:
        ids = corpus.ids(number)
        texts = [tokenizer.decode(ids[at : at + 1].tolist(), continuing=True) for at in range(len(ids))]
        starts = [at for at in range(prompt, len(ids) - ANSWER) if texts[at - 1].endswith("\n")]
        taken = 0
        for at in rng.permutation(starts).tolist() if starts else []:
            line, ended, _ = tokenizer.decode(ids[at : at + ANSWER].tolist(), continuing=True).partition("\n")
            if taken < each and ended and len(line.strip()) >= LEAST:
                prompts.append(ids[at - prompt : at])
                lines.append(line)
                taken += 1
    if not prompts:
        raise ConfigError("held_out", f"holds no line of code that {prompt} tokens precede; its files are too short")
    chosen = np.sort(rng.permutation(len(prompts))[:count])
    return Cases(prompts_BP=np.stack([prompts[i] for i in chosen]), lines=tuple(lines[i] for i in chosen))


@torch.no_grad()
def complete(model: Model, tokenizer: Tokenizer, prompts_BP: NDArray[np.int64], batch: int = 32) -> list[str]:
    """The line that the model writes greedily after each prompt."""
    out = []
    for start in range(0, len(prompts_BP), batch):
        new = torch.from_numpy(prompts_BP[start : start + batch])
        cache = new_cache(model.config, batch=len(new), capacity=new.shape[1] + ANSWER, device=torch.device("cpu"))
        written = []
        for _ in range(ANSWER):
            with autocast():
                new = model(new, cache=cache, last_only=True)[:, -1].argmax(-1, keepdim=True)
            written.append(new)
        rows = torch.cat(written, 1).tolist()
        out += [tokenizer.decode(row, continuing=True).split("\n", 1)[0] for row in rows]
    return out


def exact_match(answers: Sequence[str], lines: Sequence[str]) -> float:
    return sum(a.strip() == b.strip() for a, b in zip(answers, lines, strict=True)) / len(lines)


def bleu_metric() -> Any:
    """sacrebleu's metric over words that are cut already, or MissingExtraError."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise MissingExtraError("prove", "BLEU") from error
    return BLEU(tokenize="none", force=True)


def bleu(answers: Sequence[str], lines: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, over words and single marks; exponential smoothing, as sacrebleu has it by default."""
    metric = bleu_metric()
    sides = [[" ".join(_WORD.findall(text)) for text in side] for side in (answers, lines)]
    return float(metric.corpus_score(sides[0], [sides[1]]).score)
