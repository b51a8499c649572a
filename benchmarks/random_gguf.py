#!/usr/bin/env python3
"""Writes a GGUF model of a given shape with random weights: for measuring speed where no real weights are at hand.

Usage: random_gguf.py {tiny,v2lite} {Q8_0,Q4_0,F16} OUT.gguf

Blocks are written as they are stored, with one scale and random codes, so that 16 billion weights take a minute.
The values have the spread of a freshly initialised network: nothing overflows, and a router spreads its tokens. In a
Q4_0 file the two halves of MLA's kv_b projection are Q8_0, as in every Q4_0 file that Shoal writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling
from shoal.formats.checkpoint import LazyTensor
from shoal.formats.gguf_quants import FORMATS, dequantize
from shoal.formats.gguf_writer import write_model
from shoal.formats.layout import Shape, expected_tensors

SEED = 1234
REVISION = 2  # raise it when the weights change: peers.py then writes anew what it had kept
TYPES = ("Q8_0", "Q4_0", "F16")
# What a random byte becomes: the lowest code, which has no positive twin, turns into 0, so that codes average 0. With
# the smallest of other averages all tokens drift into one direction, layer by layer, and choose the same experts.
_BYTE = np.arange(256)
_LOW, _HIGH = _BYTE & 15, _BYTE >> 4
CODES = {
    "Q8_0": np.where(_BYTE == 128, 0, _BYTE).astype(np.uint8),
    "Q4_0": (np.where(_LOW == 0, 8, _LOW) | np.where(_HIGH == 0, 8, _HIGH) << 4).astype(np.uint8),
}
# Standard deviation of those codes, by which a block's scale is divided.
CODE_SPREAD = {"Q8_0": 73.47, "Q4_0": 4.18}
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def tiny() -> ModelConfig:
    """DeepSeek-V3 in small: 87.6 million weights, 32.7 million of them read for a token."""
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        attention=MLAConfig(
            num_attention_heads=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
        ),
        moe=MoEConfig(
            n_routed_experts=32, num_experts_per_tok=4, moe_intermediate_size=128, n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        rope=RopeConfig(interleave=True), max_position_embeddings=8192, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


def v2lite() -> ModelConfig:
    """DeepSeek-V2-Lite's shape (arXiv 2405.04434, appendix B): 15.7 billion weights, 2.45 billion read for a token."""
    return ModelConfig(
        model_type="deepseek_v2", vocab_size=102_400, hidden_size=2048, intermediate_size=10_944, num_hidden_layers=27,
        attention=MLAConfig(
            num_attention_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=1408, n_shared_experts=2,
            first_k_dense_replace=1, topk_method="greedy", scoring_func="softmax", norm_topk_prob=False,
        ),
        rope=RopeConfig(
            interleave=True,
            scaling=RopeScaling(
                rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=0.707,
                mscale_all_dim=0.707,
            ),
        ),
        max_position_embeddings=163_840, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


SHAPES: dict[str, Callable[[], ModelConfig]] = {"tiny": tiny, "v2lite": v2lite}


def write_random(config: ModelConfig, dtype: str, path: Path, *, name: str = "random") -> None:
    """Write a model of this shape. The same shape, type and NumPy give the same file."""
    tensors = {
        tensor: _random_tensor(tensor, shape, dtype, index, path)
        for index, (tensor, shape) in enumerate(expected_tensors(config).items())
    }
    fields = {"general.name": name, **_vocabulary(config.vocab_size)}
    write_model(config, tensors, fields, path, dtype="keep")


def file_bytes(config: ModelConfig, dtype: str) -> int:
    """About what the file takes, without writing it."""
    values = sum(int(np.prod(shape)) for shape in expected_tensors(config).values())
    return values * FORMATS[dtype].size // FORMATS[dtype].block


def _random_tensor(name: str, shape: Shape, dtype: str, index: int, path: Path) -> LazyTensor:
    def generator() -> np.random.Generator:
        return np.random.default_rng([SEED, index])

    def blocks() -> Any:
        return _random_blocks(generator(), shape, dtype)

    def chunks() -> Iterator[Any]:
        if len(shape) == 1:
            yield _vector(generator(), name, shape)
        elif stored == "F32":  # the router
            yield generator().standard_normal(shape, np.float32) * np.float32(0.7 / shape[-1] ** 0.5)
        else:
            yield dequantize(blocks(), dtype).reshape(shape)

    stored = "F32" if len(shape) == 1 or name.endswith("mlp.gate.weight") else dtype
    raw = blocks if stored in CODE_SPREAD else None
    return LazyTensor(name=name, shape=shape, dtype=stored, source=path, make_chunks=chunks, raw_blocks=raw)


def _random_blocks(rng: np.random.Generator, shape: Shape, dtype: str) -> Any:
    """Stored bytes [rows, bytes of a row] of values with standard deviation 0.7 / sqrt(columns)."""
    rows, cols = int(np.prod(shape[:-1])), shape[-1]
    spread = 0.7 / cols**0.5
    if dtype == "F16":
        values = rng.standard_normal((rows, cols), np.float32) * np.float32(spread)
        return values.astype(np.float16).view(np.uint8)
    size = FORMATS[dtype].size
    stored = CODES[dtype][np.frombuffer(rng.bytes(rows * FORMATS[dtype].row_bytes(cols)), np.uint8)].reshape(-1, size)
    stored[:, :2] = np.array([spread / CODE_SPREAD[dtype]], np.float16).view(np.uint8)
    return stored.reshape(rows, -1)


def _vector(rng: np.random.Generator, name: str, shape: Shape) -> Any:
    if name.endswith("e_score_correction_bias"):
        return rng.standard_normal(shape, np.float32) * np.float32(0.01)
    return np.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, np.float32)


def _vocabulary(size: int) -> dict[str, object]:
    """A SentencePiece vocabulary of control tokens, bytes, characters and filler, as large as the model wants it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    words = ["▁", *map(chr, range(33, 127))]
    words += [f"▁zq{index}x" for index in range(size - len(tokens) - len(words))]
    tokens, types = (tokens + words)[:size], (types + [NORMAL] * len(words))[:size]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF model with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("dtype", choices=TYPES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    write_random(SHAPES[args.shape](), args.dtype, args.out, name=f"random-{args.shape}")
    print(f"{args.out}: {args.out.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
