"""Which prompts run in MLA's expanded form (DeepSeek-V2, arXiv 2405.04434 §2.1.2).

Absorbed, a query meets latents, which are several times as wide as a head's keys and values, but every head meets the
same ones: right for a few tokens. Expanded, each piece of a prompt first turns all latents before it into keys and
values: right for many. The two round differently. So the form is fixed when a prompt starts, by how much of it is left
to compute, and then holds for every piece of it: batches and pieces change no bit, but how much of a long prompt the
cache knew may change the last ones.
"""

from __future__ import annotations

from shoal.config import MLAConfig, ModelConfig
from shoal.errors import ConfigError

FORMS = ("auto", "absorbed", "expanded")
LONG_PROMPT = 512  # tokens to compute, a step's worth; shorter ones gain little, and no cached page changes their bits
BF16_COST = 1.8  # a bf16 multiplication of attention in int8 multiplications of a projection, as measured


def can_expand(config: ModelConfig) -> bool:
    """Whether the engine has an expanded form of the model's attention; bf16 pairs want even keys."""
    attention = config.attention
    return isinstance(attention, MLAConfig) and attention.qk_head_dim % 2 == 0


def expands_from(config: ModelConfig) -> int | None:
    """The least tokens left to compute for which a prompt is expanded; None if that never pays.

    With C the latent and H, V a head's plain key and value, a piece of m tokens that sees L before it saves
    m L (2 C - H - V) multiplications in attention and pays L C (H + V) for the expansion: the L is on both sides. Twice
    the break-even, because pieces are cut where other requests decode.
    """
    attention = config.attention
    if not isinstance(attention, MLAConfig) or not can_expand(config):
        return None
    latent, plain = attention.kv_lora_rank, attention.qk_nope_head_dim + attention.v_head_dim
    saved = BF16_COST * (2 * latent - plain)
    return None if saved <= 0 else max(LONG_PROMPT, round(2 * latent * plain / saved))


def expand_from(form: str, config: ModelConfig) -> int | None:
    """`expands_from` under what the user chose: `auto`, never (`absorbed`) or every prompt (`expanded`).

    Raises:
        ConfigError: no such form, or the model has only one.
    """
    if form not in FORMS:
        raise ConfigError("prefill", f"{form!r} is not one of {', '.join(FORMS)}")
    if form == "expanded" and not can_expand(config):
        raise ConfigError("prefill", "only models with latent attention (MLA) of even key width can expand")
    return {"auto": expands_from(config), "absorbed": None, "expanded": 1}[form]
