"""The `tokenizer.json` format: reading it with suspicion, and building the library objects that `Tokenizer` uses.

A file is checked before the Rust library sees it, because that library trusts its input: it renumbers added tokens
silently, aborts on inconsistent merges and runs any regular expression it is given.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import tokenizers

from shoal.errors import FileError

Json = dict[str, Any]

MAX_FILE_BYTES = 256 << 20
MAX_ADDED = 1 << 17
MAX_ID = 1 << 22
METASPACE = "▁"
# Stands for the unknown token inside the model, so that its name in a text means nothing.
_UNKNOWN = "\ufdd0unknown"
_SPM_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _byte_chars() -> dict[str, int]:
    """GPT-2's printable stand-ins: printable Latin-1 bytes stand for themselves, the others follow from U+0100."""
    keep = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(keep)]
    return {chr(byte): byte for byte in keep} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


CHAR_TO_BYTE = _byte_chars()
BYTE_TO_CHAR = {byte: char for char, byte in CHAR_TO_BYTE.items()}


# Files


def read_limited(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise FileError(path, f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror or error}") from None


def read_optional(path: Path) -> Json:
    """A JSON object, or nothing if the file is absent."""
    return as_object(read_limited(path), path) if path.exists() else {}


def as_object(source: bytes, where: Path) -> Json:
    try:
        data = orjson.loads(source)
    except orjson.JSONDecodeError as error:
        raise FileError(where, f"is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise FileError(where, f"must hold a JSON object, holds {type(data).__name__}")
    return data


@contextmanager
def library_errors(where: Path) -> Iterator[None]:
    """Turn the library's exceptions and Rust panics (which are no `Exception`) into FileError."""
    try:
        yield
    except FileError:
        raise
    except BaseException as error:
        if type(error).__name__ == "PanicException" and "retry-limit" in str(error):
            raise FileError(where, "a regular expression backtracks without end", item="pre_tokenizer") from None
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise FileError(where, f"the tokenizer library refuses it: {error}") from None
        raise


# Checks


def check(data: Json, where: Path) -> None:
    """Fill in what may be absent and refuse what is inconsistent. Changes `data` in place.

    Raises:
        FileError: naming the part at fault.
    """
    for name, kind in (("normalizer", dict), ("pre_tokenizer", dict), ("post_processor", dict), ("decoder", dict)):
        if not isinstance(data.setdefault(name, None), (kind, type(None))):
            raise FileError(where, "must be an object", item=name)
    data["truncation"] = data["padding"] = None
    model = data.get("model")
    if not isinstance(model, dict):
        raise FileError(where, "is missing", item="model")
    kind = model.setdefault("type", "BPE")
    if kind == "BPE":
        _check_bpe(model, where)
    elif kind == "Unigram":
        _check_unigram(model, where)
    else:
        raise FileError(where, f"{kind!r} is not supported, BPE and Unigram are", item="model.type")
    _check_added(data, where)
    _check_ids(data, where)
    for pattern in patterns_of(data["pre_tokenizer"]) + patterns_of(data["normalizer"]):
        _check_pattern(pattern, where)


def _check_bpe(model: Json, where: Path) -> None:
    vocab, merges = model.get("vocab"), model.setdefault("merges", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise FileError(where, "vocab must be an object and merges a list", item="model")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise FileError(where, f"{model[name]!r} is not supported", item=f"model.{name}")
    model["dropout"] = None
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise FileError(where, f"must be two tokens, is {merge!r:.80}", item=f"model.merges[{rank}]")
        for token in (*pair, pair[0] + pair[1]):
            if token not in vocab:
                raise FileError(where, f"{token!r:.80} is not in the vocabulary", item=f"model.merges[{rank}]")
        merges[rank] = pair


def _check_unigram(model: Json, where: Path) -> None:
    vocab = model.get("vocab")
    if not isinstance(vocab, list) or not vocab:
        raise FileError(where, "must be a list", item="model.vocab")
    for index, entry in enumerate(vocab):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise FileError(where, "must be a token and its score", item=f"model.vocab[{index}]")


def _check_added(data: Json, where: Path) -> None:
    added = data.setdefault("added_tokens", [])
    if not isinstance(added, list):
        raise FileError(where, "must be a list", item="added_tokens")
    if len(added) > MAX_ADDED:
        raise FileError(where, f"holds {len(added)} tokens, more than {MAX_ADDED}", item="added_tokens")
    for index, entry in enumerate(added):
        item = f"added_tokens[{index}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not entry["content"]:
            raise FileError(where, "has no content", item=item)
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special"):
            if not isinstance(entry.setdefault(name, False), bool):
                raise FileError(where, f"{name} must be true or false", item=item)


def _check_ids(data: Json, where: Path) -> None:
    """Each id belongs to one token and each token has one id."""
    seen: dict[int, str] = {}
    vocab = vocab_of(data)
    for token, token_id in vocab.items():
        _claim(seen, token, token_id, where)
    for entry in data["added_tokens"]:
        token, token_id = entry["content"], entry.get("id")
        if vocab.get(token, token_id) != token_id:
            raise FileError(where, f"has the ids {vocab[token]} and {token_id}", item=repr(token))
        _claim(seen, token, token_id, where)


def _claim(seen: dict[int, str], token: str, token_id: object, where: Path) -> None:
    if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < MAX_ID:
        raise FileError(where, f"has the id {token_id!r:.40}, not one below {MAX_ID}", item=f"{token!r:.80}")
    if seen.setdefault(token_id, token) != token:
        raise FileError(where, f"shares the id {token_id} with {seen[token_id]!r:.80}", item=f"{token!r:.80}")


def patterns_of(part: object) -> list[str]:
    """Every regular expression in a normalizer or pre-tokenizer."""
    if isinstance(part, dict):
        own = [part["Regex"]] if isinstance(part.get("Regex"), str) else []
        return own + [pattern for value in part.values() for pattern in patterns_of(value)]
    if isinstance(part, list):
        return [pattern for value in part for pattern in patterns_of(value)]
    return []


def _check_pattern(pattern: str, where: Path) -> None:
    """Refuse an expression that can take exponential time: a repeated group whose inside repeats or branches.

    Then try it on long runs, where a slower than quadratic one trips the library's own limit on backtracking.
    """
    if _repeats_a_choice(pattern):
        raise FileError(where, f"{pattern!r:.80} may backtrack without end", item="pre_tokenizer")
    with library_errors(where):
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        for char in "aA1 .\n\té中_":
            split.pre_tokenize_str(char * 2048 + "\x01")


def _repeats_a_choice(pattern: str) -> bool:
    """Whether a group under `*`, `+` or `{n,}` holds a quantifier or an alternative."""
    # Classes and escapes are single characters here; then groups are judged from the inside out.
    flat = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL)
    flat = re.sub(r"\[(?:[^\[\]]|\[[^\[\]]*\])*\]", "x", flat)
    group = re.compile(r"\((\?[^:()]*:|\?[=!>]|\?<[=!])?([^()]*)\)(\*|\+|\{\d+,\})?")
    while found := group.search(flat):
        choice = re.search(r"[*+?|]|\{\d*,\d*\}", found[2]) is not None
        if choice and found[3]:
            return True
        # A group with a choice inside stays one when it is nested further out.
        flat = flat[: found.start()] + ("x?" if choice else "x") + (found[3] or "") + flat[found.end() :]
    return False


# Facts about a checked file


def vocab_of(data: Json) -> dict[str, int]:
    """Token to id of the model proper, without the added tokens."""
    model = data["model"]
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    vocab: dict[str, int] = model["vocab"]
    return vocab


def strings_by_id(vocab: Mapping[str, int], added: Mapping[str, int]) -> list[str | None]:
    size = max((*vocab.values(), *added.values()), default=-1) + 1
    out: list[str | None] = [None] * size
    for tokens in (vocab, added):
        for token, token_id in tokens.items():
            out[token_id] = token
    return out


def steps_of(part: Json | None, key: str) -> list[Json]:
    """The steps of a decoder, pre-tokenizer or post-processor, be it one or a Sequence."""
    if part is None:
        return []
    if part.get("type") == "Sequence":
        return [step for inner in part.get(key, []) for step in steps_of(inner, key)]
    return [part]


def is_byte_level(data: Json, where: Path) -> bool:
    """True for GPT-2's byte alphabet, False for SentencePiece's `▁` and `<0xNN>`."""
    kinds = {step.get("type") for step in steps_of(data["decoder"], "decoders")}
    if not kinds:
        kinds = {step.get("type") for step in steps_of(data["pre_tokenizer"], "pretokenizers")}
        kinds &= {"ByteLevel", "Metaspace"}
    if "ByteLevel" in kinds:
        return True
    if not kinds or not kinds <= _SPM_DECODERS:
        raise FileError(where, f"{sorted(map(str, kinds))} is not supported", item="decoder")
    return False


def strips_first_space(data: Json) -> bool:
    for step in steps_of(data["decoder"], "decoders"):
        if step.get("type") == "Strip" and step.get("start"):
            return True
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
    return False


def template_start(data: Json) -> int | None:
    """The id that the post-processor puts before a text, if it does."""
    for step in steps_of(data["post_processor"], "processors"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            special = single[0].get("SpecialToken", {}).get("id")
            ids = step.get("special_tokens", {}).get(special, {}).get("ids", [])
            return ids[0] if ids else None
    return None


def named_id(entry: object, tokens: Mapping[str, int]) -> int | None:
    """Id of a `bos_token`-like entry: a string, or an object with `content`."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return tokens.get(entry) if isinstance(entry, str) else None


def all_tokens(data: Json) -> dict[str, int]:
    return {**vocab_of(data), **{entry["content"]: entry["id"] for entry in data["added_tokens"]}}


# Library objects


def build_plain(data: Json, control: Mapping[str, int], where: Path) -> tokenizers.Tokenizer:
    """The tokenizer of ordinary text: the model without the control tokens and whatever would make one."""
    model = data["model"]
    plain = {**data, "post_processor": None, "model": dict(model)}
    text_like = [entry for entry in data["added_tokens"] if entry["content"] not in control]
    plain["added_tokens"] = text_like
    if model["type"] == "Unigram":
        plain["model"]["vocab"] = [
            [f"\ufdd0{index}" if piece in control else piece, score]
            for index, (piece, score) in enumerate(model["vocab"])
        ]
        return build(plain, where)
    vocab = {token: token_id for token, token_id in model["vocab"].items() if token not in control}
    vocab |= {entry["content"]: entry["id"] for entry in text_like}
    merges = model["merges"]
    if any(left + right in control or left in control or right in control for left, right in merges):
        merges = [pair for pair in merges if not ({*pair, pair[0] + pair[1]} & control.keys())]
    unknown = model.get("unk_token")
    if unknown is not None and unknown in control:
        vocab[_UNKNOWN] = control[unknown]
        plain["model"]["unk_token"] = _UNKNOWN
    plain["model"] |= {"vocab": vocab, "merges": merges}
    return build(plain, where)


def build_rest(data: Json, control: Mapping[str, int], where: Path) -> tokenizers.Tokenizer | None:
    """For vocabularies that mark only the very first word of a text: the tokenizer of what follows a control token."""
    steps = steps_of(data["pre_tokenizer"], "pretokenizers")
    if not any(step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps):
        return None
    other = {**data, "pre_tokenizer": copy.deepcopy(data["pre_tokenizer"])}
    for step in steps_of(other["pre_tokenizer"], "pretokenizers"):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    return build_plain(other, control, where)


def build_matcher(data: Json, where: Path) -> tokenizers.Tokenizer:
    """A tokenizer that knows the added tokens and nothing else: it finds them exactly as the library would."""
    normalizer = data["normalizer"] if any(entry["normalized"] for entry in data["added_tokens"]) else None
    empty = {"type": "BPE", "vocab": {}, "merges": [], "fuse_unk": False, "byte_fallback": False}
    empty |= {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    added = [{**entry, "id": index} for index, entry in enumerate(data["added_tokens"])]
    only = {"version": "1.0", "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": None}
    only |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None, "model": empty}
    return build(only, where)


def build(data: Json, where: Path) -> tokenizers.Tokenizer:
    with library_errors(where):
        return tokenizers.Tokenizer.from_str(orjson.dumps(data).decode())
