"""Conversations to learn from: token ids, and which of them are the model's own words.

What a model must learn to write is what it would be asked to write: the ids before an answer are those of the prompt
that `ChatFormat.encode` makes for the messages before it, and the answer runs up to the token that ends its turn. Both
come from rendering the template twice, with and without the answer, so no template needs to mark its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from shoal.errors import RequestError
from shoal.formats.chat import ChatFormat, Message
from shoal.formats.chat_guard import Guard
from shoal.formats.reasoning import CLOSE, OPEN
from shoal.formats.tokenizer import Tokenizer


class Tokens(NamedTuple):
    """Token ids, and for each whether it is to be learnt."""

    ids: list[int]
    learn: list[bool]


class _Pieces:
    """Rendered text in order, each piece either the model's own words or not. Sentinels are still in."""

    def __init__(self, guard: Guard, ends: frozenset[int]) -> None:
        self.tokens = Tokens([], [])
        self.guard = guard
        self.ends = ends

    def add(self, text: str, *, answer: bool) -> None:
        ids = self.guard.encode(text, first=not self.tokens.ids)
        learnt = len(ids)
        if answer:  # what a template writes after the end of a turn is never generated
            last_end = max((i for i, token in enumerate(ids) if token in self.ends), default=None)
            learnt = len(ids) if last_end is None else last_end + 1
        self.tokens.ids.extend(ids)
        self.tokens.learn.extend(answer and i < learnt for i in range(len(ids)))


def encode_answers(
    chat: ChatFormat,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
    ends: Sequence[int] = (),
) -> list[Tokens]:
    """A conversation as one sequence that learns every assistant message of a `weight` other than 0.

    Templates that write old turns otherwise than they were generated (reasoning models drop old reasoning) make several
    sequences: one for each answer, after the conversation as the model would have seen it.

    Args:
        ends: token ids that end a turn, beside those the tokenizer knows.

    Raises:
        RequestError: the messages hold no answer, or do not suit the template.
    """
    answers = [i for i, m in enumerate(messages) if isinstance(m, Mapping) and m.get("role") == "assistant"]
    answers = [i for i in answers if messages[i].get("weight", 1) != 0]
    if not answers:
        raise RequestError("messages", "hold no assistant message to learn from")
    guard = Guard(tokenizer, (messages, tools, options), chat.template_source)
    end_ids = frozenset(ends) | frozenset(tokenizer.eos_token_ids)

    def render(count: int, *, prompt: bool) -> str:
        return chat.render_guarded(guard, messages[:count], tools, add_generation_prompt=prompt, options=options)

    spans = [(render(i, prompt=True), render(i + 1, prompt=False)) for i in answers]
    whole = spans[-1][1]
    if all(after.startswith(before) and whole.startswith(after) for before, after in spans):
        pieces, at = _Pieces(guard, end_ids), 0
        for before, after in spans:
            pieces.add(whole[at : len(before)], answer=False)
            pieces.add(whole[len(before) : len(after)], answer=True)
            at = len(after)
        return [pieces.tokens]
    out = []
    for i, (before, after) in zip(answers, spans, strict=True):
        pieces = _Pieces(guard, end_ids)
        pieces.add(before, answer=False)
        if after.startswith(before):
            pieces.add(after[len(before) :], answer=True)
        else:
            pieces.add(_as_generated(guard, messages[i], before, f"messages[{i}]"), answer=True)
            _end_turn(pieces.tokens, tokenizer)
        out.append(pieces.tokens)
    return out


def _as_generated(guard: Guard, message: Message, before: str, where: str) -> str:
    """An answer as the model would write it after `before`, where the template itself would write it otherwise."""
    if message.get("tool_calls"):
        raise RequestError(f"{where}.tool_calls", "the chat template does not continue its own prompt with these")
    content = message.get("content")
    if not isinstance(content, str):
        raise RequestError(f"{where}.content", "must be text")
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and CLOSE not in content:
        content = f"{OPEN}\n{reasoning}\n{CLOSE}\n\n{content}"
    if before.rstrip().endswith(OPEN):  # the prompt opens the reasoning already
        content = content.removeprefix(OPEN).lstrip("\n")
    return guard.text(content, keep=(OPEN, CLOSE))


def _end_turn(tokens: Tokens, tokenizer: Tokenizer) -> None:
    if tokenizer.eos_token_ids:
        tokens.ids.append(tokenizer.eos_token_ids[0])
        tokens.learn.append(True)
