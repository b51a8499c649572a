"""The dense twin of the code model: a Llama of the same width and depth, as many operations a token, the same tokens.

    shoal train recipes/code/twin.py --out DIR data.folder=CORPUS

Equal is what answering costs: 7.2 M operations a token forward, as many as in the code model (`shoal cost train`).
Training the code model costs half as much again while its MTP depth learns beside it; comparisons count those
operations too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from shoal.config import GQAConfig, ModelConfig
from shoal.train.losses import LossSettings
from shoal.train.recipe import Recipe


def _code() -> Recipe:
    """The recipe beside this file; recipes are files, not a package."""
    path = Path(__file__).with_name("recipe.py")
    spec = importlib.util.spec_from_file_location("shoal_recipe_code", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Recipe = module.recipe()
    return made


def recipe() -> Recipe:
    """Everything as in the code model but the network and what only experts need."""
    code = _code()
    model = ModelConfig(
        model_type="llama",
        vocab_size=code.model.vocab_size,
        hidden_size=code.model.hidden_size,
        intermediate_size=448,
        num_hidden_layers=code.model.num_hidden_layers,
        attention=GQAConfig(num_attention_heads=4, num_key_value_heads=1, head_dim=64),
        max_position_embeddings=code.model.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=code.model.bos_token_id,
        eos_token_id=code.model.eos_token_id,
        pad_token_id=code.model.pad_token_id,
    )
    return dataclasses.replace(code, model=model, losses=LossSettings(mtp_weight=0.0, balance_weight=0.0))
