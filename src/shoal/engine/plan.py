"""The forward pass written down once: a list of operations over buffers, which the native executor replays.

An MLA layer runs in absorbed form over the latent cache (DeepSeek-V2 §2.1.2): W_k^b carries queries into the latent
space, scores and weighted sums are taken over the cached latents, and W_v^b brings the result back per head.

Letters: T tokens of a step, D model, N heads, H nope, R rope, C latent, V value head, F hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from shoal import positions
from shoal.config import GQAConfig, MLAConfig, ModelConfig
from shoal.engine.packing import pack_array, pack_tensor, packing_for
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint, LazyTensor
from shoal.formats.layout import EXPERT_PARTS
from shoal.kernels import native
from shoal.machine import staying_on

T = TypeVar("T")
Moments = dict[str, NDArray[np.float32]]
PAGE_TOKENS = 64
LATENT_NORM_EPS = 1e-6  # the published networks use it for q_a and kv_a norms whatever rms_norm_eps says


@dataclass(kw_only=True)
class Plan:
    """The engine with its operations, and what the caller needs to size the cache."""

    engine: native.Engine
    config: ModelConfig
    cache_widths: list[int]
    cache_layers: int  # layers that cache: the main ones and, if it guesses ahead, one more
    looks_ahead: bool  # program 1 is the first multi-token-prediction layer
    weights: dict[str, Any]  # packed matrices by name, for another plan over the same weights
    adaptable: dict[str, int]  # the engine's number of every matrix or stack that an adapter may add to, by module name
    weight_bytes: int = 0
    step_bytes: int = 0  # what every step of the main network reads: all but routed experts and the embedding's rows


@dataclass(kw_only=True)
class _Writer:
    checkpoint: Checkpoint
    engine: native.Engine
    scheme: str
    threads: int
    moments: Moments | None = None
    expand: bool = False
    weights: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int = 0
    expert_bytes: int = 0  # of them, routed experts, which a step reads only in part
    prompt_bytes: int = 0  # of them, what only long prompts read
    buffers: dict[str, int] = field(default_factory=dict)
    adaptable: dict[str, int] = field(default_factory=dict)

    def number(self, names: list[str], first: int) -> None:
        """Matrices of these names are the engine's `first` and those after it."""
        self.adaptable.update({name.removesuffix(".weight"): first + i for i, name in enumerate(names)})

    def watch(self, names: list[str], count: int = 1) -> NDArray[np.float32] | None:
        """Where the engine is to add up what these matrices (or stacks of `count`) meet, if anybody asked for it."""
        if self.moments is None:
            return None
        cols = self.checkpoint.tensors[names[0]].shape[-1]
        array = np.zeros((count, cols + 1), np.float32)
        self.moments.update(dict.fromkeys(names, array))
        return array

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What stands under this name already, else what `make` makes."""
        if name not in self.weights:
            self.weights[name] = make()
        return self.weights[name]  # type: ignore[no-any-return]

    def buffer(self, name: str, cols: int) -> int:
        """A buffer shared by all layers under its name."""
        if name not in self.buffers:
            self.buffers[name] = self.engine.buffer(cols)
        return self.buffers[name]

    def matrix(self, name: str) -> native.Packed:
        return self.once(name, lambda: self.packed(self.checkpoint.tensors[name]))

    def packed(self, tensor: LazyTensor) -> native.Packed:
        packed = pack_tensor(tensor, packing_for(tensor, self.scheme), self.threads)
        self.weight_bytes += packed.nbytes
        if ".mlp.experts." in tensor.name:
            self.expert_bytes += packed.nbytes
        return packed

    def added(self, packed: native.Packed) -> native.Packed:
        self.weight_bytes += packed.nbytes
        return packed

    def array(self, name: str) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.checkpoint.tensors[name].read(), np.float32)

    def vector(self, name: str) -> NDArray[np.float32] | None:
        return self.array(name) if name in self.checkpoint.tensors else None


def write_plan(
    checkpoint: Checkpoint,
    *,
    threads: int,
    scheme: str = "auto",
    wide: bool = False,
    look_ahead: bool = False,
    expand: bool = False,
    moments: Moments | None = None,
    states_of: Plan | None = None,
    helpers_on: Collection[int] = (),
) -> Plan:
    """Pack the weights and write the operations of one forward pass.

    Args:
        scheme: `auto` keeps the file's own precision; `f32`, `bf16`, `q8`, `q4`, `q4m` repack every large matrix.
        wide: activations of 16 bits, not 8, where they meet quantised weights.
        expand: also write MLA's expanded form, for the sequences that a step names.
        look_ahead: also write the first multi-token-prediction layer, if the model has one, as program 1.
        moments: a dictionary to fill: by name of a matrix [rows, cols] or stack [count, rows, cols], an array
            [count, cols + 1] to which every step adds the squares of each input column and, last, the number of inputs.
        states_of: a plan of the same checkpoint whose weights this one shares; in place of logits it gives the states
            after the final norm [T, D], exactly, as a head that is the identity does.
        helpers_on: processors for the team's threads beside the caller's; any if none are named.
    """
    checkpoint.check_complete()
    config = checkpoint.config
    if config.mlp_bias:
        raise ConfigError(
            "mlp_bias", "is true, which the engine does not support: its feed-forward layers add no biases"
        )
    with staying_on(helpers_on):  # it starts the team's other threads
        engine = native.Engine(threads, wide, wide)
    out = _Writer(
        checkpoint=checkpoint, engine=engine, scheme=scheme, threads=threads, moments=moments, expand=expand,
        weights={} if states_of is None else states_of.weights,
    )  # fmt: skip
    hidden = out.buffer("hidden", config.hidden_size)
    table = out.matrix("model.embed_tokens.weight")
    if states_of is not None:
        head = pack_array(np.eye(config.hidden_size, dtype=np.float32), "f32")
    else:
        head = table if config.tie_word_embeddings else out.matrix("lm_head.weight")
    final_norm = out.array("model.norm.weight")
    out.engine.embed(table, hidden)
    _write_rope_table(out)
    for layer in range(config.num_hidden_layers):
        _write_layer(out, layer, moe=config.is_moe_layer(layer))
    head_name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    out.engine.head(hidden, final_norm, config.rms_norm_eps, head, out.watch([head_name]))
    step_bytes = out.weight_bytes - out.expert_bytes - out.prompt_bytes - (0 if head is table else table.nbytes)
    looks_ahead = look_ahead and config.num_nextn_predict_layers > 0
    if looks_ahead:
        _write_look_ahead(out, table, head, final_norm)
    return Plan(
        engine=out.engine,
        config=config,
        cache_widths=cache_widths(config),
        cache_layers=config.num_hidden_layers + looks_ahead,
        looks_ahead=looks_ahead,
        weights=out.weights,
        adaptable=out.adaptable,
        weight_bytes=out.weight_bytes,
        step_bytes=step_bytes,
    )


def cache_widths(config: ModelConfig) -> list[int]:
    """Widths of the rows that a token caches in a layer: the latent, or every head's key and value."""
    attention = config.attention
    if isinstance(attention, MLAConfig):
        return [attention.cache_width]
    return [attention.head_dim] * (2 * attention.num_key_value_heads)


def _write_rope_table(out: _Writer) -> None:
    rope, width = out.config.rope, out.config.attention.rope_dim
    cosines, sines = out.buffer("cosines", width // 2), out.buffer("sines", width // 2)
    frequencies = [float(f) for f in positions.frequencies(rope, width)]
    out.engine.rope_table(frequencies, positions.attention_factor(rope.scaling), cosines, sines)


def _write_layer(out: _Writer, layer: int, *, moe: bool) -> None:
    attention = out.config.attention
    if isinstance(attention, MLAConfig):
        _write_mla(out, attention, layer)
    else:
        _write_gqa(out, attention, layer)
    _write_feed_forward(out, layer, moe=moe)


def _write_look_ahead(out: _Writer, table: native.Packed, head: native.Packed, final_norm: NDArray[np.float32]) -> None:
    """The first MTP layer (DeepSeek-V3 §2.2): from the main states h_i of the step just run and the tokens t_{i+1} to
    logits of t_{i+2}. Released weights put the embedding first; h_i is taken after the final norm."""
    config = out.config
    layer = config.mtp_layers[0]
    prefix = f"model.layers.{layer}."
    states, joined = out.buffers["hidden"], out.buffer("joined", 2 * config.hidden_size)
    ahead = out.buffer("ahead", config.hidden_size)
    out.engine.program(1)
    out.engine.look_ahead(
        table, states, out.array(f"{prefix}enorm.weight"), final_norm, out.array(f"{prefix}hnorm.weight"),
        config.rms_norm_eps, joined,
    )  # fmt: skip
    _write_rope_table(out)
    out.engine.linear(joined, None, 0.0, [out.matrix(f"{prefix}eh_proj.weight")], [None], [ahead])
    out.buffers["hidden"] = ahead
    _write_layer(out, layer, moe=config.moe is not None)
    out.buffers["hidden"] = states
    out.engine.head(ahead, out.array(f"{prefix}shared_head.norm.weight"), config.rms_norm_eps, head)
    out.engine.program(0)


def _write_mla(out: _Writer, mla: MLAConfig, layer: int) -> None:
    config, prefix = out.config, f"model.layers.{layer}.self_attn."
    heads, nope, rope, latent = mla.num_attention_heads, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.kv_lora_rank
    hidden, query = out.buffers["hidden"], out.buffer("query", heads * mla.qk_head_dim)
    compressed = out.buffer("compressed", latent + rope)
    norm = out.array(f"model.layers.{layer}.input_layernorm.weight")
    down, down_bias = out.matrix(f"{prefix}kv_a_proj_with_mqa.weight"), out.vector(f"{prefix}kv_a_proj_with_mqa.bias")
    if mla.q_lora_rank is None:
        weights = [out.matrix(f"{prefix}q_proj.weight"), down]
        names = [f"{prefix}q_proj.weight", f"{prefix}kv_a_proj_with_mqa.weight"]
        moments, outs = out.watch(names), [query, compressed]
        out.number(
            names,
            out.engine.linear(hidden, norm, config.rms_norm_eps, weights, [None, down_bias], outs, False, moments),
        )
    else:
        low = out.buffer("query_low", mla.q_lora_rank)
        weights = [out.matrix(f"{prefix}q_a_proj.weight"), down]
        biases = [out.vector(f"{prefix}q_a_proj.bias"), down_bias]
        names = [f"{prefix}q_a_proj.weight", f"{prefix}kv_a_proj_with_mqa.weight"]
        outs, moments = [low, compressed], out.watch(names)
        out.number(
            names, out.engine.linear(hidden, norm, config.rms_norm_eps, weights, biases, outs, False, moments)
        )  # fmt: skip
        low_norm, names = out.array(f"{prefix}q_a_layernorm.weight"), [f"{prefix}q_b_proj.weight"]
        up, moments = out.matrix(names[0]), out.watch(names)
        out.number(names, out.engine.linear(low, low_norm, LATENT_NORM_EPS, [up], [None], [query], False, moments))
    out.engine.cache_mla(
        layer, query, heads, nope, rope, latent, compressed, out.array(f"{prefix}kv_a_layernorm.weight"),
        LATENT_NORM_EPS, out.buffers["cosines"], out.buffers["sines"], config.rope.interleave,
    )  # fmt: skip
    name = f"{prefix}kv_b_proj.weight"
    up_keys, up_values = out.once(name, lambda: _absorbed(out, mla, name))
    expand_keys = out.once(f"{name} of keys", lambda: _expanding(out, mla, name)) if out.expand else None
    in_latent, weighted = out.buffer("query_latent", heads * latent), out.buffer("weighted", heads * latent)
    values = out.buffer("values", heads * mla.v_head_dim)
    keys_number = out.engine.head_linear(up_keys, query, 0, mla.qk_head_dim, in_latent, 0, latent)
    out.engine.attention(
        layer, in_latent, latent, query, nope, mla.qk_head_dim, heads, 1, latent + rope, latent, True,
        positions.softmax_scale(config.attention, config.rope), weighted,
        expand_keys, up_values if out.expand else None, values,
    )  # fmt: skip
    values_number = out.engine.head_linear(up_values, weighted, 0, latent, values, 0, mla.v_head_dim)
    out.adaptable |= {f"{prefix}kv_b_proj/keys": keys_number, f"{prefix}kv_b_proj/values": values_number}
    _write_output(out, values, prefix)


def _absorbed(out: _Writer, mla: MLAConfig, name: str) -> tuple[native.Packed, native.Packed]:
    """W_k^b transposed [N, C, H] and W_v^b [N, V, C] from kv_b_proj: per head H rows of keys, then V of values."""
    tensor = out.checkpoint.tensors[name]
    if tensor.split is not None:
        return out.packed(tensor.split[0]), out.packed(tensor.split[1])
    per_head = mla.qk_nope_head_dim + mla.v_head_dim
    both = out.array(name).reshape(mla.num_attention_heads, per_head, mla.kv_lora_rank)
    packing = packing_for(tensor, out.scheme)
    if out.scheme == "auto" and packing in ("q4", "q4m"):
        packing = "q8"  # the keys are turned round and so quantised anew, which 4 bits would not bear
    keys = pack_array(both[:, : mla.qk_nope_head_dim].transpose(0, 2, 1), packing, out.threads)
    values = pack_array(both[:, mla.qk_nope_head_dim :], packing, out.threads)
    out.weight_bytes += keys.nbytes + values.nbytes
    return keys, values


def _expanding(out: _Writer, mla: MLAConfig, name: str) -> native.Packed:
    """W_k^b [N, H, C], which makes keys of latents; `_absorbed` has it the other way round."""
    tensor = out.checkpoint.tensors[name]
    if tensor.split is not None:
        keys, packing = tensor.split[0].read().transpose(0, 2, 1), packing_for(tensor.split[0], out.scheme)
    else:
        per_head = mla.qk_nope_head_dim + mla.v_head_dim
        both = out.array(name).reshape(mla.num_attention_heads, per_head, mla.kv_lora_rank)
        keys, packing = both[:, : mla.qk_nope_head_dim], packing_for(tensor, out.scheme)
    if out.scheme == "auto" and packing in ("q4", "q4m"):
        packing = "q8"
    packed = out.added(pack_array(np.ascontiguousarray(keys, np.float32), packing, out.threads))
    out.prompt_bytes += packed.nbytes
    return packed


def _write_gqa(out: _Writer, gqa: GQAConfig, layer: int) -> None:
    config, prefix = out.config, f"model.layers.{layer}.self_attn."
    heads, kv_heads, width = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
    query, attended = out.buffer("query", heads * width), out.buffer("values", heads * width)
    key, value = out.buffer("key", kv_heads * width), out.buffer("value", kv_heads * width)
    names = [f"{prefix}{name}" for name in ("q_proj", "k_proj", "v_proj")]
    first = out.engine.linear(
        out.buffers["hidden"], out.array(f"model.layers.{layer}.input_layernorm.weight"), config.rms_norm_eps,
        [out.matrix(f"{name}.weight") for name in names], [out.vector(f"{name}.bias") for name in names],
        [query, key, value], False, out.watch([f"{name}.weight" for name in names]),
    )  # fmt: skip
    out.number(names, first)
    out.engine.cache_gqa(
        layer, query, key, value, heads, kv_heads, width,
        out.vector(f"{prefix}q_norm.weight"), out.vector(f"{prefix}k_norm.weight"), config.rms_norm_eps,
        out.buffers["cosines"], out.buffers["sines"], config.rope.interleave,
    )  # fmt: skip
    out.engine.attention(
        layer,
        query,
        width,
        -1,
        0,
        0,
        heads,
        kv_heads,
        width,
        width,
        False,
        positions.softmax_scale(config.attention, config.rope),
        attended,
    )
    _write_output(out, attended, prefix)


def _write_output(out: _Writer, attended: int, prefix: str) -> None:
    weight, bias = out.matrix(f"{prefix}o_proj.weight"), out.vector(f"{prefix}o_proj.bias")
    moments = out.watch([f"{prefix}o_proj.weight"])
    first = out.engine.linear(attended, None, 0.0, [weight], [bias], [out.buffers["hidden"]], True, moments)
    out.number([f"{prefix}o_proj"], first)


def _write_feed_forward(out: _Writer, layer: int, *, moe: bool) -> None:
    config, prefix = out.config, f"model.layers.{layer}.mlp."
    norm = out.array(f"model.layers.{layer}.post_attention_layernorm.weight")
    hidden = out.buffers["hidden"]
    if not moe:
        dense = [out.matrix(f"{prefix}{part}.weight") for part in EXPERT_PARTS]
        first = out.engine.feed_forward(
            hidden, norm, config.rms_norm_eps, dense, None, None, [], {}, _watch_mlp(out, prefix)
        )
        out.number([f"{prefix}{part}" for part in EXPERT_PARTS], first)
        return
    experts = config.moe
    assert experts is not None
    shared = (
        [out.matrix(f"{prefix}shared_experts.{part}.weight") for part in EXPERT_PARTS]
        if experts.n_shared_experts
        else []
    )
    router = out.once(f"{prefix}gate.weight", lambda: out.added(pack_array(out.array(f"{prefix}gate.weight"), "f32")))
    routing = {
        "num_experts_per_tok": experts.num_experts_per_tok,
        "n_group": 1 if experts.topk_method == "greedy" else experts.n_group,
        "topk_group": experts.topk_group,
        "sigmoid": experts.scoring_func == "sigmoid",
        "top_two": experts.topk_method == "noaux_tc",
        "normalise": experts.norm_topk_prob,
        "scaling": experts.routed_scaling_factor,
    }
    first = out.engine.feed_forward(
        hidden, norm, config.rms_norm_eps, shared, router, out.vector(f"{prefix}gate.e_score_correction_bias"),
        [out.matrix(f"{prefix}experts.{part}.weight") for part in EXPERT_PARTS], routing,
        [*(_watch_mlp(out, f"{prefix}shared_experts.") if shared else []),
         *_watch_mlp(out, f"{prefix}experts.", experts.n_routed_experts)],
    )  # fmt: skip
    out.number([f"{prefix}{kind}.{part}" for kind in ("shared_experts", "experts") for part in EXPERT_PARTS], first)


def _watch_mlp(out: _Writer, prefix: str, count: int = 1) -> list[NDArray[np.float32]]:
    gate_and_up, down = [f"{prefix}gate_proj.weight", f"{prefix}up_proj.weight"], [f"{prefix}down_proj.weight"]
    return [array for names in (gate_and_up, down) if (array := out.watch(names, count)) is not None]
