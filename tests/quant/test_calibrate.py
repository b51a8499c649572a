"""Mean squares of every matrix's inputs: the engine's sums against the readable network, watched from outside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from tests.quant.conftest import LLAMA, V2, V3, tiny
from torch.nn import functional

from shoal.config import ModelConfig
from shoal.model import load_model
from shoal.quant.calibrate import PRIOR_TOKENS, Importance, calibrate

LENGTH = 40
WINDOWS = [random.Random(seed).choices(range(96), k=LENGTH) for seed in range(3)]


@contextmanager
def watched(model: Any) -> Iterator[dict[str, Any]]:
    """Fills a dictionary with the inputs of every linear layer, and of every expert of a stack."""
    seen: dict[str, list[Any]] = {}

    def linear(name: str) -> Any:
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].detach().flatten(0, -2))

    def experts(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            x_TD, routing = inputs
            for expert in range(len(module.gate_proj.weight)):
                rows = x_TD[(routing.indices_TK == expert).any(1)].detach()
                gate, up = (functional.linear(rows, part.weight[expert]) for part in (module.gate_proj, module.up_proj))
                for part, value in (("gate_proj", rows), ("up_proj", rows), ("down_proj", functional.silu(gate) * up)):
                    seen.setdefault(f"{name}.{expert}.{part}", []).append(value.detach())

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(linear(name))
        elif type(module).__name__ == "Experts":
            module.register_forward_pre_hook(experts(name))
    yield seen


def expected(config: ModelConfig) -> dict[str, Any]:
    """Rows [n, columns] by module."""
    model = load_model(tiny(config))
    with watched(model) as seen, torch.no_grad():
        for window in WINDOWS:
            model(torch.tensor([window]))
    return {name: torch.cat(rows).double().numpy() for name, rows in seen.items()}


@pytest.mark.parametrize("config", [LLAMA, V2, V3], ids=["llama", "v2", "v3"])
@pytest.mark.parametrize("threads", [1, 2])
def test_mean_squares_are_those_of_the_network(config: ModelConfig, threads: int, monkeypatch: Any) -> None:
    monkeypatch.setattr("shoal.quant.calibrate.PRIOR_TOKENS", 0.0)
    importance = calibrate(tiny(config), WINDOWS, threads=threads)
    compared = 0
    for name, rows in expected(config).items():
        columns = importance.columns(f"{name}.weight")
        if name.endswith((".kv_b_proj", ".mlp.gate")) or f"layers.{config.num_hidden_layers}." in name or not len(rows):
            continue
        assert columns is not None, name
        np.testing.assert_allclose(columns, (rows**2).mean(0), rtol=0.02, atol=1e-5, err_msg=name)
        compared += 1
    assert compared > 15


def test_a_tied_head_is_what_the_table_meets() -> None:
    columns = calibrate(tiny(LLAMA), WINDOWS).columns("model.embed_tokens.weight")
    assert columns is not None
    norms = np.sqrt(columns.sum())  # normalised rows have a length of sqrt(64)
    assert norms == pytest.approx(8, rel=0.01)


def test_a_prediction_layer_is_met_too() -> None:
    importance = calibrate(tiny(V3), WINDOWS)
    for part in ("self_attn.q_b_proj", "self_attn.o_proj", "mlp.experts.1.down_proj", "mlp.shared_experts.up_proj"):
        columns = importance.columns(f"model.layers.3.{part}.weight")
        assert columns is not None and (columns > 0).all(), part


def test_experts_that_met_little_lean_on_their_layer() -> None:
    moments = np.zeros((3, 5), np.float32)
    moments[0] = [40, 80, 0, 4, 40]  # 40 tokens
    moments[1] = [8, 0, 8, 0, 8]  # 8 tokens
    importance = Importance({"model.layers.0.mlp.experts.up_proj.weight": moments})
    mean = np.array([1, 80 / 48, 8 / 48, 4 / 48])
    for expert, count in ((0, 40), (1, 8), (2, 0)):
        columns = importance.columns(f"model.layers.0.mlp.experts.{expert}.up_proj.weight")
        own = moments[expert, :4]
        np.testing.assert_allclose(columns, (own + PRIOR_TOKENS * mean) / (count + PRIOR_TOKENS), rtol=1e-6)
    assert importance.columns("model.layers.1.mlp.experts.0.up_proj.weight") is None


def test_a_text_that_reaches_nothing_says_nothing() -> None:
    assert Importance({"a.weight": np.zeros((1, 5), np.float32)}).columns("a.weight") is None


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    calibrate(tiny(LLAMA), WINDOWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(40, 120), (80, 120), (120, 120)]
