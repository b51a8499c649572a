"""Folders written: names, exact values, what is kept, and that nothing half-written is left."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from tests.quant.conftest import LLAMA, V2, V3, decode, stored_tensors, tiny

from shoal.config import ModelConfig
from shoal.engine.core import Core
from shoal.engine.packing import pack_tensor, packing_for
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import Checkpoint
from shoal.formats.hf_folder import open_folder
from shoal.quant import RECIPES, quantize
from shoal.quant.calibrate import Importance, calibrate

pytestmark = pytest.mark.filterwarnings("ignore:saved without a tokenizer")

TOKENS = [7, 50, 3, 91, 8, 8, 20, 33, 64, 5, 1, 77] * 4


def published(name: str, experts: int) -> list[tuple[str, Any]]:
    """(published name, index into the stack) of a tensor of ours."""
    if ".mlp.experts." not in name:
        return [(name, ...)]
    return [(name.replace(".experts.", f".experts.{index}."), index) for index in range(experts)]


@pytest.mark.parametrize("config", [V3, V2, LLAMA], ids=["v3", "v2", "llama"])
@pytest.mark.parametrize("scheme", RECIPES)
def test_a_folder(tmp_path: Path, config: ModelConfig, scheme: str) -> None:
    source = tiny(config)
    quantize(source, tmp_path / "q", scheme=scheme, tables="int8", importance=calibrate(source, [TOKENS]))
    small, files = open_folder(tmp_path / "q"), stored_tensors(tmp_path / "q")
    assert replace(small.config, eos_token_id=config.eos_token_id) == config
    for name, tensor in source.tensors.items():
        values, back = tensor.read(), small.tensors[name].read()
        for full, index in published(name, config.moe.n_routed_experts if config.moe else 0):
            module = full.removesuffix(".weight")
            if full in files:  # kept
                kind = np.float32 if values.ndim == 1 or full.endswith(".mlp.gate.weight") else ml_dtypes.bfloat16
                np.testing.assert_array_equal(files[full], values.astype(kind), err_msg=full)
                np.testing.assert_array_equal(back, files[full].astype(np.float32))
                continue
            bulk = "self_attn" not in full and "shared" not in full and full.startswith("model.layers")
            bits = 4 if scheme.startswith("int4") and bulk else 8
            stored = decode(files, module, bits)
            np.testing.assert_array_equal(back[index], stored, err_msg=full)
            assert (f"{module}.weight_zero_point" in files) == (scheme == "int4-asym" and bits == 4)
            error = np.abs(stored - values[index]).mean() / np.abs(values[index]).mean()
            assert error < {8: 0.008, 4: 0.12}[bits], full
    json_config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert json_config["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("config", [V3, V2, LLAMA], ids=["v3", "v2", "llama"])
@pytest.mark.parametrize("scheme", RECIPES)
def test_the_engine_computes_with_the_very_codes(tmp_path: Path, config: ModelConfig, scheme: str) -> None:
    quantize(tiny(config), tmp_path / "q", scheme=scheme)
    small = open_folder(tmp_path / "q")
    packings = {packing_for(tensor, "auto") for tensor in small.tensors.values() if tensor.codes is not None}
    assert packings == {"int8": {"q8"}, "int4": {"q8", "q4"}, "int4-asym": {"q8", "q4m"}}[scheme]
    for tensor in small.tensors.values():
        if tensor.codes is None:
            continue
        values = tensor.read().reshape(-1, *tensor.shape[-2:])
        for index, matrix in enumerate(values):
            one = replace(
                tensor, shape=matrix.shape, codes=lambda t=tensor, i=index: iter([list(t.codes())[i]])
            )  # fmt: skip
            packed, row = pack_tensor(one, packing_for(tensor, "auto")), np.empty(matrix.shape[1], np.float32)
            for number, expected in enumerate(matrix):
                packed.row(number, row)
                np.testing.assert_array_equal(row, expected)
    # Codes against the same numbers as floats; what is left are activations of 16 bits.
    ours, plain = (logits(small, weights=weights, activations="int16") for weights in ("auto", "f32"))
    assert np.abs(ours - plain).max() < 0.02 * np.abs(plain).max()


def test_a_latent_projection_of_four_bits_is_not_rounded_to_four_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others quantise kv_b_proj too. The engine turns half of it round, so that its groups lie across the file's."""
    roles = ((re.compile(r".*\.kv_b_proj\.weight$"), "experts and MLPs"),)
    monkeypatch.setattr("shoal.quant.recipes._BY_NAME", roles)
    quantize(tiny(V3), tmp_path / "q", scheme="int4")
    small = open_folder(tmp_path / "q")
    assert small.tensors["model.layers.0.self_attn.kv_b_proj.weight"].dtype == "I4_G32"
    ours, plain = (logits(small, weights=weights, activations="int16") for weights in ("auto", "f32"))
    assert np.abs(ours - plain).max() < 0.05 * np.abs(plain).max()


def logits(checkpoint: Checkpoint, **options: Any) -> Any:
    from shoal.engine.params import SamplingParams
    from shoal.engine.sampler import Sampler
    from shoal.engine.sequence import Sequence

    core = Core(checkpoint, cache_tokens=64, cache="f32", threads=1, **options)
    rows: list[Any] = []
    params = SamplingParams()
    sequence = Sequence(
        tokens=list(TOKENS), prompt_tokens=len(TOKENS), params=params, sampler=Sampler(params, TOKENS, 96),
        max_tokens=0, watch=lambda first, some: rows.append(some.copy()),
    )  # fmt: skip
    core.submit(sequence)
    core.advance(sequence)
    core.release(sequence)
    return np.concatenate(rows)


def test_published_names_and_copies(tmp_path: Path) -> None:
    quantize(tiny(V3), tmp_path / "q", scheme="int4")
    files = stored_tensors(tmp_path / "q")
    for module in ("model.layers.1.mlp.experts.7.up_proj", "model.layers.3.mlp.experts.0.down_proj"):
        assert {f"{module}.weight_packed", f"{module}.weight_scale", f"{module}.weight_shape"} <= files.keys()
    np.testing.assert_array_equal(files["model.layers.3.embed_tokens.weight"], files["model.embed_tokens.weight"])
    for part in ("weight_packed", "weight_scale", "weight_shape"):
        np.testing.assert_array_equal(files[f"model.layers.3.shared_head.head.{part}"], files[f"lm_head.{part}"])
    assert not [name for name in files if ".experts.gate" in name]


def test_importance_reaches_every_matrix(tmp_path: Path) -> None:
    """Columns that matter a thousand times more are nearly exact, in experts too."""
    source, heavy = tiny(V3), np.arange(64) % 32 == 5
    sizes = {full: tensor.shape[-1] for name, tensor in source.tensors.items() for full, _ in published(name, 8)}

    class Heavy(Importance):
        def columns(self, name: str) -> Any:
            asked.append(name)
            return np.where(np.arange(sizes.get(name, 64)) % 32 == 5, 1e3, 1).astype(np.float32)

    asked: list[str] = []
    quantize(source, tmp_path / "q", scheme="int4", importance=Heavy({}))
    name = "model.layers.1.mlp.experts.up_proj.weight"
    back, first = (checkpoint.tensors[name].read() for checkpoint in (open_folder(tmp_path / "q"), source))
    error = np.abs(back - first).reshape(-1, 64).mean(0)
    assert error[heavy].max() < 0.4 * error[~heavy].mean()
    experts = {"model.layers.1.mlp.experts.7.down_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"}
    assert experts | {"lm_head.weight"} <= set(asked)


def test_shards(tmp_path: Path) -> None:
    source = tiny(V3)
    quantize(source, tmp_path / "one", scheme="int4-asym")
    quantize(source, tmp_path / "many", scheme="int4-asym", max_shard_bytes=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 5
    one, many = open_folder(tmp_path / "one"), open_folder(tmp_path / "many")
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.read(), many.tensors[name].read())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sources_of_16_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    source = tiny(V2, dtype)
    quantize(source, tmp_path / "q", scheme="int8")
    files = stored_tensors(tmp_path / "q")
    assert {str(v.dtype) for v in files.values()} == {"bfloat16", "int32", "int64"}


def test_a_quantised_folder_can_be_quantised_again(tmp_path: Path) -> None:
    quantize(tiny(LLAMA), tmp_path / "a", scheme="int8")
    quantize(open_folder(tmp_path / "a"), tmp_path / "b", scheme="int4")
    assert open_folder(tmp_path / "b").tensors["model.layers.0.mlp.up_proj.weight"].dtype == "I4_G32"


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match="not empty"):
        quantize(tiny(LLAMA), tmp_path / "q", scheme="int8")
    assert [p.name for p in tmp_path.rglob("*")] == ["q", "notes.txt"]


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "beyond 65280")])
def test_weights_that_no_grid_holds(tmp_path: Path, value: float, problem: str) -> None:
    source = tiny(LLAMA)
    name = "model.layers.2.mlp.up_proj.weight"
    bad = source.tensors[name].read().copy()
    bad[3, 4] = value
    tensors = {**source.tensors, name: replace(source.tensors[name], make_chunks=lambda: iter([bad]))}
    with pytest.raises(FileError, match=problem) as caught:
        quantize(replace(source, tensors=tensors), tmp_path / "q", scheme="int4")
    assert caught.value.item == name
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_group_divides(tmp_path: Path) -> None:
    odd = replace(LLAMA, hidden_size=48, intermediate_size=80, attention=replace(LLAMA.attention, head_dim=12))
    with pytest.raises(ConfigError, match="no matrix that is quantised has a multiple of 32 columns"):
        quantize(tiny(odd), tmp_path / "q", scheme="int8")
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_about_one_tensor(tmp_path: Path) -> None:
    """A stack of experts far larger than the allowance, written by a process of its own."""
    experts, rows, cols = 64, 512, 1024  # 128 MiB in float32 a stack
    config = replace(
        V2, hidden_size=cols, num_hidden_layers=1,
        moe=replace(V2.moe, n_routed_experts=experts, moe_intermediate_size=rows, n_shared_experts=0,
                    first_k_dense_replace=0),
    )  # fmt: skip
    script = f"""
import resource, sys
import numpy as np
from pathlib import Path
sys.path[:0] = {sys.path!r}
from shoal.config import *
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.layout import expected_tensors
from shoal.quant import quantize
config = {config!r}
def lazy(name, shape):
    def chunks():
        for index in range(shape[0] if len(shape) == 3 else 1):
            one = np.random.default_rng(index).normal(size=shape[1:] if len(shape) == 3 else shape).astype(np.float32)
            yield one[None] if len(shape) == 3 else one
    return LazyTensor(name=name, shape=shape, dtype="F32", source=Path("x"), make_chunks=chunks)
source = Checkpoint(path=Path({str(tmp_path)!r}), config=config, load_tokenizer=None, load_chat=lambda: None,
                    tensors={{n: lazy(n, s) for n, s in expected_tensors(config).items()}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize(source, {str(tmp_path / "q")!r}, scheme="int8", threads=1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    scales = 3 * experts * rows * cols // 32 * 4
    assert int(done.stdout) < scales + 10 * 4 * rows * cols, "more than the scales and a few experts"
