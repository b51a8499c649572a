"""The body of POST /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from shoal.errors import RequestError
from shoal.server.protocol import MAX_TOP_LOGPROBS, MAX_WHOLE, Body, SamplingRequest

MAX_TOOLS = 128


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


_PART = {
    "type": "object",
    "required": ["type", "text"],
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
}
Content = Annotated[
    str | None,
    BeforeValidator(_flatten_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}, {"type": "null"}]}),
]


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("needs content")
        return self


class FunctionDefinition(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class ChosenFunction(Body):
    name: str


class ChosenTool(Body):
    type: Literal["function"]
    function: ChosenFunction


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_WHOLE)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    audio: Any = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def wants_form(self) -> bool:
        return super().wants_form or self.tool_choice == "required" or isinstance(self.tool_choice, ChosenTool)

    @property
    def offered_tools(self) -> list[Tool]:
        """What the model may call; none where the client forbids it."""
        return [] if self.tool_choice == "none" else self.tools or []

    def check_supported(self) -> None:
        super().check_supported()
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs: true")
        for name in ("functions", "audio"):
            if getattr(self, name):
                raise RequestError(name, "is not supported", code="unsupported_parameter")
        if self.modalities is not None and self.modalities != ["text"]:
            raise RequestError("modalities", "only ['text'] is supported", code="unsupported_parameter")
        self._check_tools()

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise RequestError(f"tools.{index}.function.name", f"{name!r} stands there twice")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in names:
            raise RequestError("tool_choice", f"{self.tool_choice.function.name[:80]!r} is none of the tools")
        if self.tool_choice == "required" and not names:
            raise RequestError("tool_choice", "needs tools")
