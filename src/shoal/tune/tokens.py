"""Examples to packed rows of tokens: what the network reads, what it is to predict, and where documents begin.

Rows are filled best-fit-decreasing (Ding et al., arXiv 2404.10830): documents are never cut to fill a row, and only
tokens of the same document see each other, so a packed row gives each example the loss it would have alone.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import FileError, RequestError
from shoal.formats.chat import ChatFormat
from shoal.formats.chat_answers import Tokens, encode_answers
from shoal.formats.tokenizer import Tokenizer
from shoal.train.batches import IGNORE, Batch
from shoal.tune.examples import Example

PADDING = -1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Packed examples, int64 [B, T].

    Attributes:
        tokens: token ids; the rest of a row is padding.
        targets: the next token where it is to be learnt, else `IGNORE`.
        documents: a number for each document of a row, `PADDING` for the rest of it. Rotary positions are relative,
            so they may count on from one document to the next.
    """

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, numbers: list[int]) -> Batch:
        """The rows of these numbers."""
        return Batch(self.tokens[numbers], self.targets[numbers], self.documents[numbers])


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of the examples: how many sequences, tokens and learnt tokens, cut and dropped examples."""

    sequences: int
    tokens: int
    learnt: int
    cut: int
    dropped: int


def spans(documents_T: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Where the documents of a row begin and end, padding left out."""
    edges = [0, *(np.flatnonzero(np.diff(documents_T)) + 1).tolist(), len(documents_T)]
    return [(begin, end) for begin, end in itertools.pairwise(edges) if documents_T[begin] != PADDING]


def encode_examples(
    examples: Iterable[Example],
    tokenizer: Tokenizer,
    chat: ChatFormat | None,
    *,
    where: str,
    max_tokens: int,
    ends: Sequence[int] = (),
) -> tuple[list[Tokens], Report]:
    """Examples as ids that say which are learnt. One longer than `max_tokens` loses its end.

    Args:
        where: the file, for errors.
        ends: token ids that end a turn or text, beside those the tokenizer knows; the first one ends plain text.

    Raises:
        FileError: an example does not suit the model's chat format; names line and field.
    """
    out, cut, dropped = [], 0, 0
    for example in examples:
        try:
            if not example.messages:
                sequences = [_plain(example, tokenizer, ends)]
            elif chat is None:
                raise RequestError("messages", "the model has no chat format; give it prompt and completion instead")
            else:
                sequences = encode_answers(chat, tokenizer, example.messages, tools=example.tools, ends=ends)
        except RequestError as error:
            problem = str(error).removeprefix(f"{error.param}: ")
            raise FileError(f"{where}:{example.line}", problem, item=error.param) from None
        for ids, learn in sequences:
            cut += len(ids) > max_tokens
            kept = Tokens(ids[:max_tokens], learn[:max_tokens])
            if any(kept.learn[1:]):
                out.append(kept)
            else:
                dropped += 1
    report = Report(
        sequences=len(out), tokens=sum(len(ids) for ids, _ in out), learnt=sum(sum(learn[1:]) for _, learn in out),
        cut=cut, dropped=dropped,
    )  # fmt: skip
    return out, report


def _plain(example: Example, tokenizer: Tokenizer, ends: Sequence[int]) -> Tokens:
    """Prompt and completion are encoded apart, since the model will meet the prompt by itself."""
    prompt = tokenizer.encode(example.prompt)
    answer = tokenizer.encode_piece(example.completion, first=not prompt)
    answer += [*tokenizer.eos_token_ids, *ends][:1]
    return Tokens([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def pack(sequences: Sequence[Tokens], row_tokens: int, *, pad: int = 0) -> Rows:
    """Lay sequences of at most `row_tokens` into rows, the longest first, each where it leaves the least room."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in order:
        size = len(sequences[index].ids)
        assert size <= row_tokens, f"a sequence of {size} tokens in rows of {row_tokens}"
        at = bisect.bisect_left(room, (size, -1))
        free, row = room.pop(at) if at < len(room) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(room, (free - size, row))
    return _fill([[sequences[i] for i in row] for row in rows], row_tokens, pad)


def _fill(rows: Sequence[Sequence[Tokens]], row_tokens: int, pad: int) -> Rows:
    shape = (len(rows), row_tokens)
    tokens, targets = np.full(shape, pad, np.int64), np.full(shape, IGNORE, np.int64)
    documents = np.full(shape, PADDING, np.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, (ids, learn) in enumerate(row):
            end = at + len(ids)
            tokens[b, at:end] = ids
            targets[b, at : end - 1] = np.where(learn[1:], ids[1:], IGNORE)
            documents[b, at:end] = number
            at = end
    return Rows(tokens=tokens, targets=targets, documents=documents)
