"""`shoal info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli.console import human_bytes, human_count, print_pairs, write_json

if TYPE_CHECKING:
    from shoal.formats.checkpoint import Checkpoint

SCHEMES = {"MLAConfig": "multi-head latent attention", "GQAConfig": "grouped-query attention"}


def run(
    model: Annotated[str | None, typer.Argument(help="Short name, Hugging Face folder or GGUF file.")] = None,
    context: Annotated[
        int, typer.Option(min=0, help="Cached tokens that the operations per token are counted for.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show this machine, or what a model is and costs.

    Without MODEL: processor, instruction sets (those there and the one in use), memory, versions. With MODEL: family,
    parameters (all, and those that one token uses), cache and operations per token, size on disk. No weight is read.

    [bold]Examples[/bold]
      shoal info
      shoal info smollm2-135m
      shoal info ./DeepSeek-V2-Lite-Chat --context 8192 --json
    """
    if model is None:
        _show_machine(as_json=as_json)
    else:
        _show_model(model, context=context, as_json=as_json)


def _show_machine(*, as_json: bool) -> None:
    from shoal.cli.machine import describe_machine

    facts = describe_machine()
    if as_json:
        write_json(facts)
        return
    usable = facts["usable_threads"]
    print_pairs(
        {
            "shoal": facts["shoal"],
            "python": facts["python"],
            "system": facts["system"],
            "processor": facts["cpu"],
            "cores": f"{facts['cores']} ({facts['threads']} threads, {usable} usable here)",
            "memory": f"{human_bytes(facts['memory_bytes'])} ({human_bytes(facts['memory_available_bytes'])} free)",
            "features": " ".join(facts["cpu_flags"]) or "none known",
            "kernels": f"{facts['isa']} (of {', '.join(facts['isa_available'])})",
            "packages": ", ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        }
    )


def _show_model(model: str, *, context: int, as_json: bool) -> None:
    from shoal import hub
    from shoal.formats.checkpoint import open_checkpoint

    facts = describe_model(open_checkpoint(hub.resolve(model)), context=context)
    if as_json:
        write_json(facts)
        return
    width = facts["cache_bytes_per_token"]
    pairs = {
        "model": facts["path"],
        "family": f"{facts['model_type']}, {facts['attention']}",
        "shape": f"{facts['num_hidden_layers']} layers of {facts['hidden_size']}, "
        f"{facts['num_attention_heads']} heads, vocabulary {facts['vocab_size']}",
    }
    if facts["experts"]:
        experts = facts["experts"]
        pairs["experts"] = (
            f"{experts['num_experts_per_tok']} of {experts['n_routed_experts']} and "
            f"{experts['n_shared_experts']} shared, in {experts['num_moe_layers']} layers"
        )
    pairs |= {
        "parameters": f"{human_count(facts['total_params'])}, {human_count(facts['active_params'])} used per token",
        "by part": ", ".join(f"{name} {human_count(count)}" for name, count in facts["params"].items()),
        "cache": f"{width:,} bytes per token in bfloat16 ({facts['full_cache_bytes_per_token'] / width:.1f} times less "
        "than full attention)",
        "operations": f"{human_count(facts['total_flops_per_token'])}FLOP per token at {context} cached",
        "by kind": ", ".join(f"{name} {human_count(count)}" for name, count in facts["flops_per_token"].items()),
        "context": f"{facts['max_position_embeddings']} tokens",
        "stored as": ", ".join(f"{count} × {dtype}" for dtype, count in facts["stored_dtypes"].items()),
        "on disk": human_bytes(facts["disk_bytes"]),
    }
    print_pairs(pairs)


def describe_model(checkpoint: Checkpoint, *, context: int = 0) -> dict[str, Any]:
    """What `shoal info MODEL --json` prints: the configuration's main sizes and the cost sheet. Reads no weight."""
    import dataclasses
    from collections import Counter

    from shoal.cost.model_cost import model_cost

    config = checkpoint.config
    cost = model_cost(config, context=context)
    experts = None
    if config.moe is not None:
        experts = {**dataclasses.asdict(config.moe), "num_moe_layers": config.num_moe_layers}
    return {
        "path": str(checkpoint.path),
        "model_type": config.model_type,
        "attention": SCHEMES[type(config.attention).__name__],
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.attention.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "experts": experts,
        **dataclasses.asdict(cost),
        "total_flops_per_token": cost.total_flops_per_token,
        "stored_dtypes": dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values()).most_common()),
        "disk_bytes": _disk_bytes(checkpoint),
    }


def _disk_bytes(checkpoint: Checkpoint) -> int:
    """Size of the file, or of all files directly in the folder."""
    path = Path(checkpoint.path)
    files = [path] if path.is_file() else [entry for entry in path.iterdir() if entry.is_file()]
    return sum(file.stat().st_size for file in files)
