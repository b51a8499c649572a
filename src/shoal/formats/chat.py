"""From a conversation to the model's prompt: the chat template a model brings, and ids that no text can forge.

A template writes control tokens as text (`<|im_start|>`), and so may a user. Before rendering, every string from
outside is therefore protected (`chat_guard.Guard`); after it, only control tokens that the template wrote become ids.
For ordinary messages the result is what transformers' `apply_chat_template` gives.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from shoal.errors import FileError, RequestError
from shoal.formats import tokenizer_json
from shoal.formats.atomic import atomic_file
from shoal.formats.chat_guard import Guard, Strings
from shoal.formats.reasoning import prompt_opens_reasoning
from shoal.formats.template import Template, TemplateLimitError, TemplateLimits, TemplateRefusalError
from shoal.formats.tokenizer import Tokenizer, well_formed

Message = Mapping[str, Any]

_OWN_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How a model wants conversations written.

    Attributes:
        template_source: the Jinja template.
        tool_template_source: another template for conversations with tools, if the model brings one.
        special_tokens: `bos_token`, `eos_token`, … as the template may print them.
        where: the file it came from, for errors.
    """

    template_source: str
    tool_template_source: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    where: Path = Path("chat_template.jinja")
    limits: TemplateLimits = field(default_factory=TemplateLimits)

    def __post_init__(self) -> None:
        """Compile the templates and try them on one short message.

        Raises:
            FileError: a template is no Jinja, leaves the sandbox or runs past its limits.
        """
        for template in (self._template, self._tool_template):
            # A RequestError says that it wants other messages, which is no fault of the file.
            with suppress(RequestError):
                self._run(template, {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True})

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text, to look at. Use `encode` to run it: this text no longer tells who wrote a control token.

        Args:
            messages: as in the OpenAI API: `role`, `content` (text, text parts or null), `tool_calls`, ….
            tools: function descriptions, as in the OpenAI API.
            add_generation_prompt: end with the opening of the assistant's turn.
            options: further variables for the template, such as `enable_thinking`.

        Raises:
            RequestError: the messages do not suit the template.
            FileError: the template is at fault.
        """
        return self._render(Strings(), messages, tools, add_generation_prompt, options)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt as ids, with arguments and errors as in `render`. Text from outside never becomes a control id."""
        guard = Guard(tokenizer, (messages, tools, options), self.template_source)
        return guard.encode(self._render(guard, messages, tools, add_generation_prompt, options))

    def render_guarded(
        self,
        guard: Guard,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """As `render`, with the marks of `guard` still in the text, for callers that encode it in parts."""
        return self._render(guard, messages, tools, add_generation_prompt, options)

    def starts_in_reasoning(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        """Whether the prompt leaves the model inside an open `<think>`, so that its answer begins with reasoning."""
        return prompt_opens_reasoning(tokenizer, prompt)

    def save(self, folder: str | Path) -> None:
        """Write `chat_template.jinja` (and the tool template) where transformers looks for them."""
        folder = Path(folder)
        with atomic_file(folder / "chat_template.jinja") as out:
            out.write(self.template_source.encode())
        if self.tool_template_source is not None:
            (folder / "additional_chat_templates").mkdir(exist_ok=True)
            with atomic_file(folder / "additional_chat_templates" / "tool_use.jinja") as out:
                out.write(self.tool_template_source.encode())

    # Rendering

    @cached_property
    def _template(self) -> Template:
        return self._compile(self.template_source)

    @cached_property
    def _tool_template(self) -> Template:
        return self._template if self.tool_template_source is None else self._compile(self.tool_template_source)

    def _compile(self, source: str) -> Template:
        try:
            return Template(source, self.limits)
        except jinja2.TemplateSyntaxError as error:
            raise FileError(self.where, f"line {error.lineno}: {error.message}", item="chat_template") from None

    def _render(
        self,
        strings: Strings,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        options: Mapping[str, Any] | None,
    ) -> str:
        for name in options or {}:
            if name in _OWN_VARIABLES or name in self.special_tokens or not str(name).isidentifier():
                raise RequestError("chat_template_kwargs", f"{name!r} cannot be set")
        template = self._tool_template if tools else self._template
        variables: dict[str, Any] = {**self.special_tokens, **strings.plain(options or {}, "chat_template_kwargs")}
        variables["messages"] = [self._message(strings, m, f"messages[{i}]") for i, m in enumerate(messages)]
        variables["tools"] = None if tools is None else strings.plain(list(tools), "tools")
        variables["add_generation_prompt"] = add_generation_prompt
        return self._run(template, variables, strings.sentinel)

    def _run(self, template: Template, variables: Mapping[str, Any], keep: str = "") -> str:
        try:
            return template.render(variables, keep=keep)
        except TemplateRefusalError as error:
            raise RequestError("messages", str(error)) from None
        except (TemplateLimitError, jinja2.exceptions.SecurityError) as error:
            raise FileError(self.where, f"the template is refused: {error}", item="chat_template") from None
        except Exception as error:
            # The template met values it was not written for: a missing key, text where it wanted a list, ….
            raise RequestError("messages", f"the model's chat template cannot write them: {error}") from None

    def _message(self, strings: Strings, message: Message, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RequestError(where, "must be an object")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"{where}.role", "must be a non-empty string")
        message = {**message, "content": _flat_content(message.get("content"), f"{where}.content")}
        calls = message.get("tool_calls")
        if calls is not None:
            message["tool_calls"] = self._calls(calls, f"{where}.tool_calls")
        return strings.message(message, where)

    def _calls(self, calls: object, where: str) -> list[Any]:
        """Tool calls with their arguments as the template wants them: an object, or JSON text."""
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise RequestError(where, "must be a list")
        out = []
        for index, call in enumerate(calls):
            if not isinstance(call, Mapping) or not isinstance(call.get("function"), Mapping):
                raise RequestError(f"{where}[{index}].function", "must be an object")
            function = dict(call["function"])
            function["arguments"] = self._arguments(function.get("arguments", {}))
            out.append({"type": "function", **call, "function": function})
        return out

    def _arguments(self, value: object) -> object:
        if self._wants_argument_text:
            return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str):
            return value
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, dict) else value

    @cached_property
    def _wants_argument_text(self) -> bool:
        """Tried out: with an object, such a template fails or prints Python's notation."""
        call = {"name": "probe", "arguments": {"probe_key": "probe_value"}}
        messages = [
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "000000000", "type": "function", "function": call}],
            },
        ]
        try:
            text = self._run(self._tool_template, {"messages": messages, "tools": None, **self.special_tokens})
        except RequestError:
            call["arguments"] = '{"probe_key": "probe_value"}'
            try:
                text = self._run(self._tool_template, {"messages": messages, "tools": None, **self.special_tokens})
            except RequestError:
                return False
            return True
        return "'probe_key'" in text


def chat_from_template(
    template: str,
    *,
    tool_template: str | None = None,
    where: str | Path = "chat_template.jinja",
    limits: TemplateLimits | None = None,
    **special_tokens: str,
) -> ChatFormat:
    """A chat format from a template's source and the special tokens it may print (`bos_token="<s>"`, …).

    Raises:
        FileError: the template is no Jinja, leaves the sandbox or runs past its limits.
    """
    return ChatFormat(
        template_source=well_formed(template),
        tool_template_source=None if tool_template is None else well_formed(tool_template),
        special_tokens=special_tokens,
        where=Path(where),
        limits=limits or TemplateLimits(),
    )


def load_chat(folder: str | Path) -> ChatFormat | None:
    """The chat format of a Hugging Face folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`.

    A DeepSeek model without one gets its family's (`chat_deepseek`); any other gives None.

    Raises:
        FileError: as `chat_from_template` does.
    """
    folder = Path(folder)
    path = folder / "tokenizer_config.json"
    config = tokenizer_json.read_optional(path)
    names = {**tokenizer_json.read_optional(folder / "special_tokens_map.json"), **config}
    special = {name: text for name in names if name.endswith("_token") and (text := _token_text(names[name]))}
    templates = _config_templates(config.get("chat_template"), path)
    for name, file in (("default", "chat_template.jinja"), ("tool_use", "additional_chat_templates/tool_use.jinja")):
        if (folder / file).exists():
            path = folder / "chat_template.jinja"
            templates[name] = _text(folder / file)
    if not templates:
        model_type = tokenizer_json.read_optional(folder / "config.json").get("model_type")
        if not str(model_type).startswith("deepseek") or not (folder / "tokenizer.json").exists():
            return None
        data = tokenizer_json.as_object(
            tokenizer_json.read_limited(folder / "tokenizer.json"), folder / "tokenizer.json"
        )
        tokenizer_json.check(data, folder / "tokenizer.json")
        return _deepseek_default(tokenizer_json.all_tokens(data))
    default = templates.get("default") or next(iter(templates.values()))
    return ChatFormat(
        template_source=well_formed(default),
        tool_template_source=templates.get("tool_use"),
        special_tokens=special,
        where=path,
    )


def chat_from_gguf(fields: Mapping[str, object], *, where: str | Path = "GGUF") -> ChatFormat | None:
    """The chat format in a GGUF file's metadata, with the special tokens it prints; otherwise as `load_chat`."""
    tokens = fields.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, (list, tuple)) else []
    template, tool_template = (fields.get(f"tokenizer.chat_template{name}") for name in ("", ".tool_use"))
    if not isinstance(template, str):
        return _deepseek_default(tokens) if str(fields.get("general.architecture")).startswith("deepseek") else None
    special = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        index = fields.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[name] = str(tokens[index])
    return ChatFormat(
        template_source=well_formed(template),
        tool_template_source=tool_template if isinstance(tool_template, str) else None,
        special_tokens=special,
        where=Path(where),
    )


def _deepseek_default(tokens: Collection[str]) -> ChatFormat:
    from shoal.formats.chat_deepseek import deepseek_chat, guess_deepseek_kind

    return deepseek_chat(guess_deepseek_kind(tokens))


def _config_templates(entry: object, path: Path) -> dict[str, str]:
    """`chat_template` is a string, or a list of {name, template}."""
    if entry is None:
        return {}
    entries = [{"name": "default", "template": entry}] if isinstance(entry, str) else entry
    if not isinstance(entries, list):
        raise FileError(path, "must be a string or a list", item="chat_template")
    out = {}
    for item in entries:
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("name"), str)
            or not isinstance(item.get("template"), str)
        ):
            raise FileError(path, "must be a list of names and templates", item="chat_template")
        out[item["name"]] = item["template"]
    return out


def _text(path: Path) -> str:
    try:
        return tokenizer_json.read_limited(path).decode()
    except UnicodeDecodeError:
        raise FileError(path, "is not UTF-8") from None


def _token_text(entry: object) -> str | None:
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _flat_content(content: object, where: str) -> str | None:
    """Text, text parts joined by newlines, or None."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(where, "must be text, a list of parts or null")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
        if not isinstance(text, str):
            raise RequestError(f"{where}[{index}]", "only text parts are supported by this model")
        texts.append(text)
    return "\n".join(texts)
