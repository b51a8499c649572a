"""Text to token ids and back, over the `tokenizers` library.

One rule beyond that library: text never becomes a control token unless the caller asks for it. The underlying model is
built without the control tokens (added tokens such as `<｜User｜>`, special or not); a second, tiny matcher finds their
strings where `parse_special=True` allows it. Ids of ordinary text are the same as with the library itself.

Bytes are the common ground: every id stands for fixed bytes, and text is their UTF-8 decoding. That makes streaming
exact: a code point split over tokens appears when its last byte arrives.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import orjson

from shoal.errors import FileError
from shoal.formats import tokenizer_json
from shoal.formats.atomic import atomic_file
from shoal.formats.tokenizer_json import Json

# Added tokens made only of these are pieces of ordinary text (runs of spaces, words), not control tokens.
_MARKUP = re.compile(r"[<>\[\]{}|｜]")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StreamDecoder:
    """Turns ids into text one at a time. The pieces joined are what `Tokenizer.decode` gives for all ids together."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, continuing: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_next = tokenizer.strips_first_space and not continuing
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that is certain after this token; may be empty, never holds half a code point."""
        if self._skip_special and self._tokenizer.is_special(token_id):
            return ""
        return self._strip(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished code point, else nothing."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._strip_next and text:
            self._strip_next = False
            return text[1:] if text[0] == " " else text
        return text


class Tokenizer:
    """A vocabulary and its rules. Made by `load_tokenizer_json` or `gguf_tokenizer.tokenizer_from_gguf`.

    Attributes:
        vocab_size: highest token id + 1; a model may have more embedding rows, never fewer (`check_fits`).
        bos_token_id, pad_token_id: None where the model has none.
        eos_token_ids: every id that ends a text, the main one first.
        add_bos: whether `encode` starts with the bos token by default.
        fim_order: in which order the model is asked to fill a gap, `psm` or `spm` (`fim.fim_prompt`).
        strips_first_space: SentencePiece style, where the first word carries a space that is no part of the text.
    """

    def __init__(
        self,
        data: Json,
        where: str | Path,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int | None = None,
        add_bos: bool | None = None,
        fim_order: str = "psm",
    ) -> None:
        """`data` is a `tokenizer.json` that `tokenizer_json.check` has accepted; `where` names it in errors.

        Raises:
            FileError: damaged, inconsistent or of a kind that is not supported.
        """
        self.where = Path(where)
        self._source = orjson.dumps(data)
        vocab = tokenizer_json.vocab_of(data)
        added = data["added_tokens"]
        self._added: dict[str, int] = {entry["content"]: entry["id"] for entry in added}
        self._special = frozenset(entry["id"] for entry in added if entry["special"])
        self._control = {
            entry["content"]: entry["id"] for entry in added if entry["special"] or _MARKUP.search(entry["content"])
        }
        self._control_ids = frozenset(self._control.values())
        self._strings: list[str | None] = tokenizer_json.strings_by_id(vocab, self._added)
        self.vocab_size = len(self._strings)
        self._vocab = vocab
        self._byte_level = tokenizer_json.is_byte_level(data, self.where)
        self.strips_first_space = not self._byte_level and tokenizer_json.strips_first_space(data)
        self._bytes: list[bytes | None] = [None] * self.vocab_size
        self._plain = tokenizer_json.build_plain(data, self._control, self.where)
        self._rest = tokenizer_json.build_rest(data, self._control, self.where)
        self._matcher = tokenizer_json.build_matcher(data, self.where)
        # Its ids are its own; a match's text may include the spaces that a token swallows.
        self._matched = {self._matcher.token_to_id(token): token_id for token, token_id in self._control.items()}
        for name, value in (("bos_token_id", bos_token_id), ("pad_token_id", pad_token_id)):
            self._check_id(name, value)
        for value in eos_token_ids:
            self._check_id("eos_token_id", value)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(dict.fromkeys(eos_token_ids))
        self.pad_token_id = pad_token_id
        self.fim_order = fim_order
        starts = tokenizer_json.template_start(data)
        self.add_bos = bos_token_id is not None and (bos_token_id == starts if add_bos is None else add_bos)

    def _check_id(self, name: str, value: int | None) -> None:
        if value is not None and not 0 <= value < self.vocab_size:
            raise FileError(self.where, f"{value} is no token id, there are {self.vocab_size}", item=name)

    # Text to ids

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Ids of `text`. Never fails on odd text: lone surrogates become U+FFFD.

        Args:
            add_bos: start with the bos token; None does what the model's own configuration says.
            parse_special: turn the strings of control tokens into their ids. Leave it off for text from outside.
        """
        text = well_formed(text)
        ids: list[int] = []
        if self.bos_token_id is not None and (self.add_bos if add_bos is None else add_bos):
            ids.append(self.bos_token_id)
        if not parse_special:
            return ids + self.encode_piece(text)
        at = 0
        for start, end, token_id in self.find_control(text):
            ids += self.encode_piece(text[at:start], first=at == 0)
            ids.append(token_id)
            at = end
        return ids + self.encode_piece(text[at:], first=at == 0)

    def encode_piece(self, text: str, *, first: bool = True) -> list[int]:
        """Ids of plain text without bos; `first` tells whether it starts the whole text or follows a control token."""
        if not text:
            return []
        model = self._plain if first or self._rest is None else self._rest
        with tokenizer_json.library_errors(self.where):
            ids: list[int] = model.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str], *, add_bos: bool | None = None) -> list[list[int]]:
        """`encode` of many texts at once on all cores, never parsing control tokens."""
        lead = (
            [self.bos_token_id]
            if self.bos_token_id is not None and (self.add_bos if add_bos is None else add_bos)
            else []
        )
        clean = [well_formed(text) for text in texts]
        with tokenizer_json.library_errors(self.where):
            return [lead + item.ids for item in self._plain.encode_batch_fast(clean, add_special_tokens=False)]

    def find_control(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of every control token's string in `text`, leftmost and longest, as the library does."""
        if not self._control:
            return
        with tokenizer_json.library_errors(self.where):
            found = self._matcher.encode(text, add_special_tokens=False)
        for index, (start, end) in zip(found.ids, found.offsets, strict=True):
            if index in self._matched:
                yield start, end, self._matched[index]

    # Ids to text

    def decode(self, ids: Sequence[int], *, skip_special: bool = True, continuing: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, unknown ids nothing.

        `continuing`: the ids go on from earlier text, so a leading space is kept in SentencePiece vocabularies.
        """
        kept = (i for i in ids if not (skip_special and i in self._special))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return text[1:] if self.strips_first_space and not continuing and text[:1] == " " else text

    def stream(self, *, skip_special: bool = True, continuing: bool = False) -> StreamDecoder:
        return StreamDecoder(self, skip_special=skip_special, continuing=continuing)

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token; control tokens give their name, ids without a token nothing."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        value = self._bytes[token_id]
        if value is None:
            value = self._bytes[token_id] = self._to_bytes(self._strings[token_id])
        return value

    def _to_bytes(self, string: str | None) -> bytes:
        if string is None:
            return b""
        if string in self._added:
            return string.encode()
        if self._byte_level:
            table = tokenizer_json.CHAR_TO_BYTE
            if all(char in table for char in string):
                return bytes(table[char] for char in string)
            return string.encode()
        byte = _BYTE_TOKEN.fullmatch(string)
        return bytes([int(byte[1], 16)]) if byte else string.replace(tokenizer_json.METASPACE, " ").encode()

    # Single tokens

    def token_id(self, token: str) -> int | None:
        """Id of a token by its stored name (`<｜User｜>`, `Ġthe`), or None."""
        found = self._added.get(token)
        return self._vocab.get(token) if found is None else found

    def token_string(self, token_id: int) -> str | None:
        """The stored name of a token, or None."""
        return self._strings[token_id] if 0 <= token_id < self.vocab_size else None

    def is_control(self, token_id: int) -> bool:
        """Whether plain text can never produce this id."""
        return token_id in self._control_ids

    def is_special(self, token_id: int) -> bool:
        """Whether `decode` leaves this token out."""
        return token_id in self._special

    @property
    def control_tokens(self) -> Mapping[str, int]:
        return self._control

    @cached_property
    def special_strings(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `pad_token` by name, as chat templates expect them."""
        ids = {"bos_token": self.bos_token_id, "pad_token": self.pad_token_id}
        ids["eos_token"] = self.eos_token_ids[0] if self.eos_token_ids else None
        return {name: self._strings[i] or "" for name, i in ids.items() if i is not None}

    def source_json(self) -> Json:
        """The parsed `tokenizer.json`, fresh on each call."""
        return tokenizer_json.as_object(self._source, self.where)

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into an existing folder."""
        folder = Path(folder)
        names = self.special_strings
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": self.add_bos, "add_eos_token": False}
        config |= {"clean_up_tokenization_spaces": False, **names}
        config |= {} if self.fim_order == "psm" else {"fim_order": self.fim_order}
        files = {"tokenizer.json": self._source}
        files["special_tokens_map.json"] = orjson.dumps(names, option=orjson.OPT_INDENT_2)
        files["tokenizer_config.json"] = orjson.dumps(config, option=orjson.OPT_INDENT_2)
        for name, content in files.items():
            with atomic_file(folder / name) as out:
                out.write(content)


def load_tokenizer_json(
    folder: str | Path,
    *,
    bos_token_id: int | None = None,
    eos_token_ids: Sequence[int] = (),
    pad_token_id: int | None = None,
) -> Tokenizer:
    """Read a Hugging Face folder's tokenizer.

    The ids given come from the model's own configuration: bos and pad count only where the tokenizer's files name none,
    the eos ids are added to the tokenizer's own.

    Raises:
        FileError: `tokenizer.json` is missing, damaged or inconsistent.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    data = tokenizer_json.as_object(tokenizer_json.read_limited(path), path)
    config = tokenizer_json.read_optional(folder / "tokenizer_config.json")
    names = {**tokenizer_json.read_optional(folder / "special_tokens_map.json"), **config}
    add_bos = config.get("add_bos_token")
    tokenizer_json.check(data, path)
    tokens = tokenizer_json.all_tokens(data)
    bos, eos, pad = (tokenizer_json.named_id(names.get(key), tokens) for key in ("bos_token", "eos_token", "pad_token"))
    size = max(tokens.values(), default=-1) + 1
    given = [i for i in eos_token_ids if 0 <= i < size]
    return Tokenizer(
        data,
        path,
        bos_token_id=bos if bos is not None else _within(bos_token_id, size),
        eos_token_ids=([] if eos is None else [eos]) + given,
        pad_token_id=pad if pad is not None else _within(pad_token_id, size),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        fim_order="spm" if config.get("fim_order") == "spm" else "psm",
    )


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise FileError if a token id would point past the model's `vocab_size` embedding rows."""
    if tokenizer.vocab_size > vocab_size:
        last = tokenizer.token_string(tokenizer.vocab_size - 1)
        raise FileError(
            tokenizer.where, f"has id {tokenizer.vocab_size - 1}, the model only {vocab_size} embedding rows", item=last
        )


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD; almost always `text` itself."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _within(token_id: int | None, size: int) -> int | None:
    return token_id if token_id is not None and 0 <= token_id < size else None
