"""The OpenAI request types, apart from HTTP: what chat and plain completions share.

Types are strict (no `"1"` for 1, no `true` for 1) and unknown fields are ignored, as the OpenAI servers do. Bounds
stand here for `/openapi.json` and once more in `engine.SamplingParams`; known fields that Shoal cannot honour are
refused rather than ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from shoal.engine import SamplingParams
from shoal.engine.params import MAX_STOP_CHARS, MAX_STOPS
from shoal.errors import RequestError
from shoal.formats.checkpoint import GenerationDefaults

MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_WHOLE = (1 << 31) - 1


def _check_stop(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError("must be a string or a list of strings")


_STOP_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
Stop = Annotated[
    str | list[str] | None,
    BeforeValidator(_check_stop),
    WithJsonSchema(
        {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}, {"type": "null"}]}
    ),
]
Biases = Annotated[
    dict[str, float] | None,
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
                    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                },
                {"type": "null"},
            ]
        }
    ),
]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)

    def check_supported(self) -> None:
        """Raise RequestError for what the types alone cannot tell."""


class StreamOptions(Body):
    include_usage: bool = False


class JsonSchemaFormat(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's formats, and two more: `{"type": "regex", "pattern": …}` and `{"type": "grammar", "grammar": …}`."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")  # llama-server's short form
    pattern: str | None = None
    grammar: str | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> ResponseFormat:
        schema = self.schema_ if self.json_schema is None else self.json_schema.schema_
        needed = {"json_schema": schema, "regex": self.pattern, "grammar": self.grammar}
        if self.type in needed and needed[self.type] is None:
            raise ValueError(f"of type {self.type} needs {'pattern' if self.type == 'regex' else self.type}")
        return self


class StructuredOutputs(Body):
    """vLLM's way of asking for the same; one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(default=None, min_length=1)
    grammar: str | None = None
    json_object: bool | None = None

    @model_validator(mode="after")
    def _is_one(self) -> StructuredOutputs:
        given = (self.json_, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(item is not None for item in given) != 1:
            raise ValueError("needs exactly one of json, regex, choice, grammar and json_object")
        return self


class SamplingRequest(Body):
    """What chat and plain completions share. Fields left out take the model's own recommendation."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_WHOLE)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=MAX_WHOLE)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: Biases = None
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: Stop = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    ignore_eos: bool | None = None
    timeout: float | None = Field(default=None, gt=0)  # seconds, the wait included; Shoal's own
    routing: bool | None = None  # Shoal's own: see server.routing
    best_of: int | None = None
    user: str | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def wants_form(self) -> bool:
        """Whether the answer must keep to a grammar."""
        form = self.response_format
        return (form is not None and form.type != "text") or self.structured_outputs is not None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_supported(self) -> None:
        if self.best_of is not None and self.best_of != self.num_choices:
            raise RequestError("best_of", "is not supported; ask for n choices", code="unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "goes with stream: true only")
        if self.routing and not self.stream:
            raise RequestError("routing", "goes with stream: true only")

    def sampling(
        self,
        defaults: GenerationDefaults,
        *,
        max_tokens: int | None,
        logprobs: int | None,
        choice: int = 0,
        grammar: str | None = None,
        grammar_after: int | None = None,
    ) -> SamplingParams:
        """The engine's parameters of choice number `choice`; each choice of a seeded request has its own seed."""
        given: dict[str, Any] = {}
        for name in ("temperature", "top_p", "top_k", "min_p"):
            asked = getattr(self, name)
            given[name] = getattr(defaults, name) if asked is None else asked
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty", "ignore_eos", "routing"):
            given[name] = getattr(self, name)
        if self.seed is not None:
            given["seed"] = self.seed if choice == 0 else (self.seed + choice) % (1 << 63)
        if self.logit_bias:
            given["logit_bias"] = _token_biases(self.logit_bias)
        if self.stop:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        elif self.stop == "":
            raise RequestError("stop", "must be non-empty strings")
        given = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, grammar=grammar, grammar_after=grammar_after, **given
        )


BodyT = TypeVar("BodyT", bound=Body)


def parse_request(kind: type[BodyT], body: Any) -> BodyT:
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
    # A union's branches stand in the path too, by the names of their types.
    path = [str(part) for part in first["loc"] if isinstance(part, int) or re.fullmatch(r"(?!str$|bool$)[a-z_]+", part)]
    param = ".".join(path)[:200] or None
    if first["type"] == "missing":
        return RequestError(param, "is required", code="missing_required_parameter")
    problem = first["msg"].removeprefix("Value error, ")
    return RequestError(param, problem[:1].lower() + problem[1:], code="invalid_value")


def _token_biases(biases: dict[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdigit() and len(token) < 10 for token in biases):
        raise RequestError("logit_bias", "keys must be token ids")
    return {int(token): bias for token, bias in biases.items()}
