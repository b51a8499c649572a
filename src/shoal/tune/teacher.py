"""What a teacher says, on disk: answers that a verifier let through, and the likeliest next tokens of given answers.

The teacher runs in the engine, so it may be anything the engine runs, quantised or not.

`logits/` holds, for the learnt targets of packed rows in their order, the K likeliest tokens (`ids.npy`, uint32 [N, K])
and their log-probabilities (`logprobs.npy`, float16 [N, K]), mapped from disk when read, and `meta.json`, written last.

Shapes: N learnt targets, K kept tokens, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from shoal.engine import LLM, SamplingParams
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import atomic_file, atomic_folder
from shoal.formats.hf_config import read_json
from shoal.formats.tokenizer import Tokenizer
from shoal.train.batches import IGNORE
from shoal.tune.examples import Example
from shoal.tune.tokens import Rows, spans

Verifier = Callable[[Example, str], bool]
Progress = Callable[[int, int], None]
IDS, LOGPROBS, META = "ids.npy", "logprobs.npy", "meta.json"


# ---- tokenizers


def require_same_tokens(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raise ConfigError, with the first id that differs, unless both read and write text as the same ids."""
    if teacher.vocab_size != student.vocab_size:
        raise ConfigError(
            "teacher", f"has {teacher.vocab_size} tokens and the student {student.vocab_size}; distil on sequences"
        )
    for token in range(teacher.vocab_size):
        theirs, ours = teacher.token_string(token), student.token_string(token)
        if theirs != ours or teacher.is_control(token) != student.is_control(token):
            raise ConfigError(
                "teacher", f"token {token} is {theirs!r} there and {ours!r} in the student; distil on sequences"
            )
    parts = ("model", "normalizer", "pre_tokenizer")
    differ = [part for part in parts if teacher.source_json().get(part) != student.source_json().get(part)]
    if differ:
        raise ConfigError(
            "teacher", f"splits text otherwise than the student ({', '.join(differ)}); distil on sequences"
        )


# ---- sequences


def write_answers(
    teacher: LLM,
    examples: Sequence[Example],
    path: Path,
    *,
    samples: int = 1,
    params: SamplingParams | None = None,
    verify: Verifier | None = None,
    progress: Progress | None = None,
) -> tuple[int, int]:
    """Let the teacher answer every example and append what the verifier accepts, one line of `messages` or `prompt`.

    A started file is gone on with: each line says which example it answers, and rejected ones leave a line too.

    Args:
        samples: answers drawn for each example; the first accepted one is kept.
        params: how answers are drawn; greedy by default. Each sample gets a seed of its own.
        verify: says whether an answer is right; without it all are kept that end by themselves.

    Returns:
        Examples answered and accepted, over the whole file.

    Raises:
        FileError: the started file is of other examples.
    """
    done = _answered(path, examples)
    accepted = sum(done.values())
    params = params or SamplingParams(temperature=0.0)
    with path.open("ab") as file:
        for number, example in enumerate(examples):
            if number in done:
                continue
            answer = next(_accepted(teacher, example, number, samples, params, verify), None)
            record: dict[str, Any] = {"example": number, "accepted": answer is not None}
            if answer is not None:
                record |= _record(example, answer)
                accepted += 1
            file.write(orjson.dumps(record) + b"\n")
            file.flush()
            if progress is not None:
                progress(number + 1, len(examples))
    return len(examples), accepted


def _answered(path: Path, examples: Sequence[Example]) -> dict[int, bool]:
    """Examples that have a line already; a half-written last line is cut off."""
    if not path.exists():
        return {}
    out, end = {}, 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            record = orjson.loads(line) if line.endswith(b"\n") else None
            assert record is not None
            number = int(record["example"])
            out[number] = bool(record["accepted"])
            same = number < len(examples)
            if same and out[number]:
                same = _question(record) == _question(_record(examples[number], ""))
        except (orjson.JSONDecodeError, AssertionError):
            break
        except (KeyError, TypeError, ValueError):
            raise FileError(path, "is no file of a teacher's answers") from None
        if not same:
            raise FileError(path, f"answers another example {number} than the data holds; remove it to start anew")
        end += len(line)
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    return out


def _accepted(
    teacher: LLM, example: Example, number: int, samples: int, params: SamplingParams, verify: Verifier | None
) -> Iterator[str]:
    for sample in range(samples):
        drawn = replace(params, seed=number * samples + sample) if params.temperature else params
        question = question_of(example)
        done = (
            teacher.chat(question, drawn, tools=example.tools) if question else teacher.generate(example.prompt, drawn)
        )
        if done.finish_reason == "stop" and (verify is None or verify(example, done.text)):
            yield done.text


def question_of(example: Example) -> list[Any]:
    """The conversation before its last answer; empty for plain text."""
    last = max((i for i, m in enumerate(example.messages) if m["role"] == "assistant"), default=0)
    return list(example.messages[:last])


def _question(record: dict[str, Any]) -> Any:
    """What a line of `_record` answers."""
    return record["messages"][:-1] if "messages" in record else record["prompt"]


def _record(example: Example, answer: str) -> dict[str, Any]:
    if not example.messages:
        return {"prompt": example.prompt, "completion": answer}
    asked = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in question_of(example)]
    tools = {"tools": example.tools} if example.tools else {}
    return {"messages": [*asked, {"role": "assistant", "content": answer}], **tools}


# ---- logits


@dataclass(frozen=True, kw_only=True)
class TeacherLogits:
    """Kept tokens of packed rows. `row(b)` gives ids [n, K] and log-probabilities [n, K] of row b's learnt targets."""

    ids: NDArray[np.uint32]
    logprobs: NDArray[np.float16]
    starts: NDArray[np.int64]

    def row(self, number: int) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
        part = slice(int(self.starts[number]), int(self.starts[number + 1]))
        return self.ids[part], self.logprobs[part]


def write_logits(
    teacher: LLM, rows: Rows, folder: Path, *, top: int, key: str, among: int | None = None,
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Run the teacher over the documents of packed rows and keep the `top` likeliest tokens at each learnt target.

    Args:
        among: only tokens below this id, those that the student knows too.
        key: names data and teacher; `open_logits` refuses another one.
    """
    count = int((rows.targets != IGNORE).sum())
    with atomic_folder(folder) as fresh:
        ids = np.lib.format.open_memmap(fresh / IDS, "w+", np.uint32, (count, top))
        logprobs = np.lib.format.open_memmap(fresh / LOGPROBS, "w+", np.float16, (count, top))
        at = 0
        for b in range(len(rows)):
            for begin, end in spans(rows.documents[b]):
                wanted = np.flatnonzero(rows.targets[b, begin:end] != IGNORE)
                if len(wanted):
                    logits = teacher.logits(rows.tokens[b, begin:end].tolist())[wanted, :among]
                    kept = likeliest(logits, top)
                    ids[at : at + len(wanted)], logprobs[at : at + len(wanted)] = kept
                    at += len(wanted)
            if progress is not None:
                progress(b + 1, len(rows))
        ids.flush()
        logprobs.flush()
        assert at == count
        with atomic_file(fresh / META) as file:
            file.write(json.dumps({"key": key, "targets": count, "top": top}).encode())


def likeliest(logits_NV: NDArray[np.float32], top: int) -> tuple[NDArray[np.uint32], NDArray[np.float16]]:
    """The `top` likeliest tokens of each row, falling, with their log-probabilities among all tokens."""
    high_N1 = logits_NV.max(1, keepdims=True)
    total_N1 = high_N1 + np.log(np.exp(logits_NV - high_N1).sum(1, keepdims=True))
    ids = np.argpartition(logits_NV, -top, axis=1)[:, -top:]
    values = np.take_along_axis(logits_NV, ids, 1) - total_N1
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1).astype(np.uint32), np.take_along_axis(values, order, 1).astype(np.float16)


def open_logits(folder: Path, rows: Rows, *, top: int, key: str) -> TeacherLogits:
    """Map what `write_logits` kept for these rows.

    Raises:
        FileError: it is damaged, or was kept for other data or by another teacher.
    """
    meta = read_json(folder / META)
    learnt = (rows.targets != IGNORE).sum(1)
    if meta != {"key": key, "targets": int(learnt.sum()), "top": top}:
        raise FileError(folder / META, "was written for other data, another teacher or another number of tokens")
    try:
        ids = np.load(folder / IDS, mmap_mode="r", allow_pickle=False)
        logprobs = np.load(folder / LOGPROBS, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FileError(folder, f"cannot be read: {error}") from None
    if ids.shape != (learnt.sum(), top) or logprobs.shape != ids.shape:
        raise FileError(folder, f"holds {list(ids.shape)} values, not {[int(learnt.sum()), top]}")
    return TeacherLogits(ids=ids, logprobs=logprobs, starts=np.concatenate(([0], np.cumsum(learnt))))
