"""DeepSeek's own chat formats, for models that come without a template.

    v2     `User: …\\n\\nAssistant: …`                                (DeepSeek-LLM, V2, Coder-V2)
    v3     `<｜User｜>…<｜Assistant｜>…`, calls with a JSON code block  (V3)
    r1     as v3; the prompt ends with `<think>\\n`                   (R1)
    v3.1   `<｜Assistant｜></think>…` or, thinking, `<think>`         (V3.1)

They are templates like any other (`templates/*.jinja`), so they are saved with a model and run by the same code. The
strings are those of the published templates and of V3.1's model card. `｜` is U+FF5C, `▁` is U+2581.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.resources import files
from typing import Literal

from shoal.formats.chat import ChatFormat, chat_from_template

DeepSeekKind = Literal["v2", "v3", "r1", "v3.1"]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
_FILES = {"v2": "deepseek_v2", "v3": "deepseek_v3", "r1": "deepseek_r1", "v3.1": "deepseek_v3_1"}


def deepseek_chat(kind: DeepSeekKind) -> ChatFormat:
    """One of DeepSeek's formats. V3.1 thinks where `options={"thinking": True}`."""
    if kind not in _FILES:
        raise ValueError(f"{kind!r} is not one of {', '.join(_FILES)}")
    name = f"{_FILES[kind]}.jinja"
    source = (files("shoal.formats") / "templates" / name).read_text(encoding="utf-8")
    return chat_from_template(source, where=name, bos_token=BOS, eos_token=EOS)


def guess_deepseek_kind(tokens: Collection[str]) -> DeepSeekKind:
    """The format that a vocabulary was made for, told by its control tokens.

    R1 and V3.1 have the same ones; V3.1 it is, which answers without thinking unless asked to.
    """
    if "<｜User｜>" not in tokens:
        return "v2"
    return "v3.1" if "</think>" in tokens else "v3"
