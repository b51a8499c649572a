#!/usr/bin/env python3
"""One side of `train.py`: holds a model and its optimiser, and takes a training step whenever a line arrives.

Usage: train_sides.py {shoal,eager,kept,compiled} FOLDER ROWS LENGTH PRECISION THREADS

A line on standard input asks for a step; a line of JSON on standard output answers with its loss, seconds, and the
processor seconds it took. Every side reads the same weights and the same tokens, runs the same precision, and moves the
weights by PyTorch's fused AdamW with equal settings. Shoal's process keeps freed memory, as `shoal train` does; `kept`
is transformers with that setting.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LR, WEIGHT_DECAY = 3e-4, 0.1
TEXT_SEED = 1


def tokens_of(step: int, rows: int, length: int, vocabulary: int) -> torch.Tensor:
    """Rows of length + 1 tokens, the same on every side. Few different ones, so that there is something to learn."""
    generator = torch.Generator().manual_seed(TEXT_SEED + step)
    return torch.randint(0, vocabulary // 64, (rows, length + 1), generator=generator)


def shoal_side(folder: Path, rows: int, length: int, precision: torch.dtype) -> Callable[[int], float]:
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.machine import keep_freed_memory
    from shoal.model import load_model
    from shoal.train.losses import LossSettings, TextBatch, language_loss
    from shoal.train.optim import OptimiserSettings, make_optimisers

    keep_freed_memory()
    model = load_model(open_checkpoint(folder))
    optimisers = make_optimisers(model, OptimiserSettings(lr=LR, weight_decay=WEIGHT_DECAY))
    settings = LossSettings(mtp_weight=0.0, balance_weight=0.0)

    def step(index: int) -> float:
        text = tokens_of(index, rows, length, model.config.vocab_size)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            losses = language_loss(model, TextBatch(text[:, :-1], text[:, 1:]), settings)
        losses.total.backward()
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        return float(losses.parts["next"])

    return step


def transformers_side(
    folder: Path, rows: int, length: int, precision: torch.dtype, *, compiled: bool = False, kept: bool = False
) -> Callable[[int], float]:
    from transformers import AutoModelForCausalLM

    from shoal.machine import keep_freed_memory

    if kept:
        keep_freed_memory()
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="grouped_mm")
    plain.train()
    plain.config.use_cache = False
    # As Shoal's groups: matrices and the output head decay; the embedding, norms and biases do not.
    still = {id(p) for p in plain.parameters() if p.dim() < 2} | {id(plain.get_input_embeddings().weight)}
    groups = [
        {"params": [p for p in plain.parameters() if id(p) not in still], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in plain.parameters() if id(p) in still], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), eps=1e-8, fused=True)
    model: Any = torch.compile(plain) if compiled else plain

    def step(index: int) -> float:
        text = tokens_of(index, rows, length, plain.config.vocab_size)
        with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
            logits = model(input_ids=text[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def main() -> None:
    side, folder, rows, length, precision, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    of_side = {
        "shoal": shoal_side,
        "eager": transformers_side,
        "kept": lambda *args: transformers_side(*args, kept=True),
        "compiled": lambda *args: transformers_side(*args, compiled=True),
    }
    step = of_side[side](Path(folder), int(rows), int(length), getattr(torch, precision))
    from shoal.cli.machine import peak_rss_bytes

    print(json.dumps({"ready": True, "threads": torch.get_num_threads()}), file=answers, flush=True)
    for index, _ in enumerate(sys.stdin):
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step(index)
        answer = {
            "loss": loss,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
