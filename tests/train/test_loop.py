"""The loop: it learns, resumes to the last bit, says what it does, and what it leaves behind others load."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.config import GQAConfig, ModelConfig
from shoal.cost.train_flops import train_flops
from shoal.errors import ConfigError, FileError, RunError
from shoal.formats.checkpoint import open_checkpoint
from shoal.model import load_model, random_model
from shoal.train import loop
from shoal.train.log import Log
from shoal.train.losses import LossSettings, TextBatch, language_loss
from shoal.train.optim import OptimiserSettings, make_optimisers
from shoal.train.recipe import CheckpointSettings, RouterSettings, SampleSettings, ScheduleSettings


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def weights(out) -> dict[str, torch.Tensor]:
    saved = loop.checkpoint.newest(out / "checkpoints", pytest.fail)
    return {**saved.tensors("model"), **saved.tensors("optimiser")}


def test_a_tiny_model_overfits_one_batch(recipe):
    model = random_model(recipe.model, 0)
    (optimiser,) = make_optimisers(model, OptimiserSettings(lr=2e-2, weight_decay=0.0))
    tokens_BT = torch.from_numpy(np.random.default_rng(0).integers(0, 257, (2, 17)))
    batch = TextBatch(tokens_BT[:, :-1], tokens_BT[:, 1:])
    for _ in range(150):
        losses = language_loss(model, batch, LossSettings())
        losses.total.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses.parts["next"] < 0.05
    assert losses.parts["mtp"] < 0.2


def test_a_run_learns_and_logs_every_step(recipe, run, tmp_path):
    recipe = replace(recipe, steps=40, samples=SampleSettings(prompts=("number",), every=40, max_tokens=8))
    outcome, listener = run(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert [record["step"] for record in listener.records] == list(range(1, 41))
    assert abs(lines[0]["loss"] - math.log(257)) < 0.1
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["val_loss"] == outcome.record["val_loss"] < 0.7 * lines[0]["loss"]
    assert {"mtp", "balance", "lr", "grad_norm", "tok_s", "utilisation", "eta_s", "max_vio"} <= lines[5].keys()
    assert lines[5]["router"].keys() == {"1", "2"}  # the layer with experts, and the MTP layer
    assert sum(lines[5]["router"]["1"]["load"]) == recipe.tokens_per_step * 2
    (sample,) = lines[-1]["samples"]
    assert sample["prompt"] == "number"
    assert isinstance(sample["text"], str)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_resumed_run_is_equal_to_the_last_bit(recipe, run, read_losses, tmp_path, optimiser):
    recipe = replace(recipe, optimiser=replace(recipe.optimiser, optimiser=optimiser))
    run(recipe, tmp_path / "whole")
    for until in (2, 3, 6):
        outcome, _ = run(recipe, tmp_path / "parts", until=until)
        assert outcome.step == until
    assert read_losses(tmp_path / "parts") == read_losses(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_a_compiled_run_takes_the_same_steps(recipe, run, read_losses, tmp_path):
    """With layers that are compiled, and made again in the backward pass."""
    recipe = replace(recipe, steps=3, activation_checkpointing=True)
    recipe = replace(recipe, model=replace(recipe.model, num_nextn_predict_layers=0))
    run(recipe, tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    run(replace(recipe, compile=True), tmp_path / "compiled")
    counters = torch._dynamo.utils.counters
    assert all("torch.compiler.disable" in reason for reason in counters["graph_break"])  # only where we said so
    assert counters["stats"]["unique_graphs"] >= 4  # both kinds of layer, around what is left out
    for (_, loss, norm), (_, expected, length) in zip(
        read_losses(tmp_path / "compiled"), read_losses(tmp_path / "plain"), strict=True
    ):
        assert (loss, norm) == (pytest.approx(expected, rel=1e-3), pytest.approx(length, rel=3e-2))


def test_steps_past_the_checkpoint_are_done_again_and_logged_once(recipe, run, read_losses, tmp_path):
    run(recipe, tmp_path / "run")
    whole = read_losses(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("step-*6"):
        path.rename(tmp_path / "gone")
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "lo')  # a line that a kill tore
    _, listener = run(recipe, tmp_path / "run")
    assert [record["step"] for record in listener.records] == [5, 6]
    assert "going on after step 4" in listener.notes
    assert read_losses(tmp_path / "run") == whole


def test_a_finished_run_does_nothing_more(recipe, run, read_losses, tmp_path):
    run(recipe, tmp_path / "run")
    before = read_losses(tmp_path / "run")
    outcome, listener = run(recipe, tmp_path / "run")
    assert (outcome.step, outcome.record, listener.records) == (6, None, [])
    assert outcome.model == tmp_path / "run" / "model"
    assert read_losses(tmp_path / "run") == before


def test_more_steps_than_the_recipe_make_it_longer(recipe, run, tmp_path):
    run(recipe, tmp_path / "run")
    outcome, listener = run(recipe, tmp_path / "run", until=8)
    assert outcome.step == 8
    assert "changed since step 6: steps from 6 to 8" in listener.notes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch": 8}, "batch: is 8, but the run in .* was begun with 4"),
        ({"seed": 1}, "seed: is 1, but"),
        ({"sequence_length": 8}, "sequence_length: is 8"),
    ],
)
def test_a_run_cannot_change_its_data_or_network(recipe, run, tmp_path, changes, problem):
    run(recipe, tmp_path / "run", until=2)
    said = (tmp_path / "run" / "recipe.json").read_bytes()
    with pytest.raises(ConfigError, match=problem):
        run(replace(recipe, **changes), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.json").read_bytes() == said
    model = replace(recipe.model, rms_norm_eps=1e-5)
    with pytest.raises(ConfigError, match=r"model\.rms_norm_eps: is 1e-05"):
        run(replace(recipe, model=model), tmp_path / "run")


def test_micro_batches_add_up(recipe, run, tmp_path):
    """Losses and gradients are those of the whole batch, up to the order of additions."""
    recipe = replace(recipe, precision="fp32", steps=3, losses=LossSettings(balance_weight=1.0))
    seen = []
    for size in (4, 2, 1):
        _, listener = run(replace(recipe, micro_batch=size), tmp_path / str(size))
        seen.append([[r["loss"], r["mtp"], r["balance"], r["grad_norm"]] for r in listener.records])
    np.testing.assert_allclose(seen[1], seen[0], rtol=2e-5)
    np.testing.assert_allclose(seen[2], seen[0], rtol=2e-5)


def test_recomputed_activations_change_nothing(recipe, run, read_losses, tmp_path):
    run(recipe, tmp_path / "kept")
    run(replace(recipe, activation_checkpointing=True), tmp_path / "again")
    assert read_losses(tmp_path / "again") == read_losses(tmp_path / "kept")


def test_bf16_stays_close_to_fp32(recipe, run, read_losses, tmp_path):
    for precision in ("fp32", "bf16"):
        run(replace(recipe, precision=precision), tmp_path / precision)
    full, half = (np.array(read_losses(tmp_path / name))[:, 1] for name in ("fp32", "bf16"))
    assert (full != half).any()
    np.testing.assert_allclose(half, full, rtol=1e-2)
    saved = loop.checkpoint.newest(tmp_path / "bf16" / "checkpoints", pytest.fail)
    assert {value.dtype for value in saved.tensors("model").values()} == {torch.float32}


def test_router_biases_move_until_they_rest(recipe, run, tmp_path):
    settings = RouterSettings(bias_speed=0.1, bias_until=0.5)
    biases = {}
    for until in (0, 3, 6):
        if until:
            run(replace(recipe, router=settings), tmp_path / "run", until=until)
            biases[until] = weights(tmp_path / "run")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (biases[3].abs() <= 0.3 + 1e-6).all()
    assert biases[3].any()
    assert torch.equal(biases[3], biases[6])


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_mtp_rests_at_first_and_costs_nothing(recipe, run, tmp_path):
    late = replace(recipe, losses=LossSettings(mtp_from=0.5))
    before = random_model(recipe.model, recipe.seed).state_dict()["model.layers.2.eh_proj.weight"]
    for name, until in (("one", (3, 6)), ("two", (6,))):
        for end in until:
            run(late, tmp_path / name, until=end)
            if end == 3:
                assert torch.equal(weights(tmp_path / name)["model.layers.2.eh_proj.weight"], before)
    assert not torch.equal(weights(tmp_path / "one")["model.layers.2.eh_proj.weight"], before)
    log = records(tmp_path / "one")
    assert ["mtp" in record for record in log] == [False] * 3 + [True] * 3
    with_mtp, without = (train_flops(recipe.model, recipe.sequence_length, mtp=on).model for on in (True, False))
    assert without < with_mtp == train_flops(recipe.model, recipe.sequence_length).model
    assert [r["flops"] / recipe.tokens_per_step for r in log] == pytest.approx([without] * 3 + [with_mtp] * 3)
    assert [r["loss"] for r in log] == [r["loss"] for r in records(tmp_path / "two")]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_update(recipe, run, read_losses, tmp_path, poison, monkeypatch):
    run(recipe, tmp_path / "run", until=3)
    before = weights(tmp_path / "run")
    real = loop.language_loss

    def poisoned(*args, **kwargs):
        losses = real(*args, **kwargs)
        return losses._replace(parts={**losses.parts, "next": losses.parts["next"] * poison})

    monkeypatch.setattr(loop, "language_loss", poisoned)
    with pytest.raises(RunError, match=r"step 4: the loss is not finite \(next (nan|inf), .*last checkpoint .* step 3"):
        run(recipe, tmp_path / "run")
    assert same(weights(tmp_path / "run"), before)
    assert len(read_losses(tmp_path / "run")) == 3


def test_a_gradient_that_is_no_number_stops_before_the_update(recipe, run, tmp_path, monkeypatch):
    run(recipe, tmp_path / "run", until=3)
    monkeypatch.setattr(loop.Process, "clip", lambda self, model, limit: torch.tensor(math.nan))
    with pytest.raises(RunError, match="step 4: the gradient is not finite"):
        run(recipe, tmp_path / "run")


def test_clipping_limits_the_gradient(recipe, tmp_path):
    model = random_model(recipe.model, 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    process = loop.Process("cpu")
    length = float(process.clip(model, 0.0))
    assert length == pytest.approx(math.sqrt(sum(p.numel() for p in model.parameters())))
    assert float(process.clip(model, 0.5)) == pytest.approx(length)
    assert float(process.clip(model, 0.5)) == pytest.approx(0.5, rel=1e-4)


def test_what_is_exported_loads_in_transformers_with_equal_logits(recipe, run, tmp_path):
    recipe = replace(recipe, export_dtype="float32")
    outcome, _ = run(recipe, tmp_path / "run")
    ours = load_model(open_checkpoint(outcome.model))
    trained = weights(tmp_path / "run")
    assert all(torch.equal(value, trained[name]) for name, value in ours.state_dict().items())
    theirs = AutoModelForCausalLM.from_pretrained(outcome.model, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(outcome.model)("number 7 follows")["input_ids"]
    assert open_checkpoint(outcome.model).load_tokenizer().encode("number 7 follows") == ids
    with torch.no_grad():
        ours_V, theirs_V = ours(torch.tensor([ids]))[0, -1], theirs(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(ours_V, theirs_V, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step(recipe, run, read_losses, tmp_path, number):
    recipe = replace(recipe, checkpoint=CheckpointSettings(every=0))
    run(recipe, tmp_path / "whole")
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]

    class Interrupter:
        def note(self, text):
            pass

        def step(self, record, until):
            if record["step"] == 2:
                os.kill(os.getpid(), number)

    outcome = loop.train(recipe, tmp_path / "run", Interrupter())
    assert (outcome.step, outcome.signal, outcome.model) == (3, number, None)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    run(recipe, tmp_path / "run")
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_touched_files_save_and_stop(recipe, run, tmp_path):
    recipe = replace(recipe, checkpoint=CheckpointSettings(every=0, keep=9))
    out = tmp_path / "run"

    class Toucher:
        def note(self, text):
            pass

        def step(self, record, until):
            if record["step"] in (1, 4):
                (out / {1: "SAVE", 4: "STOP"}[record["step"]]).touch()

    outcome = loop.train(recipe, out, Toucher())
    assert (outcome.step, outcome.signal, outcome.model) == (5, None, None)
    assert loop.checkpoint.steps_in(out / "checkpoints") == [2, 5]
    assert not (out / "SAVE").exists()
    assert not (out / "STOP").exists()


def test_files_touched_before_the_run_began_mean_another_run(recipe, run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    assert run(recipe, tmp_path / "run", until=3)[0].step == 3


def test_a_dense_llama_trains_too(recipe, run, tmp_path):
    gqa = GQAConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    model = ModelConfig(
        model_type="llama", vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, attention=gqa,
        max_position_embeddings=64, tie_word_embeddings=True, eos_token_id=(256,),
    )  # fmt: skip
    outcome, listener = run(replace(recipe, model=model), tmp_path / "run")
    assert listener.records[-1]["loss"] < listener.records[0]["loss"]
    assert not listener.records[-1].keys() & {"router", "mtp", "balance", "max_vio"}
    assert open_checkpoint(outcome.model).config.model_type == "llama"


def test_a_second_run_on_the_folder_is_refused(recipe, run, tmp_path):
    failures = []

    class Second:
        def note(self, text):
            pass

        def step(self, record, until):
            if record["step"] == 1:
                with pytest.raises(FileError) as caught:
                    loop.train(recipe, tmp_path / "run", self)
                failures.append(str(caught.value))

    loop.train(recipe, tmp_path / "run", Second())
    assert failures == [f"{tmp_path / 'run'}: another run is at work here (process {os.getpid()})"]
    run(recipe, tmp_path / "run")


def test_runs_in_a_thread_where_signals_cannot_be_taken(recipe, run, tmp_path):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(run(recipe, tmp_path / "run", until=1)[0].step))
    thread.start()
    thread.join()
    assert seen == [1]


def test_a_line_that_is_no_record_is_named_by_its_number(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n{"other": 1}\n')
    with pytest.raises(FileError, match="line 2 is no record"):
        Log(tmp_path / "log.jsonl", 5)


def test_never_takes_a_folder_of_somebody_else(recipe, run, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match=r"model: is here without a recipe\.json"):
        run(recipe, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "model"]


def test_data_of_another_tokenizer_is_refused(recipe, run, data, tmp_path):
    tokenizer = (data / "tokenizer" / "tokenizer.json").read_bytes()
    other = tmp_path / "data"
    (other / "tokenizer").mkdir(parents=True)
    (other / "tokenizer" / "tokenizer.json").write_bytes(tokenizer + b"\n")
    (other / "tokens").symlink_to(data / "tokens")
    recipe = replace(recipe, data=replace(recipe.data, folder=str(other)))
    with pytest.raises(FileError, match="tokenizer_digest"):
        run(recipe, tmp_path / "run")


def test_a_model_that_does_not_fit_into_memory_is_refused_with_the_numbers(recipe, run, tmp_path, monkeypatch):
    values = sum(p.numel() for p in random_model(recipe.model, 0).parameters())  # and 4 selection biases a router
    monkeypatch.setattr("shoal.train.process.available_bytes", lambda: 16 * values)
    with pytest.raises(ConfigError, match=r"model: takes at least 0\.00 GB of memory to train, 0\.00 GB are available"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("shoal.train.process.available_bytes", lambda: 16 * (values + 8))
    run(recipe, tmp_path / "run", until=1)
    with pytest.raises(ConfigError, match="takes at least"):
        run(replace(recipe, model=replace(recipe.model, intermediate_size=33)), tmp_path / "wider")


def test_a_recipe_without_data_says_so(recipe, run, tmp_path):
    recipe = replace(recipe, data=replace(recipe.data, folder=None))
    with pytest.raises(ConfigError, match=r"data\.folder: is needed"):
        run(recipe, tmp_path / "run")


def test_tensorboard_reads_the_log(recipe, run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(replace(recipe, tensorboard=True), tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 7))
    assert "router/1/max_vio" in events.Tags()["scalars"]


@pytest.mark.parametrize("kind", ["wsd", "cosine", "constant"])
def test_learning_rates(recipe, run, tmp_path, kind):
    schedule = ScheduleSettings(kind=kind, warmup=2, decay=0.5, floor=0.1)
    _, listener = run(replace(recipe, schedule=schedule), tmp_path / "run")
    rates = [record["lr"] / recipe.optimiser.lr for record in listener.records]
    assert rates[:2] == [0.5, 1.0]
    if kind == "constant":
        assert rates[2:] == [1.0] * 4
    else:
        assert rates[2:] == sorted(rates[2:], reverse=True)
        assert 0.1 < rates[-1] < 0.4
        assert (rates[2] == 1.0) == (kind == "wsd")
