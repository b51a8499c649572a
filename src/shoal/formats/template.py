"""Chat templates are programs inside model files: run them as Hugging Face does, but with hard limits.

Jinja's sandbox keeps a template away from Python; it does not keep it from filling the memory or never ending. Here
each loop turn, call and growing value is charged to a budget *before* it happens, and output is counted as it streams.

Set up as transformers' `apply_chat_template`: trim_blocks, lstrip_blocks, loop controls, `tojson` without escapes or
sorting, `raise_exception`, `strftime_now`, and the `generation` tag, which is accepted and does nothing.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
from jinja2 import nodes
from jinja2.runtime import Context, Macro, Undefined
from jinja2.utils import Namespace

MAX_SOURCE_CHARS = 1 << 20
MAX_PADDING = 1 << 10
MAX_INT_BITS = 1 << 12
TURN_COST = 256
ITEM_COST = 16


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STR_METHODS = _words(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric"
    " isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition"
    " rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_OTHER_METHODS = _words("items keys values get index count copy is_integer")
_FILTERS = _words(
    "abs attr capitalize count d default dictsort e escape first float indent int items join last length list lower map"
    " max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim truncate unique"
    " upper wordcount"
)


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """What one rendering may use: characters of output, units of work (a loop turn 256, a character made 1), time."""

    output_chars: int = 16 << 20
    work: int = 256 << 20
    seconds: float = 4.0


class TemplateLimitError(Exception):
    """The template asks for more than its limits."""


class TemplateRefusalError(Exception):
    """The template itself called `raise_exception`: the messages do not suit it."""


class Budget:
    """What is left of one rendering's limits. `keep` is a character that `tojson` must leave as it is."""

    def __init__(self, limits: TemplateLimits, keep: str = "") -> None:
        self.limits = limits
        self.keep = keep
        self.work = limits.work
        self.deadline = time.monotonic() + limits.seconds

    def spend(self, units: int) -> None:
        self.work -= units
        if self.work < 0:
            raise TemplateLimitError(f"it takes more than {self.limits.work} units of work")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it takes longer than {self.limits.seconds:g} s")

    def grow(self, size: int) -> None:
        """Charge for a value of `size` characters or items that is about to be made."""
        if size > self.limits.output_chars:
            raise TemplateLimitError(f"it makes a value of more than {self.limits.output_chars} characters")
        self.spend(size)

    def weigh(self, value: object) -> int:
        """Characters and items of a nested value, counted only as far as the limit; shared parts count each time."""
        total, stack = 0, [value]
        while stack:
            item = stack.pop()
            total += len(item) + ITEM_COST if isinstance(item, str) else ITEM_COST
            if isinstance(item, Namespace):
                item = item._Namespace__attrs
            if isinstance(item, Mapping):
                stack += item.keys()
                stack += item.values()
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack += item
            if total > self.limits.output_chars:
                raise TemplateLimitError(f"it makes a value of more than {self.limits.output_chars} characters")
        return total


_budget: ContextVar[Budget] = ContextVar("budget")


def budget() -> Budget:
    """The running rendering's budget; a fresh default one while Jinja folds constants."""
    return _budget.get(None) or Budget(TemplateLimits())


class Template:
    """A compiled chat template.

    Raises:
        jinja2.TemplateSyntaxError: the source is no template (also for absurd nesting).
    """

    def __init__(self, source: str, limits: TemplateLimits | None = None) -> None:
        self.limits = limits or TemplateLimits()
        if len(source) > MAX_SOURCE_CHARS:
            raise jinja2.TemplateSyntaxError(f"longer than {MAX_SOURCE_CHARS} characters", 1)
        env = _Sandbox()
        try:
            tree = env.parse(source)
            _Meter().visit(tree)
            self._template = env.from_string(tree)
        except (RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as error:
            raise jinja2.TemplateSyntaxError(f"cannot be compiled ({type(error).__name__})", 1) from None

    def render(self, variables: Mapping[str, Any], *, keep: str = "") -> str:
        """The text.

        Raises:
            TemplateLimitError, TemplateRefusalError, jinja2.exceptions.SecurityError, or whatever else a template can
            provoke with values of the wrong kind (TypeError, jinja2.UndefinedError, …).
        """
        left = Budget(self.limits, keep)
        token = _budget.set(left)
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(**variables):
                size += len(part)
                if size > self.limits.output_chars:
                    raise TemplateLimitError(f"it writes more than {self.limits.output_chars} characters")
                left.spend(len(part))
                parts.append(part)
        except (RecursionError, OverflowError) as error:
            # OverflowError is the sandbox's answer to a huge range().
            raise TemplateLimitError(str(error) or "it recurses without end") from None
        finally:
            _budget.reset(token)
        return "".join(parts)


class _Meter(jinja2.visitor.NodeTransformer):
    """Puts a call to the budget where Jinja offers no hook: loop turns, `~`, and literals that nest other values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_method("charge_turn", [], node.lineno), lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _method("concat_values", list(node.nodes), node.lineno)

    def visit_List(self, node: nodes.Node) -> nodes.Node:
        self.generic_visit(node)
        if all(isinstance(child, nodes.Const) for child in node.iter_child_nodes()):
            return node
        return _method("weigh_literal", [node], node.lineno)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        if node.ctx != "load":
            return node
        return self.visit_List(node)


def _method(name: str, args: list[Any], lineno: int) -> nodes.Call:
    target = nodes.EnvironmentAttribute(name, lineno=lineno)
    return nodes.Call(target, args, [], None, None, lineno=lineno)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training masks; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=_check_printed,
        )
        self.concat = _concat_parts  # type: ignore[method-assign]
        self.filters = {name: _metered(name, self.filters[name]) for name in _FILTERS} | {"tojson": _tojson}
        self.globals = {
            "range": self.globals["range"],
            "namespace": _SafeNamespace,
            "dict": _make_dict,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def charge_turn(self) -> str:
        """Called in each loop turn, and charged as any call is."""
        return ""

    def concat_values(self, *values: object) -> str:
        for value in values:
            budget().weigh(value)
        return _concat_parts([str(value) for value in values])

    def weigh_literal(self, value: object) -> object:
        budget().spend(budget().weigh(value))
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text = value.__self__

        def metered(*args: Any, **kwargs: Any) -> str:
            _check_format(text)
            budget().grow(len(text) + budget().weigh([args, kwargs]) * text.count("{"))
            return wrapped(*args, **kwargs)

        return metered

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise jinja2.exceptions.SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STR_METHODS
        if isinstance(obj, (int, float, bytes, list, tuple, dict, range)):
            return attr in _OTHER_METHODS
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        budget().spend(TURN_COST)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            _charge_str_method(owner, name, args, kwargs)
        elif isinstance(__obj, Macro):
            budget().weigh([args, kwargs])
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        left_size, right_size = _size(left), _size(right)
        if operator == "+" and left_size is not None and right_size is not None:
            budget().grow(left_size + right_size)
        elif operator == "*" and (left_size is not None or right_size is not None):
            sized, times = (left, right) if left_size is not None else (right, left)
            if isinstance(times, int):
                budget().grow(max(times, 0) * budget().weigh(sized))
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
            budget().grow(len(left) + budget().weigh(right))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INT_BITS:
                raise TemplateLimitError(f"it makes a number of more than {MAX_INT_BITS} bits")
        return super().call_binop(context, operator, left, right)


class _SafeNamespace(Namespace):
    """`namespace()` without underscored names, which would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attrs = dict(*args, **kwargs)
        budget().weigh(attrs)
        for name in attrs:
            _check_name(name)
        Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} starts with an underscore")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    made: dict[Any, Any] = dict(*args, **kwargs)
    budget().spend(budget().weigh(made))
    return made


def _raise_exception(message: object) -> None:
    raise TemplateRefusalError(str(message))


def _strftime_now(form: str) -> str:
    # A number after % is a width, which the C library pads to.
    if re.search(r"%[^A-Za-z%]*\d", form):
        raise TemplateLimitError("it pads a date")
    budget().grow(len(form) * 32)
    return datetime.now().strftime(form)


def _check_printed(value: Any) -> Any:
    if not isinstance(value, (str, int, float, Undefined, type(None))):
        budget().spend(budget().weigh(value))
    return value


def _concat_parts(parts: Iterable[str]) -> str:
    """What `{% set %}` blocks, macros and `~` use to join their text."""
    parts = list(parts)
    budget().grow(sum(map(len, parts)))
    return "".join(parts)


def _size(value: object) -> int | None:
    return len(value) if isinstance(value, (str, list, tuple)) else None


def _check_format(form: str) -> None:
    """Refuse a width that pads text, be it a number or taken from an argument."""
    if re.search(r"\d{4,}|\*|\{[^{}]*\{", form):
        raise TemplateLimitError("it pads text")


def _charge_str_method(text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if name == "join" and args:
        items = args[0] if isinstance(args[0], (list, tuple)) else []
        budget().grow(len(text) * len(items) + budget().weigh(items))
    elif name == "replace" and len(args) >= 2:
        _charge_replace(text, *args[:2])
    else:
        budget().grow(len(text))


def _charge_replace(text: object, old: object, new: object, count: object = None) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        budget().grow(len(text) + (text.count(old) if old else len(text) + 1) * len(new))


def _metered(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its input, and ahead for its output where that can be much larger."""
    passed = getattr(function, "jinja_pass_arg", None)
    charge = _CHARGES.get(name, _charge_input)

    def metered(*args: Any, **kwargs: Any) -> Any:
        lead, (value, *rest) = (args[:1], args[1:]) if passed is not None else ((), args)
        if name == "join" and not isinstance(value, (str, Mapping, Undefined, type(None))):
            value = list(value)
        budget().spend(TURN_COST)
        charge(value, *rest, **kwargs)
        return function(*lead, value, *rest, **kwargs)

    if passed is not None:
        metered.jinja_pass_arg = passed  # type: ignore[attr-defined]
    return metered


def _charge_input(value: object, *rest: object, **kwargs: object) -> None:
    budget().spend(_size(value) or 0)


def _charge_string(value: object) -> None:
    budget().grow(budget().weigh(value))


def _charge_join(value: object, d: object = "", attribute: object = None) -> None:
    budget().grow((_size(value) or 0) * (_size(d) or 0) + budget().weigh(value))


def _charge_indent(value: object, width: object = 4, first: bool = False, blank: bool = False) -> None:
    step = len(width) if isinstance(width, str) else width
    if not isinstance(step, int) or step > MAX_PADDING:
        raise TemplateLimitError("it pads text")
    if isinstance(value, str):
        budget().grow(len(value) + (value.count("\n") + 1) * step)


def _charge_round(value: object, precision: object = 0, method: str = "common") -> None:
    if not isinstance(precision, int) or abs(precision) > 32:
        raise TemplateLimitError("it rounds to an absurd precision")


def _charge_sum(value: object, attribute: object = None, start: object = 0) -> None:
    if not isinstance(start, (int, float)):
        raise TemplateLimitError("it sums what are no numbers")


_CHARGES: dict[str, Callable[..., None]] = {
    "join": _charge_join,
    "replace": _charge_replace,
    "indent": _charge_indent,
    "round": _charge_round,
    "sum": _charge_sum,
    "string": _charge_string,
}


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, keys in their own order."""
    if indent is not None and (not isinstance(indent, int) or indent > MAX_PADDING):
        raise TemplateLimitError("it pads text")
    budget().grow(budget().weigh(value))
    # Piece by piece, since indentation grows with the depth.
    encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    parts, size = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        if size > budget().limits.output_chars:
            raise TemplateLimitError(f"it makes a value of more than {budget().limits.output_chars} characters")
    text = "".join(parts)
    if not ensure_ascii:
        return text
    keep = budget().keep
    return re.sub(r"[^\x00-\x7f]", lambda char: char[0] if char[0] == keep else json.dumps(char[0])[1:-1], text)
