"""Folders written here, opened by the ecosystem's own code: the package compressed-tensors and transformers over it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.quant.conftest import LLAMA, V3, tiny
from tests.quant.test_export import TOKENS, logits

from shoal.config import ModelConfig
from shoal.formats.hf_folder import open_folder
from shoal.quant import RECIPES, quantize
from shoal.quant.calibrate import calibrate

compressors = pytest.importorskip("compressed_tensors.compressors")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


@pytest.mark.parametrize("config", [V3, LLAMA], ids=["v3", "llama"])
@pytest.mark.parametrize("scheme", RECIPES)
def test_their_decompression_gives_our_values(tmp_path: Path, config: ModelConfig, scheme: str) -> None:
    """In float32 exactly, and in bfloat16, which they compute in by themselves, as ours rounded."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    source = tiny(config)
    quantize(source, tmp_path / "q", scheme=scheme, tables="int8", importance=calibrate(source, [TOKENS]))
    ours = open_folder(tmp_path / "q")
    theirs = safetensors_torch.load_file(tmp_path / "q" / "model.safetensors")
    settings = QuantizationConfig(**json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"])
    decompress = compressors.BaseCompressor.get_value_from_registry(settings.format).decompress
    compared = 0
    for name in theirs:
        if not name.endswith("weight_packed") or "layers.3.embed" in name or "shared_head" in name:
            continue
        module = name.removesuffix(".weight_packed")
        groups = settings.config_groups.values()
        by_name = [group for group in groups if any(match_name(module, target) for target in group.targets)]
        (group,) = by_name or [group for group in groups if "Linear" in group.targets]
        assert not any(match_name(module, entry) for entry in settings.ignore)
        parts = {part: theirs[f"{module}.{part}"] for part in PARTS if f"{module}.{part}" in theirs}
        assert parts["weight_scale"].dtype == torch.bfloat16
        head, _, tail = module.partition(".experts.")
        expert, _, part = tail.partition(".")
        values = ours.tensors[f"{head}.experts.{part}.weight" if tail else f"{module}.weight"].read()
        values = torch.from_numpy(values[int(expert)] if tail else values)
        exact = decompress({**parts, "weight_scale": parts["weight_scale"].float()}, group)["weight"]
        assert exact.dtype == torch.float32 and torch.equal(exact, values), module
        assert torch.equal(decompress(parts, group)["weight"], values.bfloat16()), module
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_transformers_runs_what_we_write(tmp_path: Path, scheme: str, tied: bool) -> None:
    quantize(tiny(replace(LLAMA, tie_word_embeddings=tied)), tmp_path / "q", scheme=scheme)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0].numpy()
    ours = logits(open_folder(tmp_path / "q"), weights="f32")
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())
