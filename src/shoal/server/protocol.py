"""The OpenAI request types, apart from HTTP.

Types are strict (no `"1"` for 1, no `true` for 1) and unknown fields are ignored, as the OpenAI servers do. Ranges of
the sampling settings are checked in one place, `engine.SamplingParams`; known fields that Shoal cannot honour are
refused rather than ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shoal.engine import SamplingParams
from shoal.errors import RequestError
from shoal.formats.checkpoint import GenerationDefaults

MAX_CHOICES = 8
MAX_SEQUENCES = 256  # prompts × choices of one request
MAX_TOP_LOGPROBS = 20
COMPLETION_DEFAULT_TOKENS = 16  # what the OpenAI API gives where a completion names no limit


def _check_prompt(value: Any) -> Any:
    if isinstance(value, str) or _is_ids(value):
        return value
    if isinstance(value, list) and value and (all(isinstance(v, str) for v in value) or all(map(_is_ids, value))):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists, not empty")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _check_stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


def _flatten_content(value: Any) -> Any:
    """A list of text parts is the text they spell; Shoal's chat formats take plain text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")
    texts: list[str] = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"holds a part of type {str(kind)[:40]!r}; this model reads parts of type 'text' only")
        texts.append(part["text"])
    return "".join(texts)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]
Stop = Annotated[str | list[str] | None, BeforeValidator(_check_stop)]
Content = Annotated[str | None, BeforeValidator(_flatten_content)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("needs content")
        return self


class SamplingRequest(_Body):
    """What chat and plain completions share. Fields left out take the model's own recommendation."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Stop = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    routing: bool | None = None  # Shoal's own: see server.routing
    best_of: int | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        """Raise RequestError for a known field whose meaning Shoal cannot give."""
        if self.best_of is not None and self.best_of != self.num_choices:
            raise RequestError("best_of", "is not supported; ask for n choices", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "goes with stream: true only")
        if self.routing and not self.stream:
            raise RequestError("routing", "goes with stream: true only")

    def sampling(
        self, defaults: GenerationDefaults, *, max_tokens: int | None, logprobs: int | None, choice: int = 0
    ) -> SamplingParams:
        """The engine's parameters of choice number `choice`; each choice of a seeded request has its own seed."""
        given: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p"):
            asked = getattr(self, name)
            given[name] = getattr(defaults, name) if asked is None else asked
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "routing"):
            given[name] = getattr(self, name)
        if self.seed is not None:
            if not -(1 << 63) <= self.seed < 1 << 63:
                raise RequestError("seed", f"must fit 64 bits, got {self.seed}")
            given["seed"] = self.seed if choice == 0 else (self.seed + choice) % (1 << 63)
        if self.logit_bias:
            given["logit_bias"] = _token_biases(self.logit_bias)
        if self.stop:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        elif self.stop == "":
            raise RequestError("stop", "must be non-empty strings")
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs: true")
        for name in ("tools", "functions", "audio"):
            if getattr(self, name):
                raise RequestError(name, "is not supported", code="unsupported_parameter")
        if self.tool_choice not in (None, "none", "auto"):
            raise RequestError("tool_choice", "is not supported", code="unsupported_parameter")
        if self.response_format is not None and self.response_format.get("type") != "text":
            raise RequestError("response_format", "only type 'text' is supported", code="unsupported_parameter")
        if self.modalities is not None and self.modalities != ["text"]:
            raise RequestError("modalities", "only ['text'] is supported", code="unsupported_parameter")


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = COMPLETION_DEFAULT_TOKENS
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, each a text or a list of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    def check_supported(self) -> None:
        super().check_supported()
        if self.suffix:
            raise RequestError("suffix", "is not supported", code="unsupported_parameter")
        if self.max_tokens == 0 and not self.echo:
            raise RequestError("max_tokens", "must be at least 1 unless the prompt is echoed")
        count = len(self.prompts) * self.num_choices
        if count > MAX_SEQUENCES:
            raise RequestError("prompt", f"asks for {count} texts at once; the most is {MAX_SEQUENCES}")


RequestT = TypeVar("RequestT", bound=SamplingRequest)


def parse_request(kind: type[RequestT], body: Any) -> RequestT:
    """Check a decoded JSON body. Raises RequestError naming the first field at fault."""
    if not isinstance(body, dict):
        raise RequestError(None, "the body must be a JSON object", code="invalid_json")
    try:
        parsed = kind.model_validate(body)
    except ValidationError as error:
        raise _explain(error) from None
    parsed.check_supported()
    return parsed


def _explain(error: ValidationError) -> RequestError:
    first = error.errors(include_url=False, include_input=False)[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "missing":
        return RequestError(param, "is required", code="missing_required_parameter")
    problem = first["msg"].removeprefix("Value error, ")
    return RequestError(param, problem[:1].lower() + problem[1:], code="invalid_value")


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in biases.items()}
    except ValueError:
        raise RequestError("logit_bias", "keys must be token ids") from None
