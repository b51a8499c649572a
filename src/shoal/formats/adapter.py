"""Low-rank adapters on disk, in the layout of Hugging Face PEFT: `adapter_config.json`, `adapter_model.safetensors`.

An adapter adds scale · B A to a weight matrix (LoRA, arXiv 2106.09685). PEFT names the matrices after the modules of
transformers; the experts of a layer are there two stacked parameters, `mlp.experts.gate_up_proj` [E, 2F, D] (gate rows
first) and `mlp.experts.down_proj` [E, D, F], whose factors PEFT stores flattened: A as [E · r, in], B as [out, r · E]
with the expert running fastest. Adapters from before transformers 5 name single experts: `mlp.experts.7.gate_proj`.
In models with experts PEFT takes every target module called gate_proj, up_proj or down_proj for an old expert, so the
dense and shared ones are named there as parameters, `mlp.shared_experts.up_proj.weight`.

`merge` lays an adapter over a checkpoint, tensor by tensor as they are read, without torch.

Shapes: E experts (1 for a plain matrix), O out, I in, R rank.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shoal.config import ModelConfig
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import atomic_file, atomic_folder
from shoal.formats.checkpoint import Array, Checkpoint, LazyTensor
from shoal.formats.hf_config import read_json
from shoal.formats.hf_shards import inside
from shoal.formats.layout import EXPERT_PARTS, expected_tensors
from shoal.formats.safetensors import SafetensorsFile, array_spec, write_safetensors

Floats = NDArray[np.float32]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_ROOT = "base_model.model."
_STACKS = ("gate_up_proj", "down_proj")
_FACTOR = re.compile(r"(?P<module>.+?)(?P<nested>\.base_layer)?\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<index>\d+)\.(?P<part>gate_proj|up_proj|down_proj)$")
# Fields that change what an adapter computes and that we do not: anything but these values is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None), "lora_bias": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []), "trainable_token_indices": (None, []), "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []), "arrow_config": (None,), "corda_config": (None,),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """What is added to a matrix, or to each of a stack: scale · b a.

    Attributes:
        a: [E, R, I].
        b: [E, O, R].
    """

    a: Floats
    b: Floats
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """All of an adapter: `parts` by module name, as `model.layers.0.self_attn.q_proj` or `….mlp.experts.down_proj`."""

    parts: Mapping[str, LowRank]
    path: Path
    base: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


# ---- reading


def load_adapter(folder: str | Path) -> Adapter:
    """Read a PEFT folder. Only what a LoRA of linear layers and stacked experts is made of is accepted.

    Raises:
        FileError: a file is missing or damaged, or the adapter does something that Shoal does not; names the field.
    """
    folder = Path(folder)
    path = inside(folder, CONFIG)
    config = read_json(path)
    if str(config.get("peft_type")).upper() != "LORA":
        raise FileError(path, f"is {config.get('peft_type')!r}; only LORA is supported", item="peft_type")
    for name, values in _PLAIN.items():
        if config.get(name) not in values and config.get(name) != {}:
            raise FileError(path, f"{config[name]!r} is not supported", item=name)
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("target_parameters", list)):
        if not isinstance(config.get(name), kind | None):
            raise FileError(path, f"must be {'an object' if kind is dict else 'a list'}", item=name)
    file = SafetensorsFile(inside(folder, WEIGHTS))
    factors: dict[tuple[str, bool], dict[str, Floats]] = defaultdict(dict)
    for name, entry in file.entries.items():
        match = _FACTOR.fullmatch(name.removeprefix(_ROOT))
        if match is None or len(entry.shape) != 2:
            raise FileError(file.path, "is no factor of a linear layer's LoRA", item=name)
        value = np.asarray(file.view(name), np.float32)
        if not np.isfinite(value).all():
            raise FileError(file.path, "holds a value that is no finite number", item=name)
        factors[match["module"], match["nested"] is not None][match["side"]] = value
    parts = {}
    for (module, nested), pair in factors.items():
        target = _target(config, module, nested, path)
        if pair.keys() != {"A", "B"}:
            raise FileError(file.path, f"has lora_{next(iter(pair))} but not its other half", item=module)
        parts[target] = _low_rank(config, target, pair["A"], pair["B"], file.path)
    if not parts:
        raise FileError(file.path, "holds no adapter")
    base = config.get("base_model_name_or_path")
    return Adapter(parts=parts, path=folder, base=base if isinstance(base, str) else None, config=config)


def _target(config: Mapping[str, Any], module: str, nested: bool, path: Path) -> str:
    """The matrix a factor belongs to. PEFT wraps a module once per stacked parameter: the outer wrapper, without
    `base_layer` in its name, is the second parameter where there are two."""
    if not module.endswith(".mlp.experts"):
        return module
    wanted = config.get("target_parameters") or ()
    names = [part for part in _STACKS if any(_names(str(t), f"{module}.{part}") for t in wanted)]
    if not names or (nested and len(names) < 2):
        raise FileError(path, f"does not say which parameter of {module} is adapted", item="target_parameters")
    return f"{module}.{names[0] if nested else names[-1]}"


def _names(target: str, full: str) -> bool:
    return full == target or full.endswith(f".{target}")


def _low_rank(config: Mapping[str, Any], target: str, a: Floats, b: Floats, path: Path) -> LowRank:
    rank = _pattern(config, "rank_pattern", target, config.get("r"), path)
    alpha = _pattern(config, "alpha_pattern", target, config.get("lora_alpha"), path)
    if rank != int(rank) or rank < 1:
        raise FileError(path, f"has rank {rank}", item=target)
    rank = int(rank)
    experts = len(a) // rank
    if len(a) != b.shape[1] or len(a) != experts * rank or experts < 1:
        raise FileError(path, f"has factors {list(a.shape)} and {list(b.shape)} for rank {rank}", item=target)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    a_ERI = a.reshape(experts, rank, a.shape[1])
    b_EOR = b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)
    return LowRank(a=a_ERI, b=np.ascontiguousarray(b_EOR), scale=scale)


def _pattern(config: Mapping[str, Any], name: str, target: str, default: Any, path: Path) -> float:
    """PEFT matches the keys of a pattern as regular expressions; plain names are what is written, so plain is read."""
    value = default
    for key, entry in (config.get(name) or {}).items():
        plain = str(key).removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix(".*.")
        if _names(plain.removesuffix(".weight"), target):
            value = entry
            break
        if not re.fullmatch(r"[\w.]+", plain):
            raise FileError(path, f"the key {key!r} is a regular expression, which is not supported", item=name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise FileError(path, f"{value!r} is no number", item=name)
    return float(value)


# ---- checking and merging


def check_adapter(adapter: Adapter, config: ModelConfig) -> None:
    """Raise FileError for the first part whose matrix the model does not have, or has in another shape."""
    shapes = expected_tensors(config)
    for target, part in adapter.parts.items():
        found = _shape_of(target, shapes)
        if found is None:
            raise FileError(adapter.path / WEIGHTS, "is no matrix of this model", item=target)
        if (part.a.shape[0], part.b.shape[1], part.a.shape[2]) != found:
            problem = f"adapts {list(part.b.shape[:2])} × {part.a.shape[2]}, the model has {list(found)}"
            raise FileError(adapter.path / WEIGHTS, problem, item=target)


def _shape_of(target: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    """Experts, rows and columns of the matrix or stack, as PEFT counts them."""
    single = _EXPERT.fullmatch(target)
    if single:
        shape = shapes.get(f"{single['experts']}.{single['part']}.weight")
        return (1, *shape[1:]) if shape and int(single["index"]) < shape[0] else None  # type: ignore[return-value]
    fused = target.endswith(".mlp.experts.gate_up_proj")
    shape = shapes.get(f"{target.removesuffix('gate_up_proj')}gate_proj.weight" if fused else f"{target}.weight")
    if shape is None or len(shape) < 2:
        return None
    experts, rows, cols = (1, *shape) if len(shape) == 2 else shape
    return experts, rows * (2 if fused else 1), cols


def own_ranks(part: LowRank) -> list[int]:
    """The rank of each matrix of a stack without the zeros that filled it up."""
    used_ER = np.abs(part.a).max(2) + np.abs(part.b).max(1) > 0
    return [int(np.flatnonzero(used_R).max(initial=-1)) + 1 for used_R in used_ER]


def single_expert(target: str) -> tuple[str, int] | None:
    """Stack and number of a single expert's matrix as older folders name it."""
    match = _EXPERT.fullmatch(target)
    return (f"{match['experts']}.{match['part']}", int(match["index"])) if match else None


def merge(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter's products added to its weights, computed when they are read.

    A quantised tensor that changes is no longer in its own codes: the engine packs it to 8 bits anew.

    Raises:
        FileError: the adapter does not fit the model.
    """
    check_adapter(adapter, checkpoint.config)
    tensors = dict(checkpoint.tensors)
    for name in checkpoint.tensors:
        deltas = _deltas(adapter, name)
        if deltas:
            tensors[name] = _merged(tensors[name], deltas)
    return replace(checkpoint, tensors=tensors)


Delta = tuple[Floats, Floats, float]  # a [R, I], b [O, R], scale


def _deltas(adapter: Adapter, name: str) -> dict[int, list[Delta]]:
    """What is added to each matrix of a tensor, by its number in the stack."""
    module = name.removesuffix(".weight")
    out: dict[int, list[Delta]] = defaultdict(list)
    for target, part in adapter.parts.items():
        single = _EXPERT.fullmatch(target)
        if target == module:
            for index in range(len(part.a)):
                out[index].append((part.a[index], part.b[index], part.scale))
        elif single and module == f"{single['experts']}.{single['part']}":
            out[int(single["index"])].append((part.a[0], part.b[0], part.scale))
        elif target.endswith(".experts.gate_up_proj") and module.rpartition(".")[0] == target.rpartition(".")[0]:
            half = part.b.shape[1] // 2
            rows = {"gate_proj": slice(None, half), "up_proj": slice(half, None)}.get(module.rpartition(".")[2])
            for index in range(len(part.a) if rows is not None else 0):
                out[index].append((part.a[index], part.b[index, rows], part.scale))
    return out


def _merged(tensor: LazyTensor, deltas: Mapping[int, list[Delta]]) -> LazyTensor:
    stacked = len(tensor.shape) == 3

    def chunks() -> Iterator[Array]:
        at = 0
        for chunk in tensor.chunks():
            out = np.array(chunk, np.float32)
            if stacked:
                for index in range(len(out)):
                    for a, b, scale in deltas.get(at + index, ()):
                        out[index] += scale * (b @ a)
            else:
                for a, b, scale in deltas[0]:
                    out += scale * (b[at : at + len(out)] @ a)
            at += len(out)
            yield out.astype(chunk.dtype) if plain else out

    plain = tensor.dtype in ("F32", "F16", "BF16")
    return LazyTensor(
        name=tensor.name, shape=tensor.shape, dtype=tensor.dtype if plain else f"{tensor.dtype} + adapter",
        source=tensor.source, make_chunks=chunks, release=tensor.release,
    )  # fmt: skip


# ---- writing


def save_adapter(adapter: Adapter, config: ModelConfig, dst: str | Path) -> None:
    """Write a PEFT folder that appears whole or not at all. `config` is the model's that it was made for.

    Raises:
        FileError: `dst` is taken, or the disk refuses.
    """
    with atomic_folder(Path(dst)) as folder:
        write_adapter(adapter, config, folder)


def write_adapter(adapter: Adapter, config: ModelConfig, folder: Path) -> None:
    """As `save_adapter`, into a folder that exists."""
    arrays = {}
    stacks: dict[str, list[str]] = defaultdict(list)
    for target in adapter.parts:
        module, _, name = target.rpartition(".")
        if name in _STACKS and module.endswith(".mlp.experts"):
            stacks[module].append(name)
    for target, part in adapter.parts.items():
        module, _, name = target.rpartition(".")
        if module in stacks:
            target = f"{module}.base_layer" if name == _STACKS[0] and len(stacks[module]) == 2 else module
        a, b = part.a.reshape(-1, part.a.shape[2]), part.b.transpose(1, 2, 0).reshape(part.b.shape[1], -1)
        for side, value in (("A", a), ("B", b)):
            arrays[f"{_ROOT}{target}.lora_{side}.weight"] = np.ascontiguousarray(value, np.float32)
    write_safetensors(folder / WEIGHTS, [array_spec(name, value) for name, value in arrays.items()])
    with atomic_file(folder / CONFIG) as out:
        out.write(json.dumps(_config(adapter, config), indent=2).encode() + b"\n")


def _config(adapter: Adapter, config: ModelConfig) -> dict[str, Any]:
    if any(_EXPERT.fullmatch(target) for target in adapter.parts):
        raise ConfigError("adapter", "adapts single experts as older folders do; merge it instead of saving it anew")
    modules, parameters = [], []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target, part in adapter.parts.items():
        name = target
        if target.endswith(tuple(f".mlp.experts.{stack}" for stack in _STACKS)):
            parameters.append(name)
        elif config.moe is not None and target.endswith(EXPERT_PARTS):
            name = f"{target}.weight"
            parameters.append(name)
        else:
            modules.append(name)
        ranks[name], alphas[name] = part.rank, part.scale * part.rank
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": adapter.base,
        "inference_mode": True, "r": max(ranks.values()), "lora_alpha": max(alphas.values()), "lora_dropout": 0.0,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "init_lora_weights": True,
        "target_modules": modules, "target_parameters": parameters or None,
        "rank_pattern": ranks, "alpha_pattern": alphas, "modules_to_save": None,
    }  # fmt: skip
