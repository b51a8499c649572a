"""Teachers and students: divergences against torch's own, kept logits against the engine, refusals, whole runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from tests.tune.conftest import TALKS  # noqa: E402

from shoal.engine import LLM  # noqa: E402
from shoal.errors import ConfigError, FileError  # noqa: E402
from shoal.formats.checkpoint import open_checkpoint  # noqa: E402
from shoal.train.batches import IGNORE  # noqa: E402
from shoal.train.log import read_log  # noqa: E402
from shoal.tune import distil_losses  # noqa: E402
from shoal.tune.distil import DistilSettings, distil, with_teacher  # noqa: E402
from shoal.tune.distil_losses import kept_divergence, reverse_divergence  # noqa: E402
from shoal.tune.examples import read_examples  # noqa: E402
from shoal.tune.recipe import TuneSettings  # noqa: E402
from shoal.tune.sft import Data, default_recipe, settle  # noqa: E402
from shoal.tune.teacher import open_logits, require_same_tokens, write_answers, write_logits  # noqa: E402


class Quiet:
    def note(self, text):
        pass

    def step(self, record, until):
        pass


@pytest.fixture
def states():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 8, generator=generator).requires_grad_()
    head = torch.randn(30, 8, generator=generator).requires_grad_()
    return hidden, head, torch.randn(50, 30, generator=generator).log_softmax(-1)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs, retain_graph=True)


def test_divergences_are_torchs_own_whatever_the_chunks(states, monkeypatch):
    hidden, head, teacher = states
    student = F.log_softmax(hidden @ head.T, -1)
    order = teacher.argsort(-1, descending=True)
    every = teacher.gather(1, order)
    wanted = {
        "forward": F.kl_div(student, teacher, log_target=True, reduction="sum"),
        "reverse": F.kl_div(teacher, student, log_target=True, reduction="sum"),
    }
    monkeypatch.setattr(distil_losses, "CHUNK_LOGITS", 16 * 30)  # four chunks
    found = {
        "forward": kept_divergence(hidden, head, order, every),
        "reverse": reverse_divergence(hidden, head, teacher),
    }
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(found[name], hidden, head), gradients(wanted[name], hidden, head), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_with_few_tokens_kept_agreement_is_still_the_minimum(states):
    hidden, head, _ = states
    own = F.log_softmax(hidden @ head.T, -1).detach()
    values, ids = own.topk(3)
    loss = kept_divergence(hidden, head, ids, values)
    assert loss.item() == pytest.approx(0, abs=1e-4)
    assert all(g.abs().max() < 1e-4 for g in gradients(loss, hidden, head))
    other = kept_divergence(hidden.detach() * 1.3, head, ids, values)
    assert other.item() > 0.1


def make(folder, data, mode, steps=4, **settings):
    checkpoint = open_checkpoint(folder)
    plain = default_recipe(checkpoint, TuneSettings(model=str(folder), data=str(data), method="full"))
    recipe = with_teacher(plain, DistilSettings(teacher="teacher", mode=mode, **settings))
    recipe = replace(
        recipe, precision="fp32", sequence_length=64, batch=2, micro_batch=1,
        optimiser=replace(recipe.optimiser, lr=3e-3),
    )  # fmt: skip
    found = Data(recipe, checkpoint)
    return settle(recipe, found, steps=steps, epochs=1), found


@pytest.fixture
def teacher(small_llama):
    return LLM(small_llama, threads=1, weights="f32", cache="f32", cache_tokens=256)


@pytest.fixture
def student(small_llama, tmp_path):
    """The teacher with its last layers' weights stirred."""
    from shoal.formats.hf_save import save_folder
    from shoal.model import as_checkpoint, load_model

    checkpoint = open_checkpoint(small_llama)
    model = load_model(checkpoint)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    save_folder(as_checkpoint(model, like=checkpoint), tmp_path / "student")
    return tmp_path / "student"


def test_kept_logits_are_the_engines_and_know_their_data(small_llama, lines, tmp_path, teacher):
    _, data = make(small_llama, lines(*TALKS), "logits")
    write_logits(teacher, data.rows, tmp_path / "logits", top=5, key="k")
    kept = open_logits(tmp_path / "logits", data.rows, top=5, key="k")
    ids, logprobs = kept.row(1)
    row = data.rows.read([1])
    whole = torch.from_numpy(row.tokens_BT), torch.from_numpy(row.documents_BT)
    from shoal.model import load_model

    with torch.no_grad():
        model = load_model(open_checkpoint(small_llama))
        expected = model(whole[0], documents_BT=whole[1]).log_softmax(-1)[torch.from_numpy(row.targets_BT) != IGNORE]
    values, order = expected.topk(5)
    assert np.allclose(logprobs, values.numpy(), atol=5e-3)
    assert (ids == order.numpy()).mean() > 0.95
    for change in ({"top": 4}, {"key": "other"}):
        with pytest.raises(FileError, match="was written for other data"):
            open_logits(tmp_path / "logits", data.rows, **{"top": 5, "key": "k", **change})


@pytest.mark.parametrize("mode", ["logits", "on-policy"])
def test_a_student_comes_nearer_and_an_interrupted_run_ends_the_same(student, lines, tmp_path, teacher, mode):
    settings = {"given": 0.0} if mode == "logits" else {"max_tokens": 6, "temperature": 1.0}
    recipe, data = make(student, lines(*TALKS), mode, steps=8, **settings)
    outcome = distil(recipe, tmp_path / "whole", data, teacher, Quiet())
    log = read_log(tmp_path / "whole" / "log.jsonl")
    assert log[-1]["divergence"] < 0.8 * log[0]["divergence"]
    assert outcome.model == tmp_path / "whole" / "model"
    if mode == "logits":
        return
    from shoal.tune import distil as module

    (tmp_path / "parts").mkdir()
    run = module.OnPolicyRun(recipe, tmp_path / "parts", data, teacher, Quiet())
    run.go(3)
    run.close()
    again = module.OnPolicyRun(recipe, tmp_path / "parts", data, teacher, Quiet())
    assert again.step == 3
    again.go(8)
    again.close()
    assert [r["loss"] for r in read_log(tmp_path / "parts" / "log.jsonl")] == [r["loss"] for r in log]


@pytest.mark.parametrize("mode", ["logits", "on-policy"])
def test_a_student_whose_embedding_is_filled_up_further_learns_the_same(student, lines, tmp_path, teacher, mode):
    """Qwen2.5's sizes, for one, share a tokenizer and have 151936 or 152064 rows. The spare rows here are loud."""
    from shoal.formats.hf_save import save_folder
    from shoal.model import as_checkpoint, empty_model, load_model

    checkpoint = open_checkpoint(student)
    wide = empty_model(replace(checkpoint.config, vocab_size=checkpoint.config.vocab_size + 64))
    with torch.no_grad():
        for name, value in load_model(checkpoint).state_dict().items():
            target = wide.state_dict()[name]
            target.copy_(torch.cat((value, 9 * value[:64])) if "embed_tokens" in name else value)
    save_folder(as_checkpoint(wide, like=checkpoint), tmp_path / "wide")
    first = []
    for folder in (student, tmp_path / "wide"):
        recipe, data = make(folder, lines(*TALKS), mode, steps=2, given=0.0, max_tokens=6)
        distil(recipe, tmp_path / f"run-{folder.name}", data, teacher, Quiet())
        first.append(read_log(tmp_path / f"run-{folder.name}" / "log.jsonl")[0]["divergence"])
    assert first[1] == pytest.approx(first[0], rel=1e-4)


def test_a_dry_run_tells_the_steps_that_it_would_take(small_llama, lines, capsys):
    from shoal.cli.distil import run

    assert run("nobody", str(small_llama), lines(*TALKS), ["batch=2", "micro_batch=1"], dry_run=True, epochs=4.0) == 0
    assert "steps=6\n" in capsys.readouterr().out  # four times three rows, two a step


def test_the_largest_seed_is_a_seed(small_llama, lines, tmp_path, teacher):
    recipe, data = make(small_llama, lines(*TALKS), "on-policy", steps=1, max_tokens=2, temperature=1.0)
    assert distil(replace(recipe, seed=(1 << 63) - 1), tmp_path / "run", data, teacher, Quiet()).step == 1


def test_a_teacher_whose_embedding_is_filled_up_further_keeps_no_spare_tokens(small_llama, lines, tmp_path):
    class Loud:
        def logits(self, tokens):
            return np.tile(np.arange(49152 + 64, dtype=np.float32), (len(tokens), 1))

    _, data = make(small_llama, lines(*TALKS), "logits")
    write_logits(Loud(), data.rows, tmp_path / "logits", top=3, among=49152, key="k")
    ids, logprobs = open_logits(tmp_path / "logits", data.rows, top=3, key="k").row(0)
    assert (ids == [49151, 49150, 49149]).all()
    assert np.exp(logprobs.astype(float)).sum(1) == pytest.approx(0.95, abs=0.01)


def test_another_tokenizer_is_refused_by_name(smollm, tmp_path, small_llama):
    from shoal.formats.tokenizer import load_tokenizer_json

    ours = smollm[0]
    require_same_tokens(ours, load_tokenizer_json(small_llama))
    other = ours.source_json()
    vocab = other["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"teacher: token 30\d is .* distil on sequences"):
        require_same_tokens(ours, load_tokenizer_json(tmp_path))
    split = {**ours.source_json(), "normalizer": {"type": "Lowercase"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(split))
    with pytest.raises(ConfigError, match="splits text otherwise"):
        require_same_tokens(ours, load_tokenizer_json(tmp_path))


class Parrot:
    """A teacher that answers with the words it was asked for, and runs on at one of them."""

    def chat(self, messages, params, tools=None):
        from types import SimpleNamespace

        words = messages[-1]["content"].split()[1:]
        self.asked = getattr(self, "asked", 0) + 1
        return SimpleNamespace(text=" ".join(words), finish_reason="length" if "z" in words else "stop")


def test_answers_are_verified_and_a_started_file_is_gone_on_with(lines, tmp_path):
    examples = read_examples(lines(*TALKS))
    path = tmp_path / "answers.jsonl"
    teacher = Parrot()
    counts = write_answers(teacher, examples, path, verify=lambda example, text: text.startswith("a"))
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert counts == (16, 3)
    assert [r["messages"][-1]["content"] for r in records if r["accepted"]] == ["a w", "a x", "a y"]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    teacher = Parrot()
    assert write_answers(teacher, examples, path, verify=lambda example, text: text.startswith("a")) == (16, 3)
    assert path.read_bytes() == whole
    assert 0 < teacher.asked < 16
    for others in (examples[1:], examples[:3]):  # other questions, or fewer
        with pytest.raises(FileError, match="answers another example"):
            write_answers(Parrot(), others, path)
    assert path.read_bytes() == whole
