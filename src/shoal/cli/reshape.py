"""`shoal reshape`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import Meter, human_bytes, note, print_pairs, write_json
from shoal.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from shoal.formats.checkpoint import Checkpoint
    from shoal.tune.reshape.moments import Moments

WINDOW = 512


def run(
    src: Annotated[str, typer.Argument(help="Short name, Hugging Face folder or GGUF file of a llama or qwen2 model.")],
    dst: Annotated[Path, typer.Argument(help="The folder to write; it must be free.")],
    latent: Annotated[
        int | None, typer.Option(min=2, help="Latent values cached per token and layer; enough to lose nothing if absent.")
    ] = None,
    rope: Annotated[
        int | None, typer.Option(min=2, help="Rotary values cached beside them; enough to lose nothing if absent.")
    ] = None,
    calibrate: Annotated[
        str, typer.Option(metavar="TEXT", help="builtin, none, or a text file like what the model will read.")
    ] = "builtin",
    calibration_tokens: Annotated[int, typer.Option(min=1, help="How many tokens of it to run.")] = 16384,
    dtype: Annotated[str, typer.Option(help="keep, bfloat16, float16 or float32.")] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Give a dense model the latent attention of DeepSeek-V3.

    Keys and values of all heads come from one latent and one rotary key per token, which are all that the cache holds.
    At full width the model computes what it did before; with less, what was kept is what mattered most on the
    calibration text. Writes a Hugging Face folder that transformers loads as DeepseekV3ForCausalLM.

    [bold]Examples[/bold]
      shoal reshape smollm2-135m ./smollm2-mla
      shoal reshape smollm2-135m ./smollm2-mla-small --latent 102 --rope 48
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("train", "shoal reshape") from error
    from shoal import hub
    from shoal.cost.model_cost import model_cost
    from shoal.formats.atomic import require_empty
    from shoal.formats.checkpoint import open_checkpoint
    from shoal.formats.hf_save import save_folder
    from shoal.tune.reshape import Shape, reshape

    path = hub.resolve(src)
    require_empty(dst)
    source = open_checkpoint(path)
    full = Shape.full(source.config)
    shape = Shape(latent=full.latent if latent is None else latent, rope=full.rope if rope is None else rope)
    shape.check(source.config)
    moments = None if shape == full or calibrate == "none" else _calibrate(source, calibrate, calibration_tokens)
    with Meter("reshaping") as meter:
        made = reshape(source, shape, moments, meter)
    with Meter(f"writing {dst}", human_bytes) as meter:
        save_folder(made, dst, dtype=dtype, progress=meter)
    costs = {name: model_cost(one.config) for name, one in (("before", source), ("after", made))}
    if as_json:
        write_json({
            "source": str(path), "path": str(dst), "latent": shape.latent, "rope": shape.rope,
            **{f"cache_bytes_per_token_{name}": cost.cache_bytes_per_token for name, cost in costs.items()},
            **{f"params_{name}": cost.total_params for name, cost in costs.items()},
        })  # fmt: skip
    else:
        _show(costs)
    note(f"{dst}: shoal chat --model {dst}")


def _calibrate(source: Checkpoint, text: str, tokens: int) -> list[Moments]:
    from shoal.model import load_model
    from shoal.quant.texts import load_texts, windows
    from shoal.tune.reshape.moments import measure

    length = min(WINDOW, source.config.max_position_embeddings, tokens)
    found = windows(source.load_tokenizer().encode(load_texts(text).calibration), length, tokens)
    if not found:
        raise ConfigError("calibrate", "the text holds no tokens")
    with Meter("calibrating") as meter:
        return measure(load_model(source), found, meter)


def _show(costs: dict[str, Any]) -> None:
    before, after = costs["before"], costs["after"]
    full = before.full_cache_bytes_per_token
    print_pairs({
        "cache per token": f"{before.cache_bytes_per_token} → {after.cache_bytes_per_token} bytes in bfloat16, "
        f"{1 - after.cache_bytes_per_token / before.cache_bytes_per_token:.1%} less",
        "beside full heads": f"{full} → {after.cache_bytes_per_token} bytes, "
        f"{1 - after.cache_bytes_per_token / full:.1%} less",
        "parameters": f"{before.total_params} → {after.total_params}",
    })  # fmt: skip
