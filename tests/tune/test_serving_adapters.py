"""Adapters that were trained here, in the engine and the server: merged as the weights are packed, and beside them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from shoal.engine import LLM  # noqa: E402
from shoal.formats.adapter import load_adapter, merge, save_adapter  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.formats.convert import convert  # noqa: E402
from shoal.model import load_model  # noqa: E402
from shoal.tune.adapters import as_adapter, attach  # noqa: E402

IDS = [5, 700, 41, 9, 33000, 2]
OPTIONS = {"threads": 1, "weights": "f32", "cache": "f32", "cache_tokens": 256}


@pytest.fixture
def adapter(small_llama, tmp_path):
    model = load_model(open_checkpoint(small_llama))
    factors = attach(model, {"model.layers.1.self_attn.o_proj": (2,), "model.layers.1.mlp.up_proj": (1,)})
    with torch.no_grad():
        for one in factors.values():
            one.b.normal_(generator=torch.Generator().manual_seed(0))
    save_adapter(as_adapter(factors), model.config, tmp_path / "adapter")
    return tmp_path / "adapter"


def expected(folder, adapter):
    with torch.no_grad():
        return load_model(merge(open_checkpoint(folder), load_adapter(adapter)))(torch.tensor([IDS]))[0].numpy()


def test_the_engine_runs_a_model_with_its_adapter(small_llama, adapter):
    wanted = expected(small_llama, adapter)
    assert abs(LLM(small_llama, adapter=adapter, **OPTIONS).logits(IDS) - wanted).max() < 1e-4 * abs(wanted).max()


def test_side_by_side_it_takes_the_bytes_of_its_factors(small_llama, adapter):
    llm = LLM(small_llama, **OPTIONS)
    before, size = llm.logits(IDS), llm.weight_bytes
    llm.load_adapter("tuned", adapter)
    # Factors are held in bfloat16.
    assert abs(llm.logits(IDS, adapter="tuned") - expected(small_llama, adapter)).max() < 4e-3 * abs(before).max()
    assert abs(before - llm.logits(IDS, adapter="tuned")).max() > 0.01
    assert (llm.logits(IDS) == before).all()
    assert llm.weight_bytes - size == 2 * (2 * (32 + 32) + 1 * (32 + 48))


def test_convert_merges(small_llama, adapter, tmp_path):
    convert(small_llama, tmp_path / "merged", adapter=adapter)
    with torch.no_grad():
        found = load_model(open_checkpoint(tmp_path / "merged"))(torch.tensor([IDS]))[0].numpy()
    assert abs(found - expected(small_llama, adapter)).max() < 1e-5


def test_a_server_answers_by_the_adapters_name(small_llama, adapter):
    from starlette.testclient import TestClient

    from shoal.engine import SamplingParams
    from shoal.server.app import Policy, create_app
    from shoal.server.service import Service
    from shoal.server.worker import EngineWorker

    llm = LLM(small_llama, **OPTIONS)
    llm.load_adapter("tuned", adapter)
    service = Service(name="base", worker=EngineWorker(lambda: llm), adapters=("tuned",))
    with TestClient(create_app(service, Policy(hosts=None))) as client:
        cards = client.get("/v1/models").json()["data"]
        assert [(card["id"], card.get("parent"), card["root"]) for card in cards] == [
            ("base", None, "base"), ("tuned", "base", "tuned"),
        ]  # fmt: skip
        while client.get("/health").status_code == 503:
            pass
        body = {"prompt": IDS, "max_tokens": 8, "temperature": 0}
        answers = {}
        for name in ("base", "tuned"):
            reply = client.post("/v1/completions", json={**body, "model": name}).json()
            assert reply["model"] == name
            answers[name] = reply["choices"][0]["text"]
            vector = client.post("/v1/embeddings", json={"input": IDS, "model": name}).json()["data"][0]["embedding"]
            assert abs(vector - llm.embed([IDS], adapter=None if name == "base" else name)[0]).max() < 1e-6
        unknown = client.post("/v1/completions", json={**body, "model": "other"})
        assert unknown.status_code == 404
        assert "'base' and 'tuned' are" in unknown.json()["error"]["message"]
    alone = LLM(small_llama, adapter=adapter, **OPTIONS).generate(IDS, SamplingParams(max_tokens=8, temperature=0.0))
    assert answers["tuned"] == alone.text != answers["base"]
