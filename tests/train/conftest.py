"""A tiny V3 model, byte-level text of its own, and runs of it that take a fraction of a second."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.data import ShardWriter
from shoal.formats.tokenizer import load_tokenizer_json
from shoal.train import measure
from shoal.train.loop import Outcome, train
from shoal.train.optim import OptimiserSettings
from shoal.train.recipe import CheckpointSettings, DataSettings, Recipe, ScheduleSettings, ValidationSettings

VOCAB_SIZE = 257


class Listener:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, record: dict, until: int) -> None:
        self.records.append(record)


def tiny_model(**changes) -> ModelConfig:
    config = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        attention=MLAConfig(
            num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
        ),
        moe=MoEConfig(
            n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        rope=RopeConfig(interleave=True),
        max_position_embeddings=64,
        num_nextn_predict_layers=1,
        eos_token_id=(256,),
    )  # fmt: skip
    return replace(config, **changes)


def make_data(folder: Path) -> Path:
    """A byte-level tokenizer without merges, and some thousand tokens of made-up but regular text."""
    (folder / "tokenizer").mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|end|>"])
    library.save(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer = load_tokenizer_json(folder / "tokenizer", eos_token_ids=(256,))
    tokenizer.save(folder / "tokenizer")
    digest = sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest()
    with ShardWriter(folder / "tokens", vocab_size=VOCAB_SIZE, tokenizer_digest=digest) as writer:
        for number in range(80):
            writer.add([*tokenizer.encode(f"number {number} follows number {number - 1}. "), 256])
    return folder


def tiny_recipe(data: Path, **changes) -> Recipe:
    recipe = Recipe(
        model=tiny_model(),
        steps=6,
        sequence_length=16,
        batch=4,
        micro_batch=2,
        data=DataSettings(folder=str(data), held_out=0.1),
        optimiser=OptimiserSettings(lr=1e-2),
        schedule=ScheduleSettings(warmup=2),
        checkpoint=CheckpointSettings(every=2),
        validation=ValidationSettings(every=3, sequences=4),
    )
    return replace(recipe, **changes)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "it")


@pytest.fixture
def recipe(data) -> Recipe:
    return tiny_recipe(data)


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch):
    """No test looks at the machine's own rate, so do not spend a fifth of a second on each run to measure it."""
    monkeypatch.setattr(measure, "PROBE_SIDE", 16)
    monkeypatch.setattr(measure, "PROBE_SECONDS", 0.0)


@pytest.fixture
def run():
    """Train and return how it ended, what was said, and the log."""

    def go(recipe: Recipe, out: Path, **options) -> tuple[Outcome, Listener]:
        listener = Listener()
        return train(recipe, out, listener, **options), listener

    return go


def losses_in(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, length of the gradient) of every line of a log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


@pytest.fixture
def read_losses():
    return losses_in
