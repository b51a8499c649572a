"""How a text is cut into words before merging: the kinds that GGUF knows by name, and their `tokenizer.json` form.

`tokenizer.ggml.pre` names a list of regular expressions, applied one after the other, each isolating its matches; the
expressions are part of the format (llama.cpp, src/llama-vocab.cpp). A wrong name gives wrong ids without any error, so
an unknown one is refused in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
).replace(r"\r\n", "\r\n")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = _CASED % ((_CONTRACTIONS + "?",) * 2) + r"|\p{N}{1,3}|" + _CASED_TAIL
_TEKKEN = _CASED % ("", "") + r"|\p{N}|" + _CASED_TAIL
_SEED_CODER = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"

# Letters with case as DeepSeek-LLM's tokenizer lists them: code points and ranges, in its order.
_CASED_LETTERS = """
    41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1
    3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A
    1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4
    1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128
    212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D
    A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F
    104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""


def _char_class(ranges: str) -> str:
    return "".join("-".join(chr(int(code, 16)) for code in item.split("-")) for item in ranges.split())


_DEEPSEEK_LETTERS = r"\s?[" + _char_class(_CASED_LETTERS) + "]+"
_DEEPSEEK_PUNCTUATION = r"\s?[" + _char_class("21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002") + "]+"
_DEEPSEEK_CJK = "[" + _char_class("4E00-9FA5 800-4E00 AC00-D7FF") + "]+"
_DEEPSEEK3_CJK = "[" + _char_class("4E00-9FA5 3040-309F 30A0-30FF") + "]+"


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions in order, and whether a word that is itself a token skips the merges (`ignore_merges`)."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_BY_GPT2 = PreTokenizer((_GPT2,))
_BY_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_BY_QWEN2 = PreTokenizer((_QWEN2,))
_BY_LLAMA3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_BY_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _DEEPSEEK3_CJK, _DEEPSEEK3))
_BY_GPT4O = PreTokenizer((_GPT4O,))

# The first name of each kind is the one we write.
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "gpt-2": _BY_GPT2,
    "smollm": _BY_DIGITS,
    "qwen2": _BY_QWEN2,
    "qwen35": PreTokenizer((_QWEN35,)),
    "llama-bpe": _BY_LLAMA3,
    "dbrx": PreTokenizer((_LLAMA3,)),
    "deepseek-llm": PreTokenizer(
        ("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+")
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    "deepseek-v3": _BY_DEEPSEEK3,
    "gpt-4o": _BY_GPT4O,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
    "seed-coder": PreTokenizer((_SEED_CODER,)),
    "falcon": PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
for _same, _names in (
    (_BY_GPT2, "phi-2 mpt olmo jais trillion exaone4 gigachat a.x-4.0 mellum granite-docling"),
    (_BY_DIGITS, "starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_BY_QWEN2, "deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2"),
    (_BY_LLAMA3, "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2"),
    (PRE_TOKENIZERS["dbrx"], "smaug-bpe glm4 chatglm-bpe"),
    (_BY_DEEPSEEK3, "hunyuan-dense joyai-llm"),
    (_BY_GPT4O, "llama4 kanana2 minimax-m2"),
):
    PRE_TOKENIZERS |= dict.fromkeys(_names.split(), _same)

# Other spellings of the same cut, found in published `tokenizer.json` files.
_SPELLINGS = {
    ("[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_PUNCTUATION, r"\s+$", _DEEPSEEK_CJK, r"\p{N}"): "deepseek-llm",
}


def to_json(kind: PreTokenizer) -> Json:
    """The `pre_tokenizer` of a `tokenizer.json`; GPT-2's own expression is built into `ByteLevel`."""
    built_in = kind.patterns[-1] == _GPT2
    steps: list[Json] = []
    for pattern in kind.patterns[: -1 if built_in else None]:
        if pattern == r"\p{N}":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False})
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": built_in})
    return {"type": "Sequence", "pretokenizers": steps}


def name_of(steps: list[Json], *, ignore_merges: bool) -> str | None:
    """GGUF's name for the steps of a `pre_tokenizer`, or None if it has none."""
    patterns = _patterns(steps)
    if patterns is None:
        return None
    if patterns in _SPELLINGS and not ignore_merges:
        return _SPELLINGS[patterns]
    for name, kind in PRE_TOKENIZERS.items():
        if kind.patterns == patterns and kind.ignore_merges == ignore_merges:
            return name
    return None


def _patterns(steps: list[Json]) -> tuple[str, ...] | None:
    """The expressions of byte-level steps, None if one of them does something else."""
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    out = []
    for step in before:
        pattern = step.get("pattern", {}).get("Regex")
        if step.get("type") == "Digits" and step.get("individual_digits"):
            out.append(r"\p{N}")
        elif step.get("type") == "Split" and isinstance(pattern, str) and _isolates(step, pattern):
            out.append(pattern)
        else:
            return None
    return tuple([*out, _GPT2] if last.get("use_regex", True) else out)


def _isolates(step: Json, pattern: str) -> bool:
    """Keep the matches as words: `Isolated`, or `Removed` inverted where the matches cover every character."""
    if step.get("behavior") == "Removed" and step.get("invert"):
        return pattern in (_LLAMA3, _QWEN2, _GPT4O)
    return step.get("behavior") == "Isolated" and not step.get("invert")
