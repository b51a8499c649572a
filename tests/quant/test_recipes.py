"""Which tensor becomes what, and that `quantization_config` says so in the words of other readers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.quant.conftest import LLAMA, V2, V3

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.compressed_tensors import parse_compression
from shoal.formats.layout import expected_tensors
from shoal.quant.export import stored_grids
from shoal.quant.recipes import RECIPES, Choice, choose, quantization_config, role


def shapes_only(config: ModelConfig) -> Checkpoint:
    return Checkpoint(
        path=Path("tiny"),
        config=config,
        tensors={
            name: LazyTensor(name=name, shape=shape, dtype="F32", source=Path("tiny"), make_chunks=lambda: iter(()))
            for name, shape in expected_tensors(config).items()
        },
        load_tokenizer=lambda: pytest.fail("not needed"),
        load_chat=lambda: None,
    )


def bits(config: ModelConfig, scheme: str, tables: str = "auto", group: int = 32) -> dict[str, int | None]:
    """Bits by published name, layer and expert numbers left out."""
    choice = choose(scheme, group, tables, tied=config.tie_word_embeddings)
    grids = stored_grids(shapes_only(config), choice)
    return {re.sub(r"\d+\.", "", name.removeprefix("model.")): grid and grid.bits for name, grid in grids.items()}


def test_roles_of_deepseek_v3() -> None:
    assert bits(V3, "int4") == {
        "embed_tokens.weight": None,
        "layers.self_attn.q_a_proj.weight": None,
        "layers.self_attn.q_b_proj.weight": 8,
        "layers.self_attn.kv_a_proj_with_mqa.weight": None,
        "layers.self_attn.kv_b_proj.weight": None,
        "layers.self_attn.o_proj.weight": 8,
        "layers.mlp.gate_proj.weight": 4,
        "layers.mlp.up_proj.weight": 4,
        "layers.mlp.down_proj.weight": 4,
        "layers.mlp.gate.weight": None,
        "layers.mlp.experts.gate_proj.weight": 4,
        "layers.mlp.experts.up_proj.weight": 4,
        "layers.mlp.experts.down_proj.weight": 4,
        "layers.mlp.shared_experts.gate_proj.weight": 8,
        "layers.mlp.shared_experts.up_proj.weight": 8,
        "layers.mlp.shared_experts.down_proj.weight": 8,
        "lm_head.weight": 8,
        "layers.eh_proj.weight": None,
        "layers.embed_tokens.weight": None,
        "layers.shared_head.head.weight": 8,
    }


@pytest.mark.parametrize(
    ("config", "tables", "embedding", "head"),
    [(V2, "auto", None, 8), (V2, "int8", 8, 8), (V2, "bfloat16", None, None), (LLAMA, "auto", None, "none"),
     (LLAMA, "int8", 8, "none"), (LLAMA, "bfloat16", None, "none")],
)  # fmt: skip
def test_tables(config: ModelConfig, tables: str, embedding: int | None, head: Any) -> None:
    found = bits(config, "int4", tables)
    assert found["embed_tokens.weight"] == embedding
    assert found.get("lm_head.weight", "none") == head


def test_norms_biases_and_routers_are_kept_by_every_recipe() -> None:
    names = ["model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.e_score_correction_bias", "model.norm.weight",
             "model.layers.3.self_attn.q_proj.bias", "model.layers.3.self_attn.q_norm.weight"]  # fmt: skip
    for recipe in RECIPES.values():
        choice = Choice(recipe=recipe, group=32, embedding=True, head=True)
        assert [choice.grid(name, (64, 64)) for name in names[:1]] == [None]
        assert [choice.grid(name, (64,)) for name in names[1:]] == [None] * 4
    assert {role(name) for name in names} == {"kept"}


@pytest.mark.parametrize(("group", "cols", "found"), [(128, 576, 64), (128, 1536, 128), (64, 96, 32), (32, 48, None)])
def test_a_smaller_group_where_the_columns_ask_for_it(group: int, cols: int, found: int | None) -> None:
    grid = choose("int8", group, "auto", tied=False).grid("model.layers.0.mlp.up_proj.weight", (8, cols))
    assert (grid and grid.group) == found


@pytest.mark.parametrize(
    ("arguments", "field"),
    [(("int5", 32, "auto"), "scheme"), (("int4", 48, "auto"), "group"), (("int4", 32, "int4"), "tables")],
)
def test_unknown_words(arguments: tuple[str, int, str], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(*arguments, tied=False)
    assert caught.value.field == field


@pytest.mark.parametrize("config", [V3, V2, LLAMA], ids=["v3", "v2", "llama"])
@pytest.mark.parametrize("scheme", RECIPES)
@pytest.mark.parametrize("tables", ["auto", "int8"])
@pytest.mark.parametrize("group", [32, 128])
def test_the_configuration_says_what_was_done(config: ModelConfig, scheme: str, tables: str, group: int) -> None:
    """As vLLM asks: ignore list first, then exact names and patterns in their order, then the class of the layer."""
    grids = stored_grids(shapes_only(config), choose(scheme, group, tables, tied=config.tie_word_embeddings))
    out = quantization_config(grids, tied=config.tie_word_embeddings)
    assert (out["quant_method"], out["format"]) == ("compressed-tensors", "pack-quantized")
    compression = parse_compression(out)
    targets = [(t, g["weights"]) for g in out["config_groups"].values() for t in g["targets"]]
    assert ("Linear" in dict(targets)) == (len(out["config_groups"]) == 1)
    for name, grid in grids.items():
        module = name.removesuffix(".weight").replace("experts.0.", "experts.5.").replace("layers.1.", "layers.2.")
        ignored = any(_matches(entry, module) for entry in out["ignore"])
        assert ignored == (grid is None), module
        if grid is None:
            continue
        own = [args for target, args in targets if _matches(target, module)]
        found = own or [args for target, args in targets if target == "Linear"]
        assert len(found) == 1, module
        assert (found[0]["num_bits"], found[0]["group_size"], found[0]["symmetric"]) == (
            grid.bits, grid.group, grid.symmetric)  # fmt: skip
        ours = compression.scheme(module)
        assert ours is not None and (ours.bits, ours.block, ours.symmetric) == (
            grid.bits,
            (1, grid.group),
            grid.symmetric,
        )


def test_tables_are_targets_by_name() -> None:
    """vLLM's output head and embedding are not of a class Linear."""
    for tables, expected in (("auto", ["lm_head"]), ("int8", ["lm_head", "re:.*embed_tokens$"]), ("bfloat16", [])):
        out = quantization_config(stored_grids(shapes_only(V2), choose("int8", 32, tables, tied=False)), tied=False)
        assert out["config_groups"]["group_0"]["targets"] == ["Linear", *expected]


def _matches(target: str, module: str) -> bool:
    return bool(re.match(target[3:], module)) if target.startswith("re:") else target == module
