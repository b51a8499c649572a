"""From what a request asks of its answer's form to one grammar, in llguidance's Lark dialect."""

from __future__ import annotations

import json
from typing import Any

from shoal.errors import RequestError
from shoal.formats.tokenizer import Tokenizer
from shoal.formats.tools import ToolSyntax
from shoal.server.protocol import SamplingRequest
from shoal.server.protocol_chat import ChatRequest, ChosenTool, Tool

Constraint = tuple[str, str]  # the field that asks for it, and the grammar


def format_constraint(request: SamplingRequest) -> Constraint | None:
    """What `response_format` or `structured_outputs` demand; RequestError if both do."""
    found = [item for item in (_response_format(request), _structured_outputs(request)) if item is not None]
    if len(found) > 1:
        raise RequestError("structured_outputs", "does not go with response_format")
    return found[0] if found else None


def _response_format(request: SamplingRequest) -> Constraint | None:
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "regex":
        return "response_format.pattern", _regex(wanted.pattern or "")
    if wanted.type == "grammar":
        return _lark("response_format.grammar", wanted.grammar or "")
    schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
    if schema is None:
        return "response_format", _json({"type": "object"})
    field = "response_format.schema" if wanted.json_schema is None else "response_format.json_schema.schema"
    return field, _json(schema)


def _structured_outputs(request: SamplingRequest) -> Constraint | None:
    wanted = request.structured_outputs
    if wanted is None:
        return None
    if wanted.json_ is not None:
        return "structured_outputs.json", _json(_parsed(wanted.json_))
    if wanted.regex is not None:
        return "structured_outputs.regex", _regex(wanted.regex)
    if wanted.choice is not None:
        return "structured_outputs.choice", "start: " + " | ".join(map(_quoted, wanted.choice))
    if wanted.grammar is not None:
        return _lark("structured_outputs.grammar", wanted.grammar)
    return "structured_outputs.json_object", _json({"type": "object"})


def tool_constraint(request: ChatRequest, syntax: ToolSyntax, tokenizer: Tokenizer) -> Constraint | None:
    """The grammar of calls where `tool_choice` demands one; None where the model may decide."""
    choice = request.tool_choice
    if choice == "required":
        tools, once = request.tools or [], request.parallel_tool_calls is False
    elif isinstance(choice, ChosenTool):
        tools, once = [tool for tool in request.tools or [] if tool.function.name == choice.function.name], True
    else:
        return None
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    several = "" if once else r" (/\n?/ call){0,15}"
    lines = [
        f"start: {_literal(syntax.opening, tokenizer)} call{several} {_literal(syntax.closing, tokenizer)}",
        f"call: {calls}",
        *(f"call_{index}: {_call(tool, syntax, tokenizer)}" for index, tool in enumerate(tools)),
    ]
    return "tools", "\n".join(lines)


def _call(tool: Tool, syntax: ToolSyntax, tokenizer: Tokenizer) -> str:
    function = tool.function
    body: dict[str, Any] = function.parameters or {"type": "object"}
    if syntax.key is not None:
        properties = {"name": {"const": function.name}, syntax.key: body}
        # References inside the parameters start at their own root, which is no longer the schema's.
        definitions: dict[str, Any] = {key: body[key] for key in ("$defs", "definitions") if key in body}
        body = {
            "type": "object", "properties": properties, "required": ["name", syntax.key],
            "additionalProperties": False, **definitions,
        }  # fmt: skip
    before = syntax.marker + syntax.before.replace("{name}", function.name)
    pieces = (_literal(before, tokenizer), _schema(body), _literal(syntax.after, tokenizer))
    return " ".join(piece for piece in pieces if piece)


def _literal(text: str, tokenizer: Tokenizer) -> str:
    """Text as the model writes it: control tokens by their ids, the rest as strings."""
    out, at = [], 0
    for start, end, token in tokenizer.find_control(text):
        out += [_quoted(text[at:start])] * (start > at) + [f"<[{token}]>"]
        at = end
    return " ".join([*out, *([_quoted(text[at:])] if at < len(text) else [])])


def _json(schema: dict[str, Any] | bool) -> str:
    return f"start: {_schema(schema)}"


def _schema(schema: dict[str, Any] | bool) -> str:
    """White space between the parts is the model's choice, but little of it: small models love to go on with it."""
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {"whitespace_pattern": "[ \\n]{1,16}"}}
    return f"%json {json.dumps(schema)}"


def _parsed(schema: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(schema, dict):
        return schema
    try:
        parsed = json.loads(schema)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise RequestError("structured_outputs.json", "is not the text of a JSON schema")
    return parsed


def _regex(pattern: str) -> str:
    """In the Rust library's syntax; a digit is an ASCII one."""
    from llguidance import regex_to_lark

    return f"start: /{regex_to_lark(pattern, use_ascii='d')}/"


def _lark(field: str, grammar: str) -> Constraint:
    """Lark as it is; llama.cpp's GBNF, told by its `::=`, is translated."""
    if "::=" not in grammar:
        return field, grammar
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return field, str(any_to_lark(grammar))
    except Exception as error:  # the translator's own kinds are not part of its interface
        raise RequestError(field, f"is no GBNF: {str(error)[:200]}", code="invalid_grammar") from None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
