"""The code model: DeepSeek-V3's architecture, small enough to be trained on one core in 40 minutes.

22 M parameters, of which 3 M work on a token: MLA with a latent of 64, three of 64 routed experts (4.7 % of the expert
parameters) and a shared one, one MTP depth that learns in the last quarter. Build the data first (README.md), then

    shoal train recipes/code --out DIR data.folder=CORPUS
"""

from __future__ import annotations

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.train.losses import LossSettings
from shoal.train.optim import OptimiserSettings
from shoal.train.recipe import (
    CheckpointSettings,
    DataSettings,
    Recipe,
    RouterSettings,
    SampleSettings,
    ScheduleSettings,
    ValidationSettings,
)

VOCABULARY, WINDOW = 4096, 512  # as in vocabulary.py and pack.py; a test compares them
BOS, EOS, PAD = 0, 1, 2
# What pack.py printed: the share of the tokens that come from held-out packages.
HELD_OUT = 0.17196611823220279

MODEL = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    attention=MLAConfig(
        num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64
    ),
    moe=MoEConfig(
        n_routed_experts=64,
        num_experts_per_tok=3,
        moe_intermediate_size=96,
        n_shared_experts=1,
        first_k_dense_replace=1,
        # Normalised weights of k experts have 1/k of a plain sum's variance; V3's 2.5 for k = 8 makes up for that too.
        routed_scaling_factor=1.75,
    ),
    rope=RopeConfig(interleave=True),
    num_nextn_predict_layers=1,
    max_position_embeddings=WINDOW,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=(EOS,),
    pad_token_id=PAD,
)
SAMPLES = SampleSettings(
    prompts=(
        'def read_json(path):\n    """Read a JSON file."""\n',
        "import argparse\n\n\ndef main():\n    parser = argparse.ArgumentParser(",
        "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    ),
    every=400,
    max_tokens=64,
)


def recipe() -> Recipe:
    """1500 steps of 4096 tokens: 6 M tokens, which a core computes in 40 minutes."""
    return Recipe(
        model=MODEL,
        steps=1500,
        sequence_length=WINDOW,
        batch=8,
        micro_batch=8,
        data=DataSettings(folder=None, held_out=HELD_OUT),
        optimiser=OptimiserSettings(optimiser="muon", lr=6e-3, weight_decay=0.1),
        schedule=ScheduleSettings(kind="wsd", warmup=50, decay=0.3125),
        losses=LossSettings(mtp_weight=0.3, mtp_from=0.75, balance_weight=1e-4),
        # V3's 0.001 is for some two hundred thousand steps; routers move faster here, and so must their counterweight.
        router=RouterSettings(bias_speed=0.005),
        checkpoint=CheckpointSettings(every=100, keep=2),
        validation=ValidationSettings(every=100, sequences=64),
        samples=SAMPLES,
    )
