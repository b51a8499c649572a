"""`shoal reshape`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli.console import Meter, human_bytes, human_count, note, print_pairs, write_json
from shoal.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from shoal.formats.checkpoint import Checkpoint
    from shoal.model import Model
    from shoal.tune.reshape import ExpertShape, LayerFit, Shape

WINDOW = 512
HEAL_WINDOW, HEAL_BATCH, TOLD_EVERY = 256, 2, 10
EXPERT_WINDOWS = 8  # windows that units are grouped by: their activations of one layer are in memory at once


def run(
    src: Annotated[str, typer.Argument(help="Short name, folder or GGUF file of a llama or qwen2 model.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must be free.")],
    latent: Annotated[
        int | None, typer.Option(min=2, help="Latent values cached per token and layer; all of them if absent.")
    ] = None,
    rope: Annotated[int | None, typer.Option(min=2, help="Rotary values cached beside them; all if absent.")] = None,
    cache: Annotated[
        int | None, typer.Option(min=4, help="Both together, shared out where they lose least on the text.")
    ] = None,
    fit_epochs: Annotated[
        int, typer.Option(min=0, help="Passes over the text that fit each layer to the one it replaces.")
    ] = 0,
    heal_steps: Annotated[
        int, typer.Option(min=0, help="Steps of distillation from the original, 512 tokens of the text each.")
    ] = 0,
    heal_state: Annotated[
        Path | None, typer.Option(help="A folder that keeps the healing's state: the same command goes on from it.")
    ] = None,
    moe: Annotated[
        str, typer.Option(help="Feed-forward layers: keep, split (into experts) or copy (to experts).")
    ] = "keep",
    experts: Annotated[int, typer.Option(min=2, help="Routed experts of a layer.")] = 8,
    active: Annotated[int, typer.Option(min=1, help="Routed experts that work on each token.")] = 2,
    shared: Annotated[int, typer.Option(min=0, help="Experts that work on every token.")] = 0,
    dense_layers: Annotated[int, typer.Option(min=0, help="First layers that stay without experts.")] = 0,
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, none, or a text file like what the model will read.")
    ] = "builtin",
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it to run.")] = 16384,
    dtype: Annotated[str, typer.Option(help="keep, bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Give a dense model DeepSeek-V3's attention, and experts if asked.

    Keys and values of all heads then come from one latent and one rotary key per token, which are all that the cache
    holds. At full width the model computes what it did before; with less, what is kept is what mattered most on the
    calibration text. Writes a Hugging Face folder that transformers loads as DeepseekV3ForCausalLM.

    [bold]Examples[/bold]
      shoal reshape smollm2-135m ./smollm2-mla
      shoal reshape smollm2-135m ./smollm2-mla-small --cache 192 --heal-steps 400
      shoal reshape smollm2-135m ./smollm2-moe --moe split --experts 14 --shared 2 --active 8
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("train", "shoal reshape") from error
    from shoal import hub
    from shoal.formats.atomic import require_empty
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.formats.hf_save import save_folder

    path = hub.resolve(src)
    require_empty(dst)
    source = open_checkpoint(path)
    wanted = _Wanted(
        shape=_shape(source, latent, rope, cache), cache=cache, fit_epochs=fit_epochs, heal_steps=heal_steps,
        heal_state=heal_state, experts=_experts(source, moe, experts, active, shared, dense_layers),
    )  # fmt: skip
    ids = _ids(source, calibrate) if calibrate != "none" else []
    made = _make(source, wanted, ids, calibration_tokens)
    with Meter(f"writing {dst}", human_bytes) as meter:
        save_folder(made, dst, dtype=dtype, progress=meter)
    _report(path, dst, source, made, as_json)


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    shape: Shape | None
    cache: int | None
    fit_epochs: int
    heal_steps: int
    heal_state: Path | None
    experts: ExpertShape | None


def _shape(source: Checkpoint, latent: int | None, rope: int | None, cache: int | None) -> Shape | None:
    """None where `cache` leaves the choice to the calibration."""
    from shoal.tune.reshape import Shape

    full = Shape.full(source.config)
    if cache is not None:
        if latent is not None or rope is not None:
            raise ConfigError("cache", "is latent and rope together; give it or them")
        if cache > full.latent + full.rope:
            raise ConfigError("cache", f"must be at most {full.latent + full.rope}, which loses nothing, got {cache}")
        return None
    shape = Shape(latent=full.latent if latent is None else latent, rope=full.rope if rope is None else rope)
    shape.check(source.config)
    return shape


def _experts(
    source: Checkpoint, moe: str, experts: int, active: int, shared: int, dense_layers: int
) -> ExpertShape | None:
    from shoal.tune.reshape import ExpertShape

    if moe == "keep":
        return None
    wanted = ExpertShape(how=moe, experts=experts, active=active, shared=shared, first_k_dense_replace=dense_layers)
    wanted.config(source.config)
    return wanted


def _make(source: Checkpoint, wanted: _Wanted, ids: list[int], calibration_tokens: int) -> Checkpoint:
    from shoal.model import load_model
    from shoal.tune.reshape import Shape, choose_shape, fit, measure, reshape, with_experts

    shape, exact = wanted.shape, wanted.shape == Shape.full(source.config)
    splits = wanted.experts is not None and wanted.experts.how == "split"
    if not ids and (wanted.fit_epochs or wanted.heal_steps or wanted.cache or splits):
        problem = "none does not go with cache, fit-epochs, heal-steps or moe split: they look at a text"
        raise ConfigError("calibrate", problem)
    windows = _windows(source, ids, WINDOW, calibration_tokens)
    needs_model = wanted.experts is not None or (windows and not exact)
    model = load_model(source) if needs_model else None
    moments = None
    if model is not None and windows and not exact:
        with Meter("calibrating") as meter:
            moments = measure(model, windows, meter)
    if shape is None:
        assert moments is not None and wanted.cache is not None
        shape = choose_shape(source, wanted.cache, moments)
        note(f"of {wanted.cache} cached values {shape.latent} are the latent and {shape.rope} rotary")
    with Meter("reshaping") as meter:
        made = reshape(source, shape, moments, meter)
    if model is not None and wanted.fit_epochs and not exact:
        made = fit(model, made, windows, epochs=wanted.fit_epochs, report=_tell)
    if model is not None and wanted.heal_steps and not exact:
        made = _heal(model, made, _windows(source, ids, HEAL_WINDOW, len(ids)), wanted)
    if model is not None and wanted.experts is not None:
        with Meter("making experts") as meter:
            made = with_experts(made, model, wanted.experts, windows[:EXPERT_WINDOWS], meter)
    return made


def _tell(layer: LayerFit) -> None:
    note(f"layer {layer.layer}: error of the stream {layer.before**0.5:.2%} → {layer.after**0.5:.2%}")


def _heal(model: Model, made: Checkpoint, windows: list[list[int]], wanted: _Wanted) -> Checkpoint:
    from shoal.tune.reshape import HealSettings, HealStep, heal

    settings = HealSettings(steps=wanted.heal_steps, batch=min(HEAL_BATCH, len(windows)))
    recent: list[float] = []

    def tell(step: HealStep) -> None:
        recent.append(step.kl)
        if step.step % TOLD_EVERY == 0 or step.step == settings.steps:
            note(f"step {step.step} of {settings.steps}: {sum(recent) / len(recent):.4f} nats from the original")
            recent.clear()

    return heal(model, made, windows, settings, state=wanted.heal_state, report=tell)


def _ids(source: Checkpoint, text: str) -> list[int]:
    from shoal.quant.texts import load_texts

    ids = source.load_tokenizer().encode(load_texts(text).calibration)
    if not ids:
        raise ConfigError("calibrate", "the text holds no tokens")
    return ids


def _windows(source: Checkpoint, ids: list[int], length: int, tokens: int) -> list[list[int]]:
    from shoal.quant.texts import windows

    return windows(ids, min(length, source.config.max_position_embeddings, tokens), tokens) if ids else []


def _report(path: Path, dst: Path, source: Checkpoint, made: Checkpoint, as_json: bool) -> None:
    from shoal.cost.model_cost import model_cost

    before, after = model_cost(source.config), model_cost(made.config)
    full = before.full_cache_bytes_per_token
    mla = made.config.attention
    if as_json:
        write_json({
            "source": str(path), "path": str(dst), "latent": mla.cache_width - mla.rope_dim, "rope": mla.rope_dim,
            "cache_bytes_per_token": after.cache_bytes_per_token, "cache_bytes_before": before.cache_bytes_per_token,
            "cache_bytes_full_heads": full, "params": after.total_params, "params_before": before.total_params,
            "active_params": after.active_params,
        })  # fmt: skip
        return
    print_pairs({
        "cache per token": f"{before.cache_bytes_per_token} → {after.cache_bytes_per_token} bytes in bfloat16, "
        f"{1 - after.cache_bytes_per_token / before.cache_bytes_per_token:.1%} less",
        "beside full heads": f"{full} → {after.cache_bytes_per_token} bytes, "
        f"{1 - after.cache_bytes_per_token / full:.1%} less",
        "parameters": f"{human_count(before.total_params)} → {human_count(after.total_params)}, "
        f"{human_count(after.active_params)} of them for a token",
    })  # fmt: skip
