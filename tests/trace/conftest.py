"""Made-up routings, whose every number is known, and recordings of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow")

from shoal.engine.routing import Routing, Step
from shoal.trace.recorder import Recorder
from shoal.trace.table import Shape

SHAPE = Shape(
    model="made-up", layers=(1, 2, 5), n_routed_experts=6, num_experts_per_tok=2, started="2026-01-01T00:00:00"
)
WORDS = [b"zero", b"one ", "ö".encode()[:1], b"\n"]


def routing(
    rng: np.random.Generator, first: int, count: int, step: int, experts: Any = None, shape: Shape = SHAPE
) -> Routing:
    """`count` tokens whose ids are their positions modulo 4; without `experts` [L, T, K] they go anywhere."""
    size = (len(shape.layers), count)
    if experts is None:
        experts = rng.permuted(np.tile(np.arange(shape.n_routed_experts), (*size, 1)), axis=-1)
        experts = experts[..., : shape.num_experts_per_tok]
    return Routing(
        first=first, prompt_tokens=3, tokens=tuple((first + i) % 4 for i in range(count)),
        experts_LTK=np.ascontiguousarray(experts, np.int32),
        weights_LTK=rng.random((*size, shape.num_experts_per_tok), np.float32),
        scores_LTE=rng.standard_normal((*size, shape.n_routed_experts), np.float32), sigmoid=True,
        step=Step(number=step, rows=count + 1, started=time.perf_counter(), seconds=0.001 * step),
    )  # fmt: skip


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Path]:
    def make(*texts: list[Routing], name: str = "trace.parquet", **options: Any) -> Path:
        path = tmp_path / name
        with Recorder(path, SHAPE, text=WORDS.__getitem__, **options) as recorder:
            for parts in texts:
                hear = recorder.listen()
                for part in parts:
                    hear(part)
        return path

    return make
