"""Fill-in-the-middle: the control tokens by which a model was taught to write what lies between two texts.

Every family puts the known text first: `<begin> prefix <hole> suffix <end>`, and the model goes on with the middle
(Bavarian et al. 2022, arXiv 2207.14255, PSM order). Shoal's own small model says `"fim_order": "spm"` in its
tokenizer_config.json and is asked in the paper's second form of SPM, `<begin> <hole> suffix <end> prefix`: an empty
prefix, and a middle that begins with the known one, so that the gap follows it directly.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.formats.tokenizer import Tokenizer

# DeepSeek (Coder, V2, V3); Qwen2.5-Coder and later; StarCoder and its kin; Code Llama.
MARKS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


def fim_marks(tokenizer: Tokenizer) -> tuple[int, int, int] | None:
    """Ids of the tokens before the prefix, before the suffix and before the middle; None: the model has none."""
    for names in MARKS:
        first, second, third = (tokenizer.token_id(name) for name in names)
        if first is not None and second is not None and third is not None:
            return first, second, third
    return None


def fim_prompt(tokenizer: Tokenizer, prefix: Sequence[int], suffix: Sequence[int]) -> list[int] | None:
    """The prompt whose continuation is the text between `prefix` and `suffix`; None: the model has no such tokens.

    Neither part carries a bos token; it is put in front where the tokenizer wants one.
    """
    marks = fim_marks(tokenizer)
    if marks is None:
        return None
    bos = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    if tokenizer.fim_order == "spm":
        return [*bos, marks[0], marks[1], *suffix, marks[2], *prefix]
    return [*bos, marks[0], *prefix, marks[1], *suffix, marks[2]]
