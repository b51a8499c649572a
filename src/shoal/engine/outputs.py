"""What a generation gives back: plain data."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.engine.routing import Routing


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A produced token with its natural-log probability; `top` holds the likeliest (id, bytes, logprob), best first."""

    token_id: int
    text_bytes: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Counts and wall-clock seconds. The first token falls out of the prompt's pass, so decoding times the others."""

    prompt_tokens: int
    completion_tokens: int
    prompt_seconds: float
    decode_seconds: float
    cached_tokens: int = 0  # of the prompt, taken from the cache of earlier requests
    drafted: int = 0  # tokens guessed ahead, and how many of them the model confirmed
    accepted: int = 0
    queue_seconds: float = 0.0  # of prompt_seconds, spent waiting for a place
    machine_seconds: float = 0.0  # of the engine's steps, shared among those who took part by the tokens they brought

    @property
    def first_token_seconds(self) -> float:
        return self.prompt_seconds

    @property
    def prompt_tok_s(self) -> float:
        read = self.prompt_tokens - self.cached_tokens
        return read / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def decode_tok_s(self) -> float:
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """One streamed piece. Text may lag behind tokens (split characters, possible stop strings), and so does `routing`:
    where a token went is known once it is read, a step after it was chosen.

    The last chunk, and only it, carries `stats` and `finish_reason` (`stop`: end-of-text or stop string; `length`:
    max_tokens or context)."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    routing: tuple[Routing, ...] = ()
    finish_reason: str | None = None
    stats: Stats | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A finished generation. An end-of-text token that ended it is neither in `text` nor in `token_ids`."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str
    stats: Stats
