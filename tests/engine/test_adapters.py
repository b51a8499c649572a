"""Adapters beside packed weights: against Hugging Face PEFT, in company, under the prefix cache, merged, refused."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from tests.engine.conftest import LLAMA, V2, V3, open_tiny, set_steps, some_tokens, tiny

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from shoal import LLM  # noqa: E402
from shoal.engine import SamplingParams  # noqa: E402
from shoal.errors import ConfigError, FileError, RequestError  # noqa: E402
from shoal.formats.adapter import Adapter, LowRank, check_adapter, load_adapter, save_adapter  # noqa: E402
from shoal.formats.layout import expected_tensors  # noqa: E402
from shoal.formats.safetensors import SafetensorsFile  # noqa: E402

GREEDY = SamplingParams(temperature=0, max_tokens=12, logprobs=2)
TOKENS = some_tokens(90)
MLA = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
MLP = [f"{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": (LLAMA, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}),
    "v2": (V2, {"target_modules": [*MLA, "q_proj"], "target_parameters": [*STACKS, *MLP]}),
    "v3": (V3, {"target_modules": [*MLA, "q_a_proj", "q_b_proj"], "target_parameters": [*STACKS, *MLP]}),
    "v3-down": (V3, {"target_modules": ["o_proj"], "target_parameters": STACKS[1:]}),
}


def peft_model(hf, targets, seed=3):
    """PEFT's own model around transformers', with factors that bfloat16 holds exactly."""
    config = peft.LoraConfig(r=3, lora_alpha=4, rank_pattern={"o_proj": 5}, alpha_pattern={"o_proj": 9}, **targets)
    adapted = peft.get_peft_model(hf, config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_" in name:
                value.copy_((0.3 * torch.randn(value.shape, generator=generator)).bfloat16())
    return adapted


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """A checkpoint, PEFT's folder of an adapter of it, and PEFT's logits."""
    shape, targets = CASES[request.param]
    hf, checkpoint = tiny(shape)
    checkpoint = frozen(checkpoint)
    adapted = peft_model(hf, targets)
    with torch.no_grad():
        expected = adapted(torch.tensor([TOKENS])).logits[0].numpy()
    adapted.save_pretrained(tmp_path / "peft")
    return checkpoint, tmp_path / "peft", expected


def frozen(checkpoint):
    """Its arrays are transformers' own, which PEFT may move."""
    from tests.engine.conftest import in_memory

    return in_memory(checkpoint.config, {name: np.array(t.read()) for name, t in checkpoint.tensors.items()})


def made(checkpoint, folder, targets, seed=0, experts=None):
    """A folder of random factors of rank 2 on matrices of these names."""
    rng = np.random.default_rng(seed)
    parts = {}
    for name, shape in expected_tensors(checkpoint.config).items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(targets)) and len(shape) >= 2:
            *stack, rows, cols = shape
            count = stack[0] if stack else 1
            a = rng.normal(0, cols**-0.5, (count, 2, cols)).astype(np.float32)
            b = rng.normal(0, 0.5, (count, rows, 2)).astype(np.float32)
            if stack and experts is not None:
                b[~np.isin(np.arange(count), experts)] = a[~np.isin(np.arange(count), experts)] = 0
            parts[module] = LowRank(a=a, b=b, scale=0.8)
    save_adapter(Adapter(parts=parts, path=Path("made")), checkpoint.config, folder)
    return folder


def off(found, expected):
    return abs(found - expected).max() / abs(expected).max()


def test_unmerged_logits_are_those_of_peft(case):
    checkpoint, folder, expected = case
    llm = open_tiny(checkpoint)
    before, bytes_before = llm.logits(TOKENS), llm.weight_bytes
    llm.load_adapter("tuned", folder)
    assert off(llm.logits(TOKENS, adapter="tuned"), expected) < 1e-4
    assert off(before, expected) > 0.05
    assert (llm.logits(TOKENS) == before).all()
    values = sum(np.prod(e.shape) for e in SafetensorsFile(folder / "adapter_model.safetensors").entries.values())
    # bfloat16, and of kv_b_proj's A a copy for each half
    assert 2 * values <= llm.weight_bytes - bytes_before < 2.5 * values


@pytest.mark.parametrize("threads", [1, 2])
def test_merged_and_unmerged_agree(case, threads):
    checkpoint, folder, _ = case
    llm = open_tiny(checkpoint, threads=threads)
    llm.load_adapter("tuned", folder)
    merged = LLM(checkpoint, adapter=folder, weights="f32", cache="f32", threads=1, cache_tokens=1024)
    assert off(llm.logits(TOKENS, adapter="tuned"), merged.logits(TOKENS)) < 1e-4
    quantised = open_tiny(checkpoint, weights="q8", activations="int16", threads=threads)
    quantised.load_adapter("tuned", folder)
    # Beside 8 bits too; where an expert is chosen otherwise a row is far off, so the middle one counts.
    rows = abs(quantised.logits(TOKENS, adapter="tuned") - merged.logits(TOKENS)).max(1)
    assert np.median(rows) < 0.05 * abs(merged.logits(TOKENS)).max()
    for tokens in (TOKENS[:1], TOKENS[:2], TOKENS[:3]):  # steps that every member computes for itself, and not
        assert off(llm.logits(tokens, adapter="tuned"), merged.logits(tokens)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"weights": "q8", "cache": "bf16"}, {"threads": 2, "speculate": 4}])
@pytest.mark.parametrize("shape", [LLAMA, V3], ids=["llama", "v3"])
def test_company_changes_no_bit(tmp_path, shape, options):
    """Requests of two adapters and of none in the same steps, each as if it were alone."""
    checkpoint = frozen(tiny(shape)[1])
    one = made(checkpoint, tmp_path / "one", ["q_proj", "kv_b_proj", "down_proj"], seed=1)
    two = made(checkpoint, tmp_path / "two", ["o_proj", "gate_proj", "up_proj"][: 1 if shape is V3 else 3], seed=2)
    prompts = [(some_tokens(20 + 7 * i, seed=i), (None, "one", "two")[i % 3]) for i in range(7)]

    def opened():
        llm = open_tiny(checkpoint, **options)
        llm.load_adapter("one", one)
        llm.load_adapter("two", two)
        return llm

    alone = opened()
    expected = [alone.generate(ids, GREEDY, adapter=adapter) for ids, adapter in prompts]
    plain = open_tiny(checkpoint, **options)  # where no adapter was ever loaded
    assert [e.logprobs for e in expected[::3]] == [plain.generate(ids, GREEDY).logprobs for ids, _ in prompts[::3]]
    together = opened()
    generations = [together.prepare(ids, GREEDY, adapter=adapter) for ids, adapter in prompts]
    for generation in generations:
        generation.start()
    while together.step():
        pass
    for generation, wanted in zip(generations, expected, strict=True):
        found = generation.ready()
        assert [t for chunk in found for t in chunk.token_ids] == list(wanted.token_ids)
        assert tuple(e for chunk in found for e in chunk.logprobs) == wanted.logprobs
    assert len({e.token_ids for e in (alone.generate(TOKENS, GREEDY, adapter=a) for a in (None, "one", "two"))}) == 3


@pytest.mark.parametrize("shape", [LLAMA, V3], ids=["llama", "v3"])
def test_chunks_change_no_bit(tmp_path, shape):
    checkpoint = frozen(tiny(shape)[1])
    folder = made(checkpoint, tmp_path / "one", ["_proj"])
    found = []
    for step in (512, 1, 2, 7, 64):
        llm = open_tiny(checkpoint, weights="q8")
        llm.load_adapter("one", folder)
        set_steps(llm, step=step)
        found.append(llm.logits(TOKENS, adapter="one"))
    assert all((logits == found[0]).all() for logits in found)


def test_pages_are_shared_within_an_adapter_only(tmp_path):
    checkpoint = frozen(tiny(LLAMA)[1])
    folder, other = (made(checkpoint, tmp_path / name, ["k_proj"], seed=i) for i, name in enumerate("ab"))
    prompt = some_tokens(200)
    llm = open_tiny(checkpoint)
    llm.load_adapter("a", folder)
    llm.load_adapter("b", other)
    fresh = {}
    for adapter in (None, "a", "b"):
        fresh[adapter] = llm.generate(prompt, GREEDY, adapter=adapter)
        assert fresh[adapter].stats.cached_tokens == 0
    for adapter in (None, "a", "b"):
        again = llm.generate(prompt, GREEDY, adapter=adapter)
        assert again.stats.cached_tokens == 192
        assert again.logprobs == fresh[adapter].logprobs
    llm.unload_adapter("a")
    llm.load_adapter("a", other)  # another one under the old name, and under its number
    swapped = llm.generate(prompt, GREEDY, adapter="a")
    assert swapped.stats.cached_tokens == 0
    assert swapped.logprobs == fresh["b"].logprobs


def test_experts_of_their_own_ranks_take_only_their_own_bytes(tmp_path):
    checkpoint = frozen(tiny(V3)[1])
    few = made(checkpoint, tmp_path / "few", [".mlp.experts.down_proj"], experts=[1, 5])
    all_of_them = made(checkpoint, tmp_path / "all", [".mlp.experts.down_proj"])
    sizes = {}
    for folder in (few, all_of_them):
        llm = open_tiny(checkpoint)
        before = llm.weight_bytes
        llm.load_adapter("one", folder)
        sizes[folder] = llm.weight_bytes - before
        merged = LLM(checkpoint, adapter=folder, weights="f32", cache="f32", threads=1, cache_tokens=1024)
        assert off(llm.logits(TOKENS, adapter="one"), merged.logits(TOKENS)) < 4e-3  # factors rounded to bfloat16
    experts = checkpoint.config.moe.n_routed_experts
    assert sizes[few] * experts == sizes[all_of_them] * 2


def test_single_experts_of_older_folders(tmp_path):
    checkpoint = frozen(tiny(V3)[1])
    layer = next(i for i in range(checkpoint.config.num_hidden_layers) if checkpoint.config.is_moe_layer(i))
    width, hidden = checkpoint.config.moe.moe_intermediate_size, checkpoint.config.hidden_size
    rng = np.random.default_rng(0)
    from safetensors.numpy import save_file

    tensors = {}
    for expert, part, rows, cols in ((0, "up_proj", width, hidden), (3, "down_proj", hidden, width)):
        key = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{part}.lora_"
        for side, shape in (("A", (2, cols)), ("B", (rows, 2))):
            values = rng.normal(0, 0.3, shape).astype(ml_dtypes.bfloat16).astype(np.float32)
            tensors[f"{key}{side}.weight"] = values
    folder = tmp_path / "old"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    llm = open_tiny(checkpoint)
    llm.load_adapter("old", folder)
    merged = LLM(checkpoint, adapter=folder, weights="f32", cache="f32", threads=1, cache_tokens=1024)
    assert off(merged.logits(TOKENS), llm.logits(TOKENS)) > 1e-3
    assert off(llm.logits(TOKENS, adapter="old"), merged.logits(TOKENS)) < 1e-4


def test_embeddings_take_the_adapter(tmp_path):
    checkpoint = frozen(tiny(LLAMA)[1])
    folder = made(checkpoint, tmp_path / "one", ["_proj"])
    llm = open_tiny(checkpoint)
    llm.load_adapter("one", folder)
    merged = LLM(checkpoint, adapter=folder, weights="f32", cache="f32", threads=1, cache_tokens=1024)
    expected = merged.embed([TOKENS])
    assert off(llm.embed([TOKENS], adapter="one"), expected) < 1e-2 < off(llm.embed([TOKENS]), expected)


def test_names_and_what_cannot_stand_beside_a_model_are_refused(tmp_path, monkeypatch):
    checkpoint = frozen(tiny(V3)[1])
    folder = made(checkpoint, tmp_path / "one", ["o_proj"])
    llm = open_tiny(checkpoint)
    with pytest.raises(RequestError, match=r"'one' is not loaded \(none is loaded\)"):
        llm.generate(TOKENS, adapter="one")
    llm.load_adapter("one", folder)
    assert llm.adapters == {"one": folder}
    with pytest.raises(RequestError, match=r"'two' is not loaded \('one'\)"):
        llm.logits(TOKENS, adapter="two")
    for name, said in (("one", "'one' is taken"), (llm.name, "is taken"), ("", "needs a name")):
        with pytest.raises(ConfigError, match=said):
            llm.load_adapter(name, folder)
    with pytest.raises(FileError, match=r"mlp\.gate: cannot be adapted beside the model; merge"):
        llm.load_adapter("router", made(checkpoint, tmp_path / "router", ["mlp.gate"]))
    with pytest.raises(FileError, match="is no matrix of this model"):
        llm.load_adapter("other", made(frozen(tiny(LLAMA)[1]), tmp_path / "other", ["k_proj"]))
    with pytest.raises(ConfigError, match="is merged into this model"):
        LLM(checkpoint, adapter=folder, threads=1, cache_tokens=256).load_adapter("again", folder)
    generation = llm.prepare(TOKENS, GREEDY, adapter="one")
    generation.start()
    with pytest.raises(RequestError, match="'one' is in use"):
        llm.unload_adapter("one")
    while llm.step():
        pass
    assert generation.ready()[-1].finish_reason == "length"
    llm.unload_adapter("one")
    monkeypatch.setattr("shoal.engine.llm.available_bytes", lambda: 10)
    with pytest.raises(ConfigError, match=r"'one' needs .* MB, 0.0 are available"):
        llm.load_adapter("one", folder)
    assert llm.adapters == {} and llm.weight_bytes == open_tiny(checkpoint).weight_bytes


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "holds a value that is no finite number"), (3.4e38, "that bfloat16 does not reach")]
)
def test_values_that_are_no_numbers_are_refused(tmp_path, value, said):
    checkpoint = frozen(tiny(LLAMA)[1])
    folder = made(checkpoint, tmp_path / "one", ["o_proj"])
    adapter = load_adapter(folder)
    check_adapter(adapter, checkpoint.config)
    part = next(iter(adapter.parts.values()))
    a = np.array(part.a)
    a[0, 0, 0] = value
    parts = {name: LowRank(a=a, b=part.b, scale=1.0) for name in list(adapter.parts)[:1]}
    save_adapter(Adapter(parts=parts, path=Path("made")), checkpoint.config, tmp_path / "bad")
    with pytest.raises(FileError, match=said):
        open_tiny(checkpoint).load_adapter("one", tmp_path / "bad")
