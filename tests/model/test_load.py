"""Models to checkpoints and back, fresh models, and damaged checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from shoal.errors import FileError  # noqa: E402
from shoal.formats.layout import expected_tensors  # noqa: E402
from shoal.model import Model, as_checkpoint, load_model, random_model  # noqa: E402

V3 = {"model_type": "deepseek_v3", "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1}
CASES = {
    "v2": {"model_type": "deepseek_v2", "tie_word_embeddings": True},
    "v3": V3,
    "qwen2": {"model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 1},
}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def with_tensor(checkpoint, name, tensor):
    tensors = {key: value for key, value in checkpoint.tensors.items() if key != name}
    if tensor is not None:
        tensors[name] = tensor
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_a_model_survives_the_round_trip(name, dtype, randomised):
    model = randomised(CASES[name]).to(dtype)
    checkpoint = as_checkpoint(model)
    checkpoint.check_complete()
    assert list(checkpoint.tensors) == list(expected_tensors(model.config))
    back = load_model(checkpoint, dtype=dtype)
    state = back.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value.to(state[key].dtype)), key
        if not key.endswith("e_score_correction_bias"):
            assert state[key].dtype == dtype
    assert all(parameter.requires_grad for parameter in back.parameters())


def test_selection_bias_is_read_and_kept_in_float32(randomised):
    model = randomised(V3)
    bias = dict(model.named_buffers())[BIAS]
    bias += 1 / 3
    state = load_model(as_checkpoint(model), dtype=torch.bfloat16).state_dict()
    assert state[BIAS].dtype == torch.float32
    assert torch.equal(state[BIAS], bias)
    assert state["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


def test_experts_travel_one_at_a_time(randomised):
    model = randomised(V3)
    name = "model.layers.1.mlp.experts.down_proj.weight"
    chunks = list(as_checkpoint(model).tensors[name].chunks())
    assert [chunk.shape for chunk in chunks] == [(1, 45, 22)] * 12
    assert np.array_equal(np.concatenate(chunks), model.state_dict()[name].numpy())


def test_chunks_of_float64_are_float32(randomised):
    tensor = as_checkpoint(randomised(V3).double()).tensors["model.norm.weight"]
    assert tensor.dtype == "F32"
    assert tensor.read().dtype == np.float32


def test_write_protected_memory_is_copied_without_a_warning(randomised, recwarn):
    checkpoint = as_checkpoint(randomised(V3))
    value = checkpoint.tensors["model.norm.weight"].read()
    value.flags.writeable = False
    tensor = dataclasses.replace(checkpoint.tensors["model.norm.weight"], make_chunks=lambda: iter([value]))
    model = load_model(with_tensor(checkpoint, "model.norm.weight", tensor))
    assert np.array_equal(model.model.norm.weight.detach().numpy(), value)
    assert not recwarn.list


def test_a_missing_tensor_is_named(randomised):
    name = "model.layers.2.self_attn.q_b_proj.weight"
    with pytest.raises(FileError, match=name):
        load_model(with_tensor(as_checkpoint(randomised(V3)), name, None))


def test_a_wrong_shape_is_found_before_memory_is_taken(randomised, monkeypatch):
    checkpoint = as_checkpoint(randomised(V3))
    name = "model.norm.weight"
    wrong = dataclasses.replace(checkpoint.tensors[name], shape=(46,))
    monkeypatch.setattr(Model, "__init__", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(FileError, match=r"model\.norm\.weight.*\[46\].*\[45\]"):
        load_model(with_tensor(checkpoint, name, wrong))


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ([np.zeros(40, np.float32)], "ends after 40 of 45 rows"),
        ([np.zeros(40, np.float32), np.zeros(6, np.float32)], "yields more"),
        ([np.zeros((45, 2), np.float32)], "yields more"),
        ([], "ends after 0 of 45 rows"),
    ],
)
def test_chunks_that_do_not_add_up_are_refused(chunks, problem, randomised):
    checkpoint = as_checkpoint(randomised(V3))
    name = "model.norm.weight"
    tensor = dataclasses.replace(checkpoint.tensors[name], make_chunks=lambda: iter(chunks))
    with pytest.raises(FileError, match=problem):
        load_model(with_tensor(checkpoint, name, tensor))


def test_a_checkpoint_in_memory_has_no_tokenizer_unless_it_is_like_another(randomised):
    model = randomised(V3)
    bare = as_checkpoint(model)
    assert bare.load_chat() is None
    with pytest.raises(FileError, match="without a tokenizer"):
        bare.load_tokenizer()
    parent = dataclasses.replace(bare, path=Path("parent"), load_tokenizer=lambda: "a tokenizer")
    child = as_checkpoint(model, like=parent)
    assert child.load_tokenizer() == "a tokenizer"
    assert child.path == Path("parent")


@pytest.mark.parametrize("name", CASES)
def test_a_seed_fixes_a_fresh_model(name, config_of):
    config = config_of(CASES[name])
    one, same, other = (random_model(config, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_fresh_weights_are_as_published(config_of):
    config = dataclasses.replace(config_of(V3), initializer_range=0.05)
    state = random_model(config, 0).state_dict()
    for name, value in state.items():
        if name.endswith("norm.weight"):
            assert torch.all(value == 1), name
        elif name.endswith("bias"):
            assert torch.all(value == 0), name
        else:
            assert value.std().item() == pytest.approx(0.05, rel=0.15), name
            assert abs(value.mean().item()) < 0.01, name
    biased = random_model(config_of(CASES["qwen2"]), 0).state_dict()
    assert torch.all(biased["model.layers.0.self_attn.q_proj.bias"] == 0)
