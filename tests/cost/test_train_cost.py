"""Hours and dollars: the published run, recomputed; and what a log says beside a prediction."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.config import GQAConfig, ModelConfig
from shoal.cost.machines import find_machine, machines
from shoal.cost.train_cost import Phase, hours_for, parse_phase, phase_cost, read_actual
from shoal.errors import ConfigError, FileError
from shoal.formats.hf_config import read_config

V3 = Path(__file__).parents[2] / "recipes" / "deepseek-v3" / "config.json"


def test_deepseek_v3_as_published():
    """2.664 M H800-hours for 14.8 T tokens, 2.788 M in all, $2 an hour (arXiv 2412.19437, table 1).

    The utilisation is the one DeepSeek states for this training (arXiv 2505.09343, table 4); lengthening the context is
    1000 steps of 1920 sequences of 32 K and 1000 of 480 of 128 K (§4.3). The 5 000 hours of post-training are not ours
    to count.
    """
    config, h800 = read_config(V3).model, find_machine("h800")
    main = phase_cost(config, Phase(tokens=14.8e12, sequence_length=4096), h800)
    longer = [
        phase_cost(config, Phase(tokens=1000 * rows * length, sequence_length=length), h800)
        for rows, length in ((1920, 32768), (480, 131072))
    ]
    hours, dollars = (sum(getattr(cost, name) for cost in (main, *longer)) for name in ("hours", "dollars"))
    assert main.hours == pytest.approx(2.664e6, rel=0.05)
    assert hours == pytest.approx(2.788e6, rel=0.05)
    assert dollars == pytest.approx(5.576e6, rel=0.05)
    # DeepSeek counts 250 G operations a token (arXiv 2505.09343, table 2).
    assert main.per_token.model == pytest.approx(250e9, rel=0.05)


def test_what_is_stated_counts():
    config = ModelConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        attention=GQAConfig(num_attention_heads=2, num_key_value_heads=2, head_dim=16),
    )
    phase, machine = Phase(tokens=1e9, sequence_length=128), find_machine("h100")
    plain = phase_cost(config, phase, machine)
    assert plain.flops == plain.per_token.model * 1e9
    assert plain.hours == pytest.approx(plain.flops / (989.4e12 * machine.utilisation) / 3600)
    assert plain.dollars == pytest.approx(plain.hours * machine.dollars_per_hour)
    half = phase_cost(config, phase, machine, utilisation=machine.utilisation / 2, dollars_per_hour=1.0)
    assert half.hours == pytest.approx(2 * plain.hours) and half.dollars == half.hours
    assert phase_cost(config, phase, machine, checkpointing=True).hours > plain.hours
    for wrong in ({"utilisation": 0.0}, {"utilisation": 1.1}, {"dollars_per_hour": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            phase_cost(config, phase, machine, **wrong)


@pytest.mark.parametrize(
    ("text", "tokens", "length"),
    [("14.8T@4096", 14.8e12, 4096), ("30M", 30e6, 512), ("3e7", 3e7, 512), ("1_000k@2_048", 1e6, 2048)],
)
def test_tokens_are_read_as_people_write_them(text, tokens, length):
    assert parse_phase(text, 512) == Phase(tokens=pytest.approx(tokens), sequence_length=length)


@pytest.mark.parametrize("text", ["", "many", "-3M", "0", "3M@0", "3M@", "1e30", "nan"])
def test_other_tokens_are_refused(text):
    with pytest.raises(ConfigError, match="tokens"):
        parse_phase(text, 512)


def test_every_number_of_a_machine_has_its_source():
    known = machines()
    assert {"h800", "h100", "a100"} <= known.keys()
    for machine in known.values():
        for name in ("bf16_tflops", "memory_gb", "dollars_per_hour", "utilisation"):
            assert getattr(machine, name) > 0 and len(machine.sources[name]) > 3, (machine.name, name)
        assert (machine.fp8_tflops is None) == ("fp8_tflops" not in machine.sources)
    with pytest.raises(ConfigError, match="did you mean h100"):
        find_machine("h10")


def log(folder: Path, *lines: str) -> Path:
    (folder / "log.jsonl").write_text("".join(lines))
    return folder


def test_a_log_is_read_while_it_grows(tmp_path):
    records = [
        {"step": n, "loss": 4.0 - n, "tok_s": rate, "seconds": 100 / rate} | ({"val_loss": 3.5} if n == 2 else {})
        for n, rate in ((1, 10.0), (2, 50.0), (3, 100.0))
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    actual = read_actual(log(tmp_path, *lines, '{"step": 4, "lo'), 100)
    assert (actual.steps, actual.tokens, actual.tok_s) == (3, 300.0, 50.0)
    assert (actual.seconds, actual.loss, actual.val_loss) == (13.0, 1.0, 3.5)
    assert actual.flop_s is None
    lines = [json.dumps({**record, "flops": 10 * record["step"]}) + "\n" for record in records]
    assert read_actual(log(tmp_path, *lines), 100).flop_s == 10.0  # of 1, 10, 30


def test_hours_so_far_are_those_of_the_phases_so_far():
    machine = find_machine("h100")
    config = read_config(V3).model
    early, late = (
        phase_cost(config, Phase(tokens=tokens, sequence_length=4096, mtp=mtp), machine)
        for tokens, mtp in ((3e9, False), (1e9, True))
    )
    assert early.hours / 3 < 0.99 * late.hours
    assert hours_for([early, late], 1.5e9) == pytest.approx(early.hours / 2)
    assert hours_for([early, late], 3.5e9) == pytest.approx(early.hours + late.hours / 2)
    assert hours_for([early, late], 6e9) == pytest.approx(early.hours + 3 * late.hours)


@pytest.mark.parametrize("line", ["no json\n", '{"step": 1}\n', "[1]\n", '{"step": 1, "loss": 1, "tok_s": 0}\n'])
def test_what_is_no_log_is_named(tmp_path, line):
    with pytest.raises(FileError, match="line 1"):
        read_actual(log(tmp_path, line), 100)
    with pytest.raises(FileError, match="no step"):
        read_actual(log(tmp_path, '{"step": 1'), 100)
    with pytest.raises(FileError, match="cannot be read"):
        read_actual(tmp_path / "none", 100)
