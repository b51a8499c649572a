"""Tokenizers inside GGUF files: read into the same `Tokenizer` as any other, and written so that llama.cpp agrees.

A GGUF file stores the vocabulary as parallel lists. Two kinds are supported:

    gpt2    byte-level BPE: tokens, merges and the name of a pre-tokenizer (`gguf_pretokenizers`)
    llama   SentencePiece BPE: tokens and scores; a pair is merged when its union is a token, best score first

Both become a `tokenizer.json`, so that saving, chat and streaming are the same code for every model. For the second,
merges are derived from the scores; equal scores of different tokens, which SentencePiece never writes, may be broken
differently from llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.errors import FileError
from shoal.formats import tokenizer_json
from shoal.formats.gguf_pretokenizers import PRE_TOKENIZERS, name_of, to_json
from shoal.formats.tokenizer import Tokenizer
from shoal.formats.tokenizer_json import METASPACE, Json

PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Tokens that end a turn under these names, whatever the fields say (as llama.cpp finds them).
_TURN_ENDS = {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>"}
_TURN_ENDS |= {"_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>", "<|eom_id|>"}
_LOOKS_SPECIAL = re.compile(r"<\|.*\|>|<｜.*｜>|<unused\d*>|<pad>|<mask>|<2mass>|\[@BOS@\]", re.DOTALL)


def tokenizer_from_gguf(fields: Mapping[str, object], *, where: str | Path = "GGUF") -> Tokenizer:
    """Build the tokenizer of a GGUF file from its metadata (`tokenizer.ggml.*`, lists as Python lists).

    Raises:
        FileError: a field is missing or wrong, or the kind of vocabulary or pre-tokenizer is not supported.
    """
    return _Reader(fields, Path(where)).read()


class _Reader:
    def __init__(self, fields: Mapping[str, object], where: Path) -> None:
        self.fields = fields
        self.where = where
        self.tokens = self.strings("tokens")
        types = self.fields.get(f"{PREFIX}token_type")
        self.types = [NORMAL] * len(self.tokens) if types is None else list(self.numbers("token_type"))
        if len(self.types) != len(self.tokens):
            raise FileError(where, f"has {len(self.types)} entries, not {len(self.tokens)}", item=f"{PREFIX}token_type")
        if types is None:
            for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
                if (token := self.token(f"{name}_token_id")) is not None:
                    self.types[token] = CONTROL
        self.tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(self.tokens)]

    def read(self) -> Tokenizer:
        model = self.fields.get(f"{PREFIX}model")
        if model == "gpt2":
            data, add_bos = self.byte_level()
        elif model == "llama":
            data, add_bos = self.sentencepiece()
        else:
            raise FileError(self.where, f"{model!r:.80} is not supported, gpt2 and llama are", item=f"{PREFIX}model")
        data["added_tokens"] = [
            {"id": index, "content": token, "special": kind != USER_DEFINED, "normalized": False}
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, UNKNOWN, USER_DEFINED)
        ]
        tokenizer_json.check(data, self.where)
        chosen = self.fields.get(f"{PREFIX}add_bos_token")
        return Tokenizer(
            data,
            self.where,
            bos_token_id=self.token("bos_token_id"),
            eos_token_ids=self.turn_ends(),
            pad_token_id=self.token("padding_token_id"),
            add_bos=chosen if isinstance(chosen, bool) else add_bos,
        )

    def byte_level(self) -> tuple[Json, bool]:
        name = self.fields.get(f"{PREFIX}pre", "default")
        kind = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
        if kind is None:
            raise FileError(self.where, f"{name!r:.80} is no pre-tokenizer that Shoal knows", item=f"{PREFIX}pre")
        merges = []
        for rank, merge in enumerate(self.strings("merges")):
            # The first character belongs to the left part even if it is a space.
            at = merge.find(" ", 1)
            if at < 0 or at == len(merge) - 1:
                raise FileError(self.where, f"must be two tokens, is {merge!r:.80}", item=f"{PREFIX}merges[{rank}]")
            merges.append([merge[:at], merge[at + 1 :]])
        model = {"type": "BPE", "vocab": self.vocab(), "merges": merges, "ignore_merges": kind.ignore_merges}
        decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        data = {"version": "1.0", "model": model, "pre_tokenizer": to_json(kind), "decoder": decoder}
        return data, kind.add_bos

    def sentencepiece(self) -> tuple[Json, bool]:
        scores = self.numbers("scores")
        if len(scores) != len(self.tokens):
            raise FileError(self.where, f"has {len(scores)} entries, not {len(self.tokens)}", item=f"{PREFIX}scores")
        unknown = next((token for token, kind in zip(self.tokens, self.types, strict=True) if kind == UNKNOWN), None)
        fallback = BYTE in self.types
        model: Json = {"type": "BPE", "vocab": self.vocab(), "merges": self.merges(scores), "unk_token": unknown}
        model |= {"fuse_unk": True, "byte_fallback": fallback}
        prefix = self.fields.get(f"{PREFIX}add_space_prefix", True) is not False
        normalizers: list[Json] = [{"type": "Prepend", "prepend": METASPACE}] if prefix else []
        normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": METASPACE})
        decoders: list[Json] = [{"type": "Replace", "pattern": {"String": METASPACE}, "content": " "}]
        decoders += [{"type": "ByteFallback"}, {"type": "Fuse"}]
        if prefix:
            decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        data = {"version": "1.0", "model": model, "normalizer": {"type": "Sequence", "normalizers": normalizers}}
        return data | {"decoder": {"type": "Sequence", "decoders": decoders}}, True

    def merges(self, scores: Sequence[float]) -> list[list[str]]:
        """Every way to make a token out of two, best score first; the ways of one token stay together."""
        plain = {
            token: scores[index]
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (NORMAL, BYTE)
        }
        found: list[tuple[float, int, list[str]]] = []
        for token, score in plain.items():
            for cut in range(1, len(token)):
                left, right = token[:cut], token[cut:]
                if left in plain and right in plain:
                    found.append((-score, len(found), [left, right]))
        return [pair for _, _, pair in sorted(found)]

    # Fields

    def vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = {}
        for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind == UNUSED:
                continue
            if vocab.setdefault(token, index) != index:
                raise FileError(self.where, f"has the ids {vocab[token]} and {index}", item=f"{token!r:.80}")
        return vocab

    def strings(self, name: str) -> list[str]:
        value = self.fields.get(PREFIX + name)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            problem = "is missing" if value is None else "must be a list of strings"
            raise FileError(self.where, problem, item=PREFIX + name)
        return list(value)

    def numbers(self, name: str) -> list[Any]:
        value = self.fields.get(PREFIX + name)
        to_list = getattr(value, "tolist", None)
        value = to_list() if to_list is not None else value
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, (int, float)) for item in value):
            problem = "is missing" if value is None else "must be a list of numbers"
            raise FileError(self.where, problem, item=PREFIX + name)
        return list(value)

    def token(self, name: str) -> int | None:
        value = self.fields.get(PREFIX + name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise FileError(
                self.where, f"{value!r:.40} is no token id, there are {len(self.tokens)}", item=PREFIX + name
            )
        return value

    def turn_ends(self) -> list[int]:
        ids = [self.token(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        ids += [index for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
                if kind in (CONTROL, USER_DEFINED) and token in _TURN_ENDS]  # fmt: skip
        return [index for index in ids if index is not None]


def gguf_fields_from_tokenizer(tokenizer: Tokenizer) -> dict[str, object]:
    """The `tokenizer.ggml.*` metadata with which llama.cpp gives the same ids.

    Ids without a token become unused `[PAD<id>]` entries.

    Raises:
        FileError: GGUF cannot express this tokenizer, such as a pre-tokenizer without a name there.
    """
    data = tokenizer.source_json()
    where = tokenizer.where
    model = data["model"]
    if model["type"] != "BPE":
        raise FileError(where, f"{model['type']} has no form in GGUF", item="model.type")
    added = {entry["content"]: entry for entry in data["added_tokens"]}
    for token, entry in added.items():
        if entry["lstrip"] or entry["rstrip"] or entry["single_word"]:
            raise FileError(where, "lstrip, rstrip and single_word have no form in GGUF", item=repr(token))
    tokens = [tokenizer.token_string(index) for index in range(tokenizer.vocab_size)]
    fields: dict[str, object] = {
        f"{PREFIX}tokens": [f"[PAD{index}]" if token is None else token for index, token in enumerate(tokens)],
        f"{PREFIX}token_type": [_token_type(token, added, model) for token in tokens],
        f"{PREFIX}add_bos_token": tokenizer.add_bos,
        f"{PREFIX}add_eos_token": False,
    }
    fields |= _sentencepiece_fields(data, where) if model.get("byte_fallback") else _byte_level_fields(data, where)
    ends = tokenizer.eos_token_ids
    unknown = tokenizer.token_id(model["unk_token"]) if model.get("unk_token") else None
    ids = {"bos": tokenizer.bos_token_id, "padding": tokenizer.pad_token_id, "unknown": unknown}
    ids |= {"eos": ends[0] if ends else None, "eot": ends[1] if len(ends) > 1 else None}
    return fields | {f"{PREFIX}{name}_token_id": index for name, index in ids.items() if index is not None}


def _token_type(token: str | None, added: Mapping[str, Json], model: Json) -> int:
    if token is None:
        return UNUSED
    if token == model.get("unk_token"):
        return UNKNOWN
    if token in added:
        return CONTROL if added[token]["special"] or _LOOKS_SPECIAL.fullmatch(token) else USER_DEFINED
    return BYTE if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL


def _byte_level_fields(data: Json, where: Path) -> dict[str, object]:
    normalizer = data["normalizer"] or {"type": "Sequence", "normalizers": []}
    # llama.cpp skips Qwen's NFC; ids then differ for text that is not composed.
    if normalizer["type"] != "NFC" and normalizer.get("normalizers") != []:
        raise FileError(where, f"{normalizer['type']} has no form in GGUF", item="normalizer")
    steps = tokenizer_json.steps_of(data["pre_tokenizer"], "pretokenizers")
    name = name_of(steps, ignore_merges=bool(data["model"].get("ignore_merges")))
    if name is None:
        raise FileError(where, "is not among the kinds that GGUF has a name for", item="pre_tokenizer")
    merges = []
    for left, right in data["model"]["merges"]:
        if " " in left[1:] or " " in right:
            raise FileError(where, f"{left!r} + {right!r} holds a space, which GGUF cannot store", item="model.merges")
        merges.append(f"{left} {right}")
    return {f"{PREFIX}model": "gpt2", f"{PREFIX}pre": name, f"{PREFIX}merges": merges}


def _sentencepiece_fields(data: Json, where: Path) -> dict[str, object]:
    """Scores that bring the merges back: a token's is minus the rank of its first merge."""
    steps = tokenizer_json.steps_of(data["normalizer"], "normalizers")
    prefix = [step for step in steps if step == {"type": "Prepend", "prepend": METASPACE}]
    replace = [step for step in steps if step == {"type": "Replace", "pattern": {"String": " "}, "content": METASPACE}]
    if data["pre_tokenizer"] is not None or steps != prefix[:1] + replace[:1] or not replace:
        raise FileError(where, "is not SentencePiece's, the only one that GGUF's kind llama has", item="normalizer")
    scores: dict[str, float] = {}
    last = None
    for rank, (left, right) in enumerate(data["model"]["merges"]):
        token = left + right
        if token in scores and token != last:
            raise FileError(where, f"{token!r} is merged at two ranks, which scores cannot say", item="model.merges")
        scores.setdefault(token, -float(rank))
        last = token
    vocab = tokenizer_json.strings_by_id(
        data["model"]["vocab"], {entry["content"]: entry["id"] for entry in data["added_tokens"]}
    )
    lowest = -float(len(data["model"]["merges"]))
    return {
        f"{PREFIX}model": "llama",
        f"{PREFIX}scores": [scores.get(token or "", lowest) for token in vocab],
        f"{PREFIX}add_space_prefix": bool(prefix),
    }
