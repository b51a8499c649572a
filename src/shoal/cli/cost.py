"""`shoal cost`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from shoal.cli.console import human_bytes, human_count, note, print_pairs, print_table, write_json
from shoal.errors import ConfigError

if TYPE_CHECKING:
    from shoal.config import ModelConfig
    from shoal.cost.machines import Machine
    from shoal.cost.train_cost import Actual, Phase, PhaseCost


app = typer.Typer(
    help="Count what training takes, before it starts: operations, memory, time and dollars.",
    add_completion=False,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def cost() -> None:
    """Count what training takes, before it starts: operations, memory, time and dollars."""


class Plan(NamedTuple):
    """What a recipe or a config.json says about a run; the settings of a bare config.json are `shoal train`'s own."""

    config: ModelConfig
    tokens: float | None
    sequence_length: int
    tokens_per_step: int
    tokens_at_once: int
    optimiser: str
    bf16: bool
    checkpointing: bool
    mtp_from: float  # share of the tokens before which the MTP depths rest


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe (as for shoal train), a model folder or a config.json.")],
    settings: Annotated[list[str] | None, typer.Argument(help="key=value … changes the recipe.")] = None,
    tokens: Annotated[
        list[str] | None,
        typer.Option(metavar="N[@LENGTH]", help="Tokens, as in 30M or 14.8T@4096; may be given several times."),
    ] = None,
    machine: Annotated[str, typer.Option(help="A machine of the list; ? shows it.")] = "zen4-2",
    devices: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    utilisation: Annotated[
        float | None, typer.Option(help="Share of the bf16 peak that training reaches; the machine's by default.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Dollars an hour of one; the machine's by default.")] = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="A run's folder: what it really took, beside the prediction.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Count what training takes, before it starts: operations, memory, time and dollars.

    Everything follows from the model's configuration, the peak of the machine and the share of it that training
    reaches. Both numbers come from a list with a source for each; flags put others in their place.

    [bold]Examples[/bold]
      shoal cost train recipes/code
      shoal cost train recipes/code --machine h100 --utilisation 0.3 batch=64
      shoal cost train ./DeepSeek-V3 --tokens 14.8T@4096 --machine h800 --devices 2048
      shoal cost train recipes/code --run ./run-code
    """
    from shoal.cost.machines import find_machine
    from shoal.cost.train_cost import parse_phase, phase_cost, read_actual

    if machine == "?":
        _list_machines(as_json=as_json)
        return
    plan = _plan(recipe, settings or [])
    phases = [parse_phase(text, plan.sequence_length) for text in tokens or []]
    phases = phases or _own_phase(plan)
    used = find_machine(machine)
    costs = [
        phase_cost(
            plan.config, phase, used, utilisation=utilisation, dollars_per_hour=price,
            checkpointing=plan.checkpointing,
        )
        for phase in phases
    ]  # fmt: skip
    actual = read_actual(run_folder, plan.tokens_per_step) if run_folder is not None else None
    facts = _as_data(plan, used, devices, used.utilisation if utilisation is None else utilisation, costs, actual)
    if as_json:
        write_json(facts)
    else:
        _show(facts, used, given=(utilisation is not None, price is not None))


def _plan(name: str, settings: list[str]) -> Plan:
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.suffix == ".json" and file.is_file():
        from shoal.formats.hf_config import read_config

        if settings:
            raise ConfigError(settings[0], "changes recipes; a config.json has no such settings")
        config = read_config(file).model
        length = min(4096, config.max_position_embeddings)
        return Plan(config, None, length, length, length, "adamw", True, False, 0.0)
    return _recipe_plan(name, settings)


def _recipe_plan(name: str, settings: list[str]) -> Plan:
    try:
        from shoal.train.find import find_recipe
        from shoal.train.overrides import override
    except ImportError as error:
        from shoal.errors import MissingExtraError

        raise MissingExtraError("train", "reading a recipe") from error
    recipe = override(find_recipe(name).recipe, settings)
    return Plan(
        config=recipe.model,
        tokens=float(recipe.tokens),
        sequence_length=recipe.sequence_length,
        tokens_per_step=recipe.tokens_per_step,
        tokens_at_once=recipe.micro_batch * recipe.sequence_length,
        optimiser=recipe.optimiser.optimiser,
        bf16=recipe.precision == "bf16",
        checkpointing=recipe.activation_checkpointing,
        mtp_from=recipe.losses.mtp_from if recipe.losses.mtp_weight else 1.0,
    )


def _own_phase(plan: Plan) -> list[Phase]:
    from shoal.cost.train_cost import Phase

    if plan.tokens is None:
        raise ConfigError("tokens", "a config.json does not say how many; give --tokens, such as 14.8T@4096")
    early = plan.tokens * plan.mtp_from if plan.config.num_nextn_predict_layers else 0.0
    parts = ((early, False), (plan.tokens - early, True))
    return [Phase(tokens=tokens, sequence_length=plan.sequence_length, mtp=mtp) for tokens, mtp in parts if tokens]


def _as_data(
    plan: Plan, machine: Machine, devices: int, utilisation: float, costs: list[PhaseCost], actual: Actual | None
) -> dict[str, Any]:
    """Everything that is shown, as plain data."""
    from dataclasses import asdict

    from shoal.cost.train_cost import hours_for
    from shoal.cost.train_memory import activation_bytes, state_bytes
    from shoal.formats.layout import count_active_params, count_params

    hours = sum(cost.hours for cost in costs)
    activations = activation_bytes(plan.config, tokens=plan.tokens_at_once, checkpointing=plan.checkpointing)
    tokens_per_second = sum(cost.phase.tokens for cost in costs) / (hours * 3600) * devices
    facts: dict[str, Any] = {
        "machine": asdict(machine),
        "devices": devices,
        "utilisation": utilisation,
        "params": count_params(plan.config, mtp=True),
        "active_params": count_active_params(plan.config),
        "phases": [
            {
                **asdict(cost.phase),
                "flops_per_token": {**cost.per_token.forward, "backward": cost.per_token.backward}
                | ({"recompute": cost.per_token.recompute} if cost.per_token.recompute else {}),
                "total_flops_per_token": cost.per_token.hardware,
                "flops": cost.flops,
                "device_hours": cost.hours,
                "dollars": cost.dollars,
            }
            for cost in costs
        ],
        "flops": sum(cost.flops for cost in costs),
        "device_hours": hours,
        "days": hours / devices / 24,
        "dollars": sum(cost.dollars for cost in costs),
        "tokens_per_second": tokens_per_second,
        "state_bytes": state_bytes(plan.config, optimiser=plan.optimiser, bf16=plan.bf16),
        "tokens_at_once": plan.tokens_at_once,
        "activation_bytes": activations,
    }
    if actual is not None:
        flops = sum(cost.per_token.model * cost.phase.tokens for cost in costs) / sum(c.phase.tokens for c in costs)
        reached = actual.tok_s * flops if actual.flop_s is None else actual.flop_s
        predicted = hours_for(costs, actual.tokens) * 3600 / devices
        facts["actual"] = asdict(actual) | {
            "utilisation": reached / (machine.bf16_tflops * 1e12 * devices),
            "predicted_seconds": predicted,
            "predicted_tok_s": actual.tokens / predicted,
        }
    return facts


def _show(facts: dict[str, Any], machine: Machine, *, given: tuple[bool, bool]) -> None:
    rows = [
        {
            "tokens": human_count(phase["tokens"]),
            "length": str(phase["sequence_length"]),
            "flop a token": human_count(phase["total_flops_per_token"]),
            "device hours": f"{phase['device_hours']:,.1f}",
            "dollars": f"{phase['dollars']:,.2f}",
        }
        for phase in facts["phases"]
    ]
    print_table(rows, ("tokens", "length", "flop a token", "device hours", "dollars"))
    print()
    parts = facts["phases"][0]["flops_per_token"]
    memory = {**facts["state_bytes"], "activations": sum(facts["activation_bytes"].values())}
    pairs = {
        "parameters": f"{human_count(facts['params'])}, {human_count(facts['active_params'])} used per token",
        "a token takes": ", ".join(f"{name} {human_count(count)}" for name, count in parts.items()),
        "in all": f"{facts['flops']:.3g} FLOP, {facts['device_hours']:,.1f} hours of {machine.title}, "
        f"{facts['days']:,.2f} days on {facts['devices']}, ${facts['dollars']:,.2f}",
        "speed": f"{facts['tokens_per_second']:,.0f} tokens/s",
        "memory": ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.items())
        + f" ({facts['tokens_at_once']} tokens at once)",
        "utilisation": f"{facts['utilisation']:.1%} of {machine.bf16_tflops:g} TFLOPS in bf16: "
        + ("as given" if given[0] else machine.sources["utilisation"]),
        "peak": machine.sources["bf16_tflops"],
        "price": "as given"
        if given[1]
        else f"${machine.dollars_per_hour:g} an hour: {machine.sources['dollars_per_hour']}",
    }
    print_pairs(pairs)
    if (actual := facts.get("actual")) is not None:
        _show_actual(actual, facts)


def _show_actual(actual: dict[str, Any], facts: dict[str, Any]) -> None:
    print()
    rows = [
        {"": name, "predicted": predicted, "actual": real}
        for name, predicted, real in (
            ("tokens/s so far", f"{actual['predicted_tok_s']:,.0f}", f"{actual['tok_s']:,.0f}"),
            ("utilisation", f"{facts['utilisation']:.1%}", f"{actual['utilisation']:.1%}"),
            ("hours so far", f"{actual['predicted_seconds'] / 3600:.2f}", f"{actual['seconds'] / 3600:.2f}"),
        )
    ]
    print_table(rows, ("", "predicted", "actual"))
    held_out = f", held out {actual['val_loss']:.4f}" if actual["val_loss"] is not None else ""
    note(f"{actual['steps']} steps, {human_count(actual['tokens'])} tokens, loss {actual['loss']:.4f}{held_out}")


def _list_machines(*, as_json: bool) -> None:
    from dataclasses import asdict

    from shoal.cost.machines import machines

    known = machines()
    if as_json:
        write_json({name: asdict(one) for name, one in known.items()})
        return
    rows = [
        {
            "name": name,
            "machine": one.title,
            "bf16 tflops": f"{one.bf16_tflops:g}",
            "memory": f"{one.memory_gb:g} GB",
            "$ an hour": f"{one.dollars_per_hour:g}",
            "utilisation": f"{one.utilisation:.1%}",
        }
        for name, one in known.items()
    ]
    print_table(rows, tuple(rows[0]))
