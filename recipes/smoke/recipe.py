"""A tiny DeepSeek-V3 (MLA, sigmoid routing without auxiliary loss, one MTP layer) on Python's own standard library.

Everything it needs comes with Python: the text is the `.py` files of the standard library, the tokenizer is trained on
them. It exists to show that the whole path works, in under a minute on two cores; it does not make a useful model.
"""

from __future__ import annotations

import platform
import random
import sysconfig
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.data import ShardWriter
from shoal.formats.tokenizer import load_tokenizer_json
from shoal.train.optim import OptimiserSettings
from shoal.train.recipe import (
    CheckpointSettings,
    Recipe,
    RouterSettings,
    SampleSettings,
    ScheduleSettings,
    ValidationSettings,
)

VOCAB_SIZE = 2048
END_OF_TEXT, END_ID = "<|endoftext|>", 0
TEXT_BYTES, TOKENIZER_BYTES = 4_000_000, 1_000_000


def recipe() -> Recipe:
    model = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        attention=MLAConfig(
            num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(
            n_routed_experts=16,
            num_experts_per_tok=3,
            moe_intermediate_size=64,
            n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        rope=RopeConfig(interleave=True),
        max_position_embeddings=1024,
        num_nextn_predict_layers=1,
        eos_token_id=(END_ID,),
    )
    return Recipe(
        model=model,
        steps=40,
        sequence_length=256,
        batch=8,
        micro_batch=8,
        optimiser=OptimiserSettings(lr=3e-3),
        router=RouterSettings(bias_speed=0.02),  # 0.001, as published, would hardly move in 40 steps
        schedule=ScheduleSettings(warmup=5, decay=0.4),
        checkpoint=CheckpointSettings(every=20),
        validation=ValidationSettings(every=20, sequences=16),
        samples=SampleSettings(prompts=("import ", "def __init__(self"), every=40, max_tokens=24),
    )


def prepare(folder: Path, recipe: Recipe) -> None:
    """Fill `folder` with a tokenizer and token shards made from the standard library."""
    texts = _library_texts(recipe.seed)
    _train_tokenizer(texts, folder / "tokenizer")
    tokenizer = load_tokenizer_json(folder / "tokenizer")
    source = {"source": "Python standard library", "python": platform.python_version(), "licence": "PSF-2.0"}
    with ShardWriter(
        folder / "tokens",
        vocab_size=VOCAB_SIZE,
        tokenizer_digest=sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        provenance={**source, "files": len(texts), "seed": recipe.seed},
    ) as writer:
        for ids in tokenizer.encode_batch(texts):
            writer.add([*ids, END_ID])


def _library_texts(seed: int) -> list[str]:
    """Some four megabytes of the standard library, file by file, shuffled; without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts[:-1]))
    random.Random(seed).shuffle(paths)
    texts, size = [], 0
    for path in paths:
        text = path.read_text("utf-8", errors="replace")
        if text.strip():
            texts.append(text)
            size += len(text)
        if size >= TEXT_BYTES:
            break
    return texts


def _train_tokenizer(texts: list[str], folder: Path) -> None:
    """A byte-level BPE vocabulary, trained on the first megabyte."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_first(texts, TOKENIZER_BYTES), trainer)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    load_tokenizer_json(folder, eos_token_ids=(END_ID,)).save(folder)


def _first(texts: list[str], size: int) -> list[str]:
    kept, held = [], 0
    for text in texts:
        kept.append(text)
        held += len(text)
        if held >= size:
            break
    return kept
