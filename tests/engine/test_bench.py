"""The measuring itself: what runs, what is counted, what is refused. No speed is asserted."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from shoal.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from shoal.engine.bench import Bench, Case, Spread, open_core, read_bandwidth
from shoal.engine.core import Core
from shoal.errors import RequestError, ShoalError
from shoal.formats.checkpoint import Checkpoint, open_checkpoint
from shoal.kernels import native

ROOT = Path(__file__).resolve().parents[2]
LAYERS, EXPERTS, ACTIVE = 3, 16, 2


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


random_gguf = _load("random_gguf")


def _moe() -> ModelConfig:
    return ModelConfig(
        model_type="deepseek_v3", vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS,
        attention=MLAConfig(
            num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(
            n_routed_experts=EXPERTS, num_experts_per_tok=ACTIVE, moe_intermediate_size=64, n_shared_experts=1,
            first_k_dense_replace=1,
        ),
        rope=RopeConfig(interleave=True), max_position_embeddings=2048, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


def _dense(*, tied: bool) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        attention=GQAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16), max_position_embeddings=512,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=(2,),
    )  # fmt: skip


def _write(config: ModelConfig, path: Path, dtype: str = "Q8_0") -> Checkpoint:
    random_gguf.write_random(config, dtype, path)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return _write(_moe(), tmp_path_factory.mktemp("bench") / "moe.gguf")


class Recording(Core):
    """A core that remembers the sequences it was given."""

    def submit(self, sequence):
        vars(self).setdefault("submitted", []).append((sequence, list(sequence.tokens), sequence.max_tokens))
        super().submit(sequence)


def _record(monkeypatch: pytest.MonkeyPatch, checkpoint: Checkpoint, case: Case) -> Recording:
    monkeypatch.setattr("shoal.engine.bench.Core", Recording)
    core = open_core(checkpoint, [case], threads=1)
    assert isinstance(core, Recording)
    return core


def test_every_token_is_accounted_for(monkeypatch, checkpoint):
    case = Case(prompt=10, gen=5, depth=70, batch=3)
    core = _record(monkeypatch, checkpoint, case)
    measured = Bench(core, checkpoint.config).measure(case, repeats=2)
    lengths = [len(tokens) for _, tokens, _ in core.submitted]
    # The warm-up, the depth once, and for each repeat the prompts and then their continuations.
    assert lengths == [10, 70, 70, 70, *[80, 80, 80, 81, 81, 81] * 2]
    for repeat in (0, 1):
        first = 4 + 6 * repeat
        read, decoded = core.submitted[first : first + 3], core.submitted[first + 3 : first + 6]
        for (prompt, _, _), (text, tokens, _) in zip(read, decoded, strict=True):
            assert prompt.produced == 1 and prompt.cached_tokens == 64  # a whole page of the depth
            assert tokens == prompt.tokens
            assert text.finish == "length"
            assert text.produced >= 1 + case.gen
    assert measured.prompt_tok_s.low > 0 and measured.first_token_s.low > 0
    assert measured.decode_tok_s is not None and measured.decode_tok_s.low > 0
    assert not core._scheduler.running and not core._scheduler.waiting


def test_no_prompt_is_known_to_the_cache(monkeypatch, checkpoint):
    case = Case(prompt=130, gen=2, depth=0, batch=2)
    core = _record(monkeypatch, checkpoint, case)
    bench = Bench(core, checkpoint.config)
    bench.measure(case, repeats=2)
    bench.measure(case, repeats=1)
    prompts = [sequence for sequence, tokens, _ in core.submitted if len(tokens) == case.prompt]
    assert len(prompts) == 8  # two warm-ups, three repeats of two
    assert [sequence.cached_tokens for sequence in prompts] == [0] * 8


def test_generated_tokens_are_random(monkeypatch, checkpoint):
    case = Case(prompt=4, gen=30, batch=4)
    core = _record(monkeypatch, checkpoint, case)
    Bench(core, checkpoint.config).measure(case, repeats=1)
    texts = [tuple(sequence.tokens[-30:]) for sequence, _, _ in core.submitted[-4:]]
    assert len(set(texts)) == 4
    assert len({token for text in texts for token in text}) > 60


def test_bytes_of_a_step(checkpoint):
    """One sequence reads each layer's ACTIVE experts; all packed bytes are the step's, the experts' and the table's.

    What only long prompts read is none of a step's."""
    core = open_core(checkpoint, [Case(prompt=8, gen=4)], threads=1, prefill="absorbed")
    expanding = open_core(checkpoint, [Case(prompt=8, gen=4)], threads=1, prefill="expanded")
    assert expanding.step_bytes == core.step_bytes and expanding.weight_bytes > core.weight_bytes
    measured = Bench(core, checkpoint.config).measure(Case(prompt=8, gen=4), repeats=2)
    q8 = 2

    def packed(rows: int, cols: int) -> int:
        return native.packed_bytes(q8, rows, cols)

    expert = 2 * packed(64, 128) + packed(128, 64)
    moe_layers = LAYERS - 1
    assert measured.experts_per_layer == ACTIVE
    assert measured.expert_bytes == moe_layers * ACTIVE * expert
    assert measured.weight_bytes == core.weight_bytes - moe_layers * EXPERTS * expert - packed(512, 128)
    attention = packed(4 * 48, 128) + packed(80, 128) + packed(128, 128) + 4 * (packed(64, 32) + packed(32, 64))
    router = native.packed_bytes(0, EXPERTS, 128)
    mlps = 2 * packed(192, 128) + packed(128, 192) + moe_layers * expert  # the dense layer, and a shared expert each
    assert measured.weight_bytes == LAYERS * attention + moe_layers * router + mlps + packed(512, 128)
    # 80 bfloat16 values a layer and position. The clock starts at the tenth token: eight are the prompt, one came from
    # reading it, one more when decoding began.
    positions = [10 + step for step in range(4)]
    assert measured.cache_bytes == LAYERS * 80 * 2 * sum(positions) // 4


def test_a_batch_reads_an_expert_once(checkpoint):
    case = Case(prompt=4, gen=8, batch=16)
    measured = Bench(open_core(checkpoint, [case], threads=2), checkpoint.config).measure(case, repeats=1)
    assert measured.experts_per_layer is not None
    assert ACTIVE * 3 < measured.experts_per_layer <= EXPERTS


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_table_is_read_as_the_head(tmp_path, tied):
    case = Case(prompt=4, gen=1)
    checkpoint = _write(_dense(tied=tied), tmp_path / "dense.gguf")
    core = open_core(checkpoint, [case], threads=1)
    measured = Bench(core, checkpoint.config).measure(case, repeats=1)
    table = native.packed_bytes(2, 512, 64)
    assert core.weight_bytes - core.step_bytes == (0 if tied else table)
    assert measured.expert_bytes == 0
    assert measured.experts_per_layer is None


def test_prompt_alone(checkpoint):
    case = Case(prompt=70, gen=0)
    measured = Bench(open_core(checkpoint, [case], threads=1), checkpoint.config).measure(case, repeats=1)
    assert measured.prompt_tok_s.median > 0
    assert measured.decode_tok_s is measured.decode_gb_s is measured.experts_per_layer is None
    assert measured.cache_bytes == 0


def test_the_cache_is_as_large_as_the_largest_case(checkpoint):
    small, large = Case(prompt=8, gen=8), Case(prompt=8, gen=8, depth=256, batch=4)
    core = open_core(checkpoint, [small, large, small], threads=1)
    assert core.cache_tokens == large.cache_tokens >= 4 * (256 + 8 + 8)


def test_spread():
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(median=3.0, low=1.0, high=10.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompt", 0), ("gen", -1), ("depth", -1), ("batch", 0), ("batch", 257), ("prompt", (1 << 24) + 1)],
)
def test_impossible_cases(field, value):
    with pytest.raises(RequestError, match=rf"^{field}: must lie between"):
        dataclasses.replace(Case(), **{field: value})


def test_a_case_beyond_the_context_is_refused_before_anything_is_packed(checkpoint):
    with pytest.raises(RequestError, match="depth: 2000 \\+ 40 \\+ 64 tokens do not fit the model's context of 2048"):
        open_core(checkpoint, [Case(), Case(prompt=40, depth=2000)], threads=1)
    with pytest.raises(RequestError, match="repeats"):
        Bench(open_core(checkpoint, [Case(prompt=1)], threads=1), checkpoint.config).measure(Case(prompt=1), repeats=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_native_read_bandwidth(threads):
    rate = native.read_bandwidth(threads, 8 << 20, 3)
    assert 1e6 < rate < 1e14


def test_native_read_bandwidth_refuses_nonsense():
    for args in ((0, 1 << 20, 1), (1, 0, 1), (1, 1 << 20, 0)):
        with pytest.raises(ValueError, match="must be positive"):
            native.read_bandwidth(*args)


def test_read_bandwidth_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr("shoal.engine.bench.READ_BYTES", 8 << 20)
    assert 1e6 < read_bandwidth(2) < 1e14
    monkeypatch.setattr("shoal.engine.bench._READ", "raise SystemExit('no memory here')")
    with pytest.raises(ShoalError, match="memory bandwidth could not be measured: no memory here"):
        read_bandwidth(2)


@pytest.mark.parametrize("dtype", ["Q8_0", "Q4_0", "F16"])
def test_random_weights_are_centred(tmp_path, dtype):
    """A mean other than zero would drive all tokens into one direction and to the same experts."""
    checkpoint = _write(_moe(), tmp_path / "model.gguf", dtype)
    assert checkpoint.tensors["lm_head.weight"].dtype == dtype
    for name in ("lm_head.weight", "model.layers.1.mlp.experts.up_proj.weight"):
        values = checkpoint.tensors[name].read() * checkpoint.tensors[name].shape[-1] ** 0.5
        assert abs(float(values.mean())) < 5 * 0.7 / values.size**0.5
        assert float(values.std()) == pytest.approx(0.7, rel=0.03)
    ids = checkpoint.load_tokenizer().encode("zq5x")
    assert checkpoint.load_tokenizer().decode(ids).strip() == "zq5x"


def test_shapes_of_the_random_models():
    """The published counts: 15.7 billion weights in DeepSeek-V2-Lite, and 2.45 billion without the embedding used."""
    from shoal.formats.layout import count_active_params, count_params

    assert count_params(random_gguf.v2lite()) == 15_706_484_224
    assert count_active_params(random_gguf.v2lite()) == pytest.approx(2.45e9, rel=0.01)
    assert count_params(random_gguf.tiny()) == pytest.approx(87.6e6, rel=0.001)


def test_random_codes_average_zero_and_spread_as_said():
    q8 = random_gguf.CODES["Q8_0"].view(np.int8).astype(float)
    q4 = np.concatenate([random_gguf.CODES["Q4_0"] & 15, random_gguf.CODES["Q4_0"] >> 4]) - 8.0
    for codes, dtype in ((q8, "Q8_0"), (q4, "Q4_0")):
        assert codes.mean() == 0
        assert codes.std() == pytest.approx(random_gguf.CODE_SPREAD[dtype], rel=1e-3)
