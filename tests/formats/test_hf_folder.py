"""Hugging Face folders, with transformers as the judge: its tiny random models read here, and ours read there."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from shoal.config import ModelConfig
from shoal.errors import ConfigError, FileError
from shoal.formats.checkpoint import Checkpoint, GenerationDefaults, LazyTensor, open_checkpoint
from shoal.formats.hf_folder import check_tensors, open_folder, save_folder
from shoal.formats.layout import expected_tensors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "max_position_embeddings": 128, "num_attention_heads": 2}  # fmt: skip
MLA: dict[str, Any] = {**SMALL, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 16,
                       "moe_intermediate_size": 20, "n_routed_experts": 8, "num_experts_per_tok": 2,
                       "first_k_dense_replace": 1, "num_key_value_heads": 2, "n_group": 4,
                       "topk_group": 2}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {**MLA, "q_lora_rank": 24, "n_shared_experts": 1, "rope_parameters": YARN}),
    "v3 no q_lora, bias": ("deepseek_v3", {**MLA, "q_lora_rank": None, "n_shared_experts": 2, "attention_bias": True}),
    "v2": ("deepseek_v2", {**MLA, "q_lora_rank": 24, "n_shared_experts": 2, "topk_method": "group_limited_greedy",
                           "routed_scaling_factor": 16.0, "rope_parameters": YARN}),
    "v2-lite": ("deepseek_v2", {**MLA, "q_lora_rank": None, "n_shared_experts": 2, "n_group": None,
                                "topk_group": None}),
    "llama": ("llama", {**SMALL, "num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "llama biases": ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "qwen2 tied": ("qwen2", {**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**SMALL, "num_key_value_heads": 2, "head_dim": 24}),
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    family, fields = FAMILIES[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**fields, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # biases, norms and the router start as constants, which would hide a mix-up
        for value in itertools.chain(model.parameters(), (b for n, b in model.named_buffers() if "e_score" in n)):
            value.copy_(torch.randn_like(value) * 0.2 + (value.mean() if value.dim() == 1 else 0))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return model(torch.arange(50)[None] % 64).logits


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="auto").eval()


@pytest.fixture(autouse=True)
def _mtp_warning_only() -> Iterator[None]:
    """Every warning of ours is an error, but the one about the MTP layer that transformers announces and drops."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        warnings.filterwarnings("ignore", message=".*announces 1 MTP layer")
        yield


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v3")
    tiny("v3").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(v3: Path, tmp_path: Path) -> Path:
    """A copy of the tiny V3 that a test may damage."""
    return Path(shutil.copytree(v3, tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**raw, **changes}))


def rewrite(folder: Path, change: Any) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_again(tmp_path: Path, name: str) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path / "theirs")
    checkpoint = open_folder(tmp_path / "theirs")
    state = model.state_dict()
    for key, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.read(), in_transformers(state, key))
    assert sum(np.prod(tensor.shape) for tensor in checkpoint.tensors.values()) == sum(
        value.numel() for key, value in state.items() if key != "lm_head.weight" or not model.config.tie_word_embeddings
    )

    save_folder(checkpoint, tmp_path / "ours")
    stored, original = (safetensors.numpy.load_file(tmp_path / x / "model.safetensors") for x in ("ours", "theirs"))
    assert stored.keys() == original.keys()
    assert all(np.array_equal(stored[key], original[key]) for key in stored)
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))
    assert open_folder(tmp_path / "ours").config == checkpoint.config


def in_transformers(state: dict[str, torch.Tensor], key: str) -> np.ndarray:
    """The same weights in transformers' memory, where gate and up are one fused stack."""
    if ".mlp.experts." not in key:
        return state[key].numpy()
    prefix, part, _ = key.rsplit(".", 2)
    if part == "down_proj":
        return state[f"{prefix}.down_proj"].numpy()
    gate, up = state[f"{prefix}.gate_up_proj"].chunk(2, dim=1)
    return (gate if part == "gate_proj" else up).numpy()


def test_fused_stacks_are_read(tmp_path: Path) -> None:
    model = tiny("v3")
    model.save_pretrained(tmp_path, save_original_format=False)
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    state = model.state_dict()
    for key, tensor in open_folder(tmp_path).tensors.items():
        np.testing.assert_array_equal(tensor.read(), in_transformers(state, key))


def test_a_stack_is_read_one_expert_at_a_time_and_a_matrix_is_not_copied(v3: Path) -> None:
    checkpoint = open_folder(v3)
    chunks = list(checkpoint.tensors["model.layers.1.mlp.experts.up_proj.weight"].chunks())
    assert [chunk.shape for chunk in chunks] == [(1, 20, 32)] * 8
    assert not checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].read().flags.owndata


def with_mtp(checkpoint: Checkpoint) -> Checkpoint:
    config = replace(checkpoint.config, num_nextn_predict_layers=1)
    tensors = dict(checkpoint.tensors)
    rng = np.random.default_rng(5)
    for name, shape in expected_tensors(config).items():
        if name not in tensors:
            tensors[name] = constant(name, rng.standard_normal(shape).astype(np.float32))
    return replace(checkpoint, config=config, tensors=tensors)


def constant(name: str, array: np.ndarray, dtype: str = "F32") -> LazyTensor:
    return LazyTensor(
        name=name, shape=array.shape, dtype=dtype, source=Path("memory"), make_chunks=lambda: iter([array])
    )


def test_mtp_layers_carry_the_published_copies_and_lose_them_again(v3: Path, tmp_path: Path) -> None:
    checkpoint = with_mtp(open_folder(v3))
    save_folder(checkpoint, tmp_path / "ours")
    stored = safetensors.numpy.load_file(tmp_path / "ours" / "model.safetensors")
    mtp = {key.removeprefix("model.layers.2.") for key in stored if key.startswith("model.layers.2.")}
    assert {"embed_tokens.weight", "enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight",
            "shared_head.head.weight", "mlp.experts.7.down_proj.weight", "mlp.gate.weight"} <= mtp  # fmt: skip
    embed, head = stored["model.embed_tokens.weight"], stored["lm_head.weight"]
    np.testing.assert_array_equal(stored["model.layers.2.embed_tokens.weight"], embed)
    np.testing.assert_array_equal(stored["model.layers.2.shared_head.head.weight"], head)
    again = open_folder(tmp_path / "ours")
    assert again.config == checkpoint.config
    assert list(again.tensors) == list(expected_tensors(checkpoint.config))
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read())
    assert torch.equal(logits(load(tmp_path / "ours")), logits(load(v3)))  # transformers leaves the MTP layer aside


def test_absent_mtp_layers_are_left_out_with_a_warning(v3: Path) -> None:
    assert json.loads((v3 / "config.json").read_text())["num_nextn_predict_layers"] == 1
    with pytest.warns(UserWarning, match="announces 1 MTP layer"):
        assert open_folder(v3).config.num_nextn_predict_layers == 0


def test_half_an_mtp_layer_is_an_error(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.2.enorm.weight": np.ones(32, np.float32)}))
    with pytest.raises(FileError, match=r"model\.layers\.2\.hnorm\.weight: is missing"):
        open_folder(folder)


def test_mtp_layers_the_configuration_does_not_want_are_left_unread(v3: Path, tmp_path: Path) -> None:
    save_folder(with_mtp(open_folder(v3)), tmp_path / "m")
    edit(tmp_path / "m" / "config.json", num_nextn_predict_layers=0)
    with pytest.warns(UserWarning, match="left unread"):
        assert open_folder(tmp_path / "m").config.num_nextn_predict_layers == 0


def test_a_stranger_in_an_mtp_layer_is_an_error(v3: Path, tmp_path: Path) -> None:
    save_folder(with_mtp(open_folder(v3)), tmp_path / "m")
    rewrite(tmp_path / "m", put("model.layers.2.eh_proj.bias", np.ones(32, np.float32)))
    with pytest.raises(FileError, match="has no place") as caught:
        open_folder(tmp_path / "m")
    assert caught.value.item == "model.layers.2.eh_proj.bias"


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_saving_as_another_type(v3: Path, tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    seen: list[tuple[int, int]] = []
    save_folder(open_folder(v3), tmp_path / "m", dtype=dtype, progress=lambda *step: seen.append(step))
    model, original = load(tmp_path / "m"), load(v3)
    theirs = original.to(kind).state_dict()
    for key, value in model.state_dict().items():
        if key.endswith("e_score_correction_bias"):
            stored = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")[key]
            assert stored.dtype == torch.float32
        else:
            assert value.dtype == kind
            assert torch.equal(value, theirs[key]), key
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == dtype
    size = (tmp_path / "m" / "model.safetensors").stat().st_size
    assert seen[-1][0] == seen[-1][1]
    assert size * 0.5 < seen[-1][1] < size
    assert all(before[0] < after[0] for before, after in itertools.pairwise(seen))


def test_shards_that_transformers_reads(v3: Path, tmp_path: Path) -> None:
    save_folder(open_folder(v3), tmp_path / "m", max_shard_bytes=20_000)
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path / "m")), logits(load(v3)))
    again = open_folder(tmp_path / "m")
    for name, tensor in open_folder(v3).tensors.items():
        np.testing.assert_array_equal(again.tensors[name].read(), tensor.read())


def test_saving_never_touches_what_is_there(v3: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_folder(open_folder(v3), tmp_path / "m")  # an empty folder is free
    before = sorted(path.name for path in (tmp_path / "m").iterdir())
    with pytest.raises(FileError, match="not empty"):
        save_folder(open_folder(v3), tmp_path / "m")
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileError, match="not a folder"):
        save_folder(open_folder(v3), tmp_path / "file")
    with pytest.raises(ConfigError, match="dtype"):
        save_folder(open_folder(v3), tmp_path / "x", dtype="int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "m"]


def test_a_failure_half_way_leaves_nothing(v3: Path, tmp_path: Path) -> None:
    checkpoint = open_folder(v3)
    broken = np.ones((32, 48), np.float32)
    broken[3, 3] = 1e30
    name = "model.layers.0.mlp.down_proj.weight"
    checkpoint = replace(checkpoint, tensors={**checkpoint.tensors, name: constant(name, broken)})
    with pytest.raises(FileError, match=r"^memory: .*down_proj\.weight: holds 1\.0+15.*e\+30"):
        save_folder(checkpoint, tmp_path / "m", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_destination_and_leaves_nothing(v3: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(FileError) as caught:
            save_folder(open_folder(v3), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value) == f"{tmp_path}/m/model.safetensors: cannot be written: File too large"
    assert caught.value.path == tmp_path / "m" / "model.safetensors"
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_files_travel_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"]
    names.append("additional_chat_templates/tool_use.jinja")
    (folder / "additional_chat_templates").mkdir()
    for name in names:
        (folder / name).write_text(f"the {name}")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    save_folder(open_folder(folder), tmp_path / "m")
    for name in names:
        assert (tmp_path / "m" / name).read_text() == f"the {name}"
    assert not (tmp_path / "m" / "modeling_evil.py").exists()


def test_a_tokenizer_file_that_is_a_link_out_is_not_copied(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    os.symlink(tmp_path / "secret", folder / "tokenizer.json")
    with pytest.raises(FileError, match=r"tokenizer\.json: is a link that leaves"):
        save_folder(open_folder(folder), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# FP8


def quantise(folder: Path, block: tuple[int, int], *, e8m0: bool = False) -> dict[str, np.ndarray]:
    """Turn the folder into two shards of block-scaled FP8, each scale in the other shard than its weight."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards: list[dict[str, np.ndarray]] = [{}, {}]
    expected = {}
    for number, (name, array) in enumerate(sorted(tensors.items())):
        if "_proj" not in name or array.ndim != 2:
            shards[0][name] = expected[name] = array
            continue
        rows, cols = array.shape
        scale = np.empty((-(-rows // block[0]), -(-cols // block[1])), np.float32)
        out, fp8 = np.empty_like(array), np.empty(array.shape, ml_dtypes.float8_e4m3fn)
        for p, q in np.ndindex(*scale.shape):
            part = np.s_[p * block[0] : (p + 1) * block[0], q * block[1] : (q + 1) * block[1]]
            scale[p, q] = np.abs(array[part]).max() / 448
            if e8m0:
                scale[p, q] = np.exp2(np.ceil(np.log2(scale[p, q])))
            fp8[part] = array[part] / scale[p, q]
            out[part] = fp8[part].astype(np.float32) * scale[p, q]
        expected[name] = out
        shards[number % 2][name] = fp8
        shards[1 - number % 2][name + "_scale_inv"] = scale.astype(ml_dtypes.float8_e8m0fnu) if e8m0 else scale
    for number, shard in enumerate(shards, 1):
        to_torch = {key: as_torch(value) for key, value in shard.items()}
        safetensors.torch.save_file(to_torch, folder / f"model-{number:05d}-of-00002.safetensors")
    weight_map = {name: f"model-{n:05d}-of-00002.safetensors" for n, shard in enumerate(shards, 1) for name in shard}
    edit(folder / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "fmt": "e4m3",
         "activation_scheme": "dynamic", "weight_block_size": list(block)})  # fmt: skip
    return expected


def as_torch(array: np.ndarray) -> torch.Tensor:
    kinds = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e8m0fnu": torch.float8_e8m0fnu}
    if array.dtype.name in kinds:
        return torch.from_numpy(array.view(np.uint8).copy()).view(kinds[array.dtype.name])
    return torch.from_numpy(array.copy())


@pytest.mark.parametrize("e8m0", [False, True])
def test_fp8_weights_with_scales_in_another_shard(folder: Path, tmp_path: Path, e8m0: bool) -> None:
    expected = quantise(folder, (16, 12), e8m0=e8m0)
    checkpoint = open_folder(folder)
    stack = checkpoint.tensors["model.layers.1.mlp.experts.gate_proj.weight"]
    assert stack.dtype == "F8_E4M3"
    for index, expert in enumerate(stack.read()):
        np.testing.assert_array_equal(expert, expected[f"model.layers.1.mlp.experts.{index}.gate_proj.weight"])
    for name, tensor in checkpoint.tensors.items():
        if name in expected:
            np.testing.assert_array_equal(tensor.read(), expected[name])
    save_folder(checkpoint, tmp_path / "bf16")  # `keep` means bfloat16 for FP8
    stored = safetensors.torch.load_file(tmp_path / "bf16" / "model.safetensors")
    assert not any(name.endswith("scale_inv") for name in stored)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(stored[name], torch.from_numpy(expected[name]).bfloat16())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    load(tmp_path / "bf16")


def test_fp8_without_or_with_a_wrong_scale_is_refused_by_name(folder: Path) -> None:
    quantise(folder, (16, 12))
    shard = folder / "model-00001-of-00002.safetensors"
    good = safetensors.torch.load_file(shard)
    name = next(key for key in good if key.endswith("_scale_inv"))
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(FileError, match=r"_scale_inv: has shape .* needs \[1, 1\]"):
        open_folder(folder)
    edit(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [16, 12]})
    safetensors.torch.save_file({**good, name: good[name][:1]}, shard)
    with pytest.raises(FileError) as caught:
        open_folder(folder)
    assert caught.value.item == name
    safetensors.torch.save_file({key: value for key, value in good.items() if key != name}, shard)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    del index[name]
    edit(folder / "model.safetensors.index.json", weight_map=index)
    with pytest.raises(FileError, match="is FP8 without its scale") as caught:
        open_folder(folder)
    assert caught.value.item == name


def test_a_scale_beside_a_plain_weight_is_refused(folder: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({f"{name}_scale_inv": np.ones((1, 1), np.float32)}))
    with pytest.raises(FileError, match="has a scale although it is stored as F32"):
        open_folder(folder)


# damaged and hostile folders


def shard_up(folder: Path) -> dict[str, str]:
    """Split into two shards with an index; returns the weight map."""
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[:9]), ("b.safetensors", names[9:])):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map.update(dict.fromkeys(part, shard))
    edit(folder / "model.safetensors.index.json", weight_map=weight_map)
    return weight_map


def test_index_faults(folder: Path, tmp_path: Path) -> None:
    weight_map = shard_up(folder)
    open_folder(folder)
    index = folder / "model.safetensors.index.json"
    outside = tmp_path / "outside.safetensors"
    shutil.copy(folder / "b.safetensors", outside)
    last = sorted(weight_map)[-1]
    for bad in (str(outside), "../outside.safetensors", "x/../../outside.safetensors", "..\\outside.safetensors"):
        edit(index, weight_map={**weight_map, last: bad})
        with pytest.raises(FileError, match="leaves the model's folder"):
            open_folder(folder)
    for bad in ("pytorch_model.bin", 3, None, ["a.safetensors"]):
        edit(index, weight_map={**weight_map, last: bad})
        with pytest.raises(FileError, match="no safetensors file"):
            open_folder(folder)
    for broken in ([], {}, None, "x"):
        edit(index, weight_map=broken)
        with pytest.raises(FileError, match="weight_map"):
            open_folder(folder)
    edit(index, weight_map={**weight_map, last: "c.safetensors"})
    with pytest.raises(FileError, match=r"c\.safetensors: is missing; model.safetensors.index.json names it"):
        open_folder(folder)
    edit(index, weight_map={**weight_map, last: "a.safetensors"})
    with pytest.raises(FileError, match="json says it is here"):
        open_folder(folder)


def test_a_tensor_in_two_shards(folder: Path) -> None:
    shard_up(folder)
    tensors = safetensors.numpy.load_file(folder / "b.safetensors")
    safetensors.numpy.save_file({**tensors, "lm_head.weight": np.zeros((64, 32), np.float32)}, folder / "b.safetensors")
    with pytest.raises(FileError, match=r"lm_head\.weight: is also in a\.safetensors"):
        open_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_link_out_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / name)
    os.symlink(tmp_path / name, folder / name)
    with pytest.raises(FileError, match="is a link that leaves"):
        open_folder(folder)


def test_the_cache_layout_of_huggingface_hub_is_understood(v3: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(v3 / name, blobs / f"hash-{name}")
        os.symlink(f"../../blobs/hash-{name}", snapshot / name)
    assert open_folder(snapshot).config == open_folder(v3).config


def test_pickles_are_refused_and_never_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
        with pytest.raises(FileError, match=f"only pickled weights \\({name}\\)"):
            open_folder(folder)
        (folder / name).unlink()
    with pytest.raises(FileError, match=r"neither model\.safetensors nor"):
        open_folder(folder)
    (folder / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match=r"m\.gguf; name that file itself"):
        open_folder(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(FileError, match=r"config\.json: is missing"):
        open_checkpoint(folder)


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, array: np.ndarray) -> Any:
    return lambda tensors: tensors.update({name: array})


F32 = np.float32
DAMAGE: list[tuple[Any, str]] = [
    (drop("model.norm.weight"), "model.norm.weight"),
    (drop("lm_head.weight"), "lm_head.weight"),
    (drop("model.layers.1.mlp.experts.5.up_proj.weight"), "model.layers.1.mlp.experts.5.up_proj.weight"),
    (drop("model.layers.1.mlp.experts.0.up_proj.weight"), "model.layers.1.mlp.experts.up_proj.weight"),
    (put("model.norm.weight", np.ones(31, F32)), "model.norm.weight"),
    (put("model.embed_tokens.weight", np.ones((32, 64), F32)), "model.embed_tokens.weight"),
    (put("model.norm.weight", np.ones((), F32)), "model.norm.weight"),
    (put("model.norm.weight", np.ones(32, np.int64)), "model.norm.weight"),
    (put("model.layers.1.mlp.experts.5.up_proj.weight", np.ones((20, 31), F32)),
     "model.layers.1.mlp.experts.5.up_proj.weight"),
    (put("model.layers.1.mlp.experts.8.up_proj.weight", np.ones((20, 32), F32)),
     "model.layers.1.mlp.experts.8.up_proj.weight"),
    (put("model.layers.1.mlp.experts.down_proj", np.ones((8, 32, 20), F32)), "model.layers.1.mlp.experts.down_proj"),
    (put("model.layers.0.self_attn.q_b_proj.bias", np.ones(48, F32)), "model.layers.0.self_attn.q_b_proj.bias"),
    (put("model.layers.2.mlp.up_proj.weight", np.ones((4, 4), F32)), None),
    (put("model.layers.7.input_layernorm.weight", np.ones(32, F32)), "model.layers.7.input_layernorm.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "item"), DAMAGE, ids=lambda value: None if callable(value) else str(value)[:70])
def test_tensors_that_do_not_fit_are_named(folder: Path, change: Any, item: str | None) -> None:
    rewrite(folder, change)
    with pytest.raises(FileError) as caught:
        open_folder(folder)
    assert item is None or caught.value.item == item


def test_a_shortened_model_is_not_opened_as_a_smaller_one(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=1, num_nextn_predict_layers=0)
    with pytest.raises(FileError, match="has no place in the model"):
        open_folder(folder)


def test_foreign_tensors_are_named_and_old_buffers_are_not(folder: Path) -> None:
    rewrite(folder, put("model.layers.0.self_attn.rotary_emb.inv_freq", np.ones(4, F32)))
    open_folder(folder)
    rewrite(folder, put("v_head.weight", np.ones(4, F32)))
    with pytest.warns(UserWarning, match=r"1 tensor\(s\) left unread: v_head.weight"):
        open_folder(folder)


def test_tied_embeddings_must_be_tied(tmp_path: Path) -> None:
    tiny("qwen2 tied").save_pretrained(tmp_path)
    embed = safetensors.numpy.load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, put("lm_head.weight", embed))
    assert "lm_head.weight" not in open_folder(tmp_path).tensors
    other = embed.copy()
    other[-1, -1] += 1
    rewrite(tmp_path, put("lm_head.weight", other))
    with pytest.raises(FileError, match=r"lm_head\.weight: differs .* tie_word_embeddings"):
        open_folder(tmp_path)


def test_generation_config_has_the_last_word(folder: Path) -> None:
    path = folder / "generation_config.json"
    edit(path, eos_token_id=[1, 7], temperature=0.6, top_p=1, top_k=40, min_p=None)
    checkpoint = open_folder(folder)
    assert checkpoint.config.eos_token_id == (1, 7)
    assert checkpoint.generation == GenerationDefaults(temperature=0.6, top_p=1.0, top_k=40)
    path.unlink()
    assert open_folder(folder).config.eos_token_id == (1,)
    for name, bad in (("temperature", "hot"), ("temperature", -1), ("top_p", float("nan")), ("top_k", 1.5),
                      ("top_k", True), ("eos_token_id", "x")):  # fmt: skip
        edit(path, **{"temperature": 1, "top_p": 1, "top_k": 1, "eos_token_id": 1, name: bad})
        with pytest.raises(FileError) as caught:
            open_folder(folder)
        assert (caught.value.path.name, caught.value.item) == ("generation_config.json", name)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_broken_numbers_are_found_by_name_and_place(folder: Path, kind: type) -> None:
    assert list(check_tensors(open_folder(folder))) == []

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if tensors[name].ndim == 2:
                tensors[name] = tensors[name].astype(kind)
        tensors["model.layers.1.mlp.experts.5.up_proj.weight"][3, 2] = np.nan
        tensors["model.layers.1.mlp.experts.6.up_proj.weight"][0, 0] = np.nan
        tensors["model.norm.weight"][31] = -np.inf

    rewrite(folder, spoil)
    found = list(check_tensors(open_folder(folder)))
    assert [(bad.name, bad.index) for bad in found] == [
        ("model.layers.1.mlp.experts.up_proj.weight", (5, 3, 2)),
        ("model.norm.weight", (31,)),
    ]
    assert str(found[1]) == "model.norm.weight[31] is -inf"


def test_a_dense_mla_model_loads_in_transformers(v3: Path, tmp_path: Path) -> None:
    source = open_folder(v3)
    config: ModelConfig = replace(source.config, moe=None)
    rng = np.random.default_rng(0)
    tensors = {
        name: constant(name, (rng.standard_normal(shape) * 0.1).astype(np.float32))
        for name, shape in expected_tensors(config).items()
    }
    save_folder(replace(source, config=config, tensors=tensors), tmp_path / "dense")
    model = load(tmp_path / "dense")
    assert set(model.state_dict()) == tensors.keys()
    assert open_folder(tmp_path / "dense").config == config
