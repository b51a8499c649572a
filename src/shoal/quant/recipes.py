"""Which tensor becomes what. A recipe gives bits to roles; a role is recognised by a tensor's published name.

Kept whatever the recipe: routers (a rounded score picks other experts), norms and biases, and MLA's small projections
into and out of the latent, whose errors every head and every later token sees; all told under 1% of DeepSeek's models.
Attention, shared experts and the output head are read for every token but are a small part of a mixture of experts, so
the 4-bit recipes give them 8 bits: on SmolLM2-135M that takes the divergence from 0.128 to 0.078 nats for 11% more
bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.formats.compressed_tensors import METHOD
from shoal.quant.grids import Grid

GROUPS = (32, 64, 128)
TABLES = ("auto", "int8", "bfloat16")
ROLES = ("experts and MLPs", "shared experts", "attention", "embedding", "output head", "kept")
_BY_NAME = (
    (re.compile(r".*\.mlp\.(experts\.\d+\.)?(gate|up|down)_proj\.weight$"), "experts and MLPs"),
    (re.compile(r".*\.mlp\.shared_experts\.(gate|up|down)_proj\.weight$"), "shared experts"),
    (re.compile(r".*\.self_attn\.(q|k|v|o|q_b)_proj\.weight$"), "attention"),
    (re.compile(r"(.*\.)?embed_tokens\.weight$"), "embedding"),
    (re.compile(r"(.*\.)?(lm_head|shared_head\.head)\.weight$"), "output head"),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Bits of each role: `bulk` for routed experts and MLPs, `rest` for attention, shared experts and the output head.

    `symmetric` says whether the bulk goes without zero points. Kernels for mixtures of experts elsewhere ask for that.
    """

    bulk: int
    rest: int
    symmetric: bool = True


RECIPES = {
    "int8": Recipe(bulk=8, rest=8),
    "int4": Recipe(bulk=4, rest=8),
    "int4-asym": Recipe(bulk=4, rest=8, symmetric=False),
}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was asked for: a recipe, the columns that share a scale, and which of the two tables are quantised."""

    recipe: Recipe
    group: int
    embedding: bool
    head: bool

    def grid(self, name: str, shape: tuple[int, ...]) -> Grid | None:
        """The grid of a tensor, or None if it is kept. Where the group does not divide the columns, a smaller does."""
        part = role(name)
        tables = {"kept": False, "embedding": self.embedding, "output head": self.head}
        fitting = [size for size in GROUPS if size <= self.group and shape[-1] % size == 0]
        if not tables.get(part, True) or len(shape) != 2 or not fitting:
            return None
        bulk = part == "experts and MLPs"
        bits = self.recipe.bulk if bulk else self.recipe.rest
        return Grid(bits=bits, group=max(fitting), symmetric=self.recipe.symmetric or not bulk)


def choose(scheme: str, group: int, tables: str, *, tied: bool) -> Choice:
    """Check the words of a request. `tables=auto` quantises an output head of its own, which every reader understands;
    an embedding, and a head tied to it, stay in 16 bits, because vLLM and transformers do not read them otherwise yet.

    Raises:
        ConfigError: one of them is unknown.
    """
    for field, value, known in (
        ("scheme", scheme, tuple(RECIPES)),
        ("group", group, GROUPS),
        ("tables", tables, TABLES),
    ):
        if value not in known:
            raise ConfigError(field, f"{value!r} is not one of {', '.join(map(str, known))}")
    embedding = tables == "int8"
    head = embedding if tied else tables != "bfloat16"
    return Choice(recipe=RECIPES[scheme], group=group, embedding=embedding, head=head)


def role(name: str) -> str:
    """The role of a tensor under its published name."""
    return next((role for pattern, role in _BY_NAME if pattern.match(name)), "kept")


def target(name: str) -> str:
    """A `targets` entry that covers a tensor's module and its likes in other layers and experts."""
    module = name.removesuffix(".weight")
    if module == "lm_head":
        return module
    if module.endswith("embed_tokens"):
        return "re:.*embed_tokens$"
    inner = re.escape(module.removeprefix("model."))
    return "re:.*" + re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", inner) + "$"


def _is_table(pattern: str) -> bool:
    return pattern == "lm_head" or pattern.endswith(("embed_tokens$", "shared_head\\.head$"))


def quantization_config(grids: Mapping[str, Grid | None], *, tied: bool) -> dict[str, Any]:
    """The `quantization_config` of a folder whose matrices have these grids.

    With one grid for all, the target is the class `Linear`, which every reader understands, and by name the tables,
    which are no linear layers to some. With several, only patterns are used: some readers try the class before they
    take a fused layer's name apart.
    """
    by_grid: dict[Grid, set[str]] = {}
    ignore = {"lm_head"} if tied else set()
    for name, grid in grids.items():
        if grid is None:
            ignore.add(target(name))
        else:
            by_grid.setdefault(grid, set()).add(target(name))
    if len(by_grid) == 1:
        grid, targets = by_grid.popitem()
        by_grid = {grid: {"Linear", *(one for one in targets if _is_table(one))}}
    groups = {
        f"group_{index}": {
            "targets": sorted(targets), "input_activations": None, "output_activations": None,
            "weights": {"num_bits": grid.bits, "type": "int", "symmetric": grid.symmetric, "strategy": "group",
                        "group_size": grid.group, "dynamic": False},
        }
        for index, (grid, targets) in enumerate(by_grid.items())
    }  # fmt: skip
    return {
        "quant_method": METHOD, "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": sorted(ignore), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
