"""The bodies of the other POST routes: plain completions, embeddings, tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, WithJsonSchema

from shoal.errors import RequestError
from shoal.server.protocol import MAX_TOP_LOGPROBS, MAX_WHOLE, Body, SamplingRequest
from shoal.server.protocol_chat import Message, Tool

MAX_SEQUENCES = 256  # prompts × choices of one request
MAX_INPUTS = 2048
COMPLETION_DEFAULT_TOKENS = 16  # what the OpenAI API gives where a completion names no limit


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(_is_ids, value))):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_ids(value: Any) -> Any:
    if isinstance(value, list) and all(type(item) is int for item in value):
        return value
    raise ValueError("must be a list of token ids")


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": MAX_WHOLE}, "minItems": 1}
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_SEQUENCES}
_LISTS = {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_SEQUENCES}
Prompt = Annotated[
    str | list[str] | list[int] | list[list[int]],
    BeforeValidator(_check_prompt),
    WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS, _IDS, _LISTS]}),
]
Ids = Annotated[list[int], BeforeValidator(_check_ids), WithJsonSchema({**_IDS, "minItems": 0})]


def each_prompt(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One prompt or several, each a text or a list of token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(default=COMPLETION_DEFAULT_TOKENS, ge=0, le=MAX_WHOLE)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        return each_prompt(self.prompt)

    def check_supported(self) -> None:
        super().check_supported()
        if self.suffix and self.echo:
            raise RequestError("suffix", "does not go with echo")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens", "must be at least 1 unless the prompt is echoed")
        count = len(self.prompts) * self.num_choices
        if count > MAX_SEQUENCES:
            raise RequestError("prompt", f"asks for {count} texts at once; the most is {MAX_SEQUENCES}")


class EmbeddingRequest(Body):
    """POST /v1/embeddings. `pooling` is Shoal's own; `dimensions` keeps the first numbers, scaled to length 1."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=MAX_WHOLE)
    pooling: Literal["mean", "last"] = "mean"
    user: str | None = None

    def check_supported(self) -> None:
        count = len(each_prompt(self.input))
        if count > MAX_INPUTS:
            raise RequestError("input", f"holds {count} texts; the most is {MAX_INPUTS}")


class TokenizeRequest(Body):
    """POST /tokenize: of a text (`prompt`, or `content` as llama-server says), or of a conversation as the model would
    see it (`messages`)."""

    model: str | None = None
    prompt: str | None = Field(default=None, validation_alias=AliasChoices("prompt", "content"))
    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = Field(default=True, validation_alias=AliasChoices("add_special_tokens", "add_special"))
    with_pieces: bool = False

    def check_supported(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("prompt", "or messages is needed, one of them", code="missing_required_parameter")


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids
