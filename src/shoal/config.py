"""What a model is: its shape, in the field names of the published configurations.

Plain data without file knowledge: `formats.hf_config` reads and writes `config.json`, `formats.gguf` the
metadata of GGUF files. Everything here is checked when it is made, so the rest of the house can trust it.

Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), YaRN (arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.errors import ConfigError

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "llama", "qwen2", "qwen3")
ROPE_TYPES = ("linear", "llama3", "longrope", "yarn")
TOPK_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORING_FUNCS = ("softmax", "sigmoid")
# No published model comes near; a larger value is a damaged or hostile file.
MAX_DIM = 1 << 26


def _whole(name: str, value: object, low: int = 1, high: int = MAX_DIM) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(name, f"must be a whole number, got {value!r}")
    if not low <= value <= high:
        raise ConfigError(name, f"must lie between {low} and {high}, got {value}")


def _finite(name: str, value: object, low: float, high: float = 1e12) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(name, f"must be a finite number, got {value!r}")
    if not low <= value <= high:
        raise ConfigError(name, f"must lie between {low} and {high}, got {value}")


def _flags(part: object, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(part, name)
        if not isinstance(value, bool):
            raise ConfigError(name, f"must be true or false, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched past the trained length.

    `rope_type` picks the rule: `linear`, `llama3` (low_freq_factor, high_freq_factor), `yarn` (beta_fast, beta_slow,
    mscale, mscale_all_dim, attention_factor) or `longrope` (short_factor and long_factor: a divisor for each frequency;
    the two lists must agree, as they do where the divisors stand for a chosen set of frequencies).
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ConfigError("rope_scaling.rope_type", f"{self.rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
        _finite("rope_scaling.factor", self.factor, 1.0, 1e6)
        for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
            _finite(f"rope_scaling.{name}", getattr(self, name), 1e-6, 1e6)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                _finite(f"rope_scaling.{name}", getattr(self, name), 0.0, 1e6)
        if self.original_max_position_embeddings is not None:
            _whole("rope_scaling.original_max_position_embeddings", self.original_max_position_embeddings, high=1 << 40)
        elif self.rope_type != "linear":
            raise ConfigError(
                "rope_scaling.original_max_position_embeddings", f"is required by rope_type {self.rope_type!r}"
            )
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ConfigError("rope_scaling.high_freq_factor", "must be greater than low_freq_factor")
        if self.rope_type == "longrope":
            self._check_factors()

    def _check_factors(self) -> None:
        for name in ("short_factor", "long_factor"):
            for value in getattr(self, name):
                _finite(f"rope_scaling.{name}", value, 1e-12)
        if not self.short_factor:
            raise ConfigError("rope_scaling.short_factor", "is required by rope_type 'longrope'")
        if self.short_factor != self.long_factor:
            problem = "differs from short_factor; frequencies that change with the length of a text are not supported"
            raise ConfigError("rope_scaling.long_factor", problem)


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions. `interleave`: pairs are (x0, x1), (x2, x3) … (DeepSeek); else (x0, x_half) … (Llama)."""

    rope_theta: float = 10000.0
    scaling: RopeScaling | None = None
    interleave: bool = False

    def __post_init__(self) -> None:
        _finite("rope_theta", self.rope_theta, 1.0)
        _flags(self, ("interleave",))


@dataclass(frozen=True, kw_only=True)
class GQAConfig:
    """Grouped-query attention (Llama, Qwen). The bias flags and the q/k norm are what tells the families apart."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            _whole(name, getattr(self, name), high=1 << 16)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                "num_key_value_heads", f"{self.num_key_value_heads} does not divide {self.num_attention_heads} heads"
            )
        if self.head_dim % 2:
            raise ConfigError("head_dim", f"must be even for rotary positions, got {self.head_dim}")
        _flags(self, ("qkv_bias", "o_bias", "qk_norm"))

    @property
    def cache_width(self) -> int:
        """Values cached for one token in one layer: keys and values of every KV head."""
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2 §2.1): a latent of `kv_lora_rank` and one shared rotary key a token."""

    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    attention_bias: bool = False

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            _whole(name, getattr(self, name), high=1 << 16)
        if self.q_lora_rank is not None:
            _whole("q_lora_rank", self.q_lora_rank, high=1 << 16)
        if self.qk_rope_head_dim % 2:
            raise ConfigError("qk_rope_head_dim", f"must be even, got {self.qk_rope_head_dim}")
        _flags(self, ("attention_bias",))

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Values cached for one token in one layer: the latent and the rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def rope_dim(self) -> int:
        return self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Many small experts, few per token (DeepSeekMoE, arXiv 2401.06066), with the three published routings.

    `greedy`: softmax, top-k (V2-Lite). `group_limited_greedy`: softmax, best groups by their maximum (V2).
    `noaux_tc`: sigmoid with a selection-only bias, best groups by the sum of their two best (V3).
    """

    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    n_shared_experts: int = 0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "noaux_tc"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        _whole("n_routed_experts", self.n_routed_experts, high=1 << 16)
        _whole("num_experts_per_tok", self.num_experts_per_tok, high=1 << 16)
        _whole("moe_intermediate_size", self.moe_intermediate_size)
        _whole("n_shared_experts", self.n_shared_experts, low=0, high=1 << 12)
        _whole("first_k_dense_replace", self.first_k_dense_replace, low=0, high=1 << 16)
        _whole("moe_layer_freq", self.moe_layer_freq, high=1 << 16)
        _whole("n_group", self.n_group, high=1 << 16)
        _whole("topk_group", self.topk_group, high=1 << 16)
        _finite("routed_scaling_factor", self.routed_scaling_factor, 1e-6, 1e6)
        _flags(self, ("norm_topk_prob",))
        if self.topk_method not in TOPK_METHODS:
            raise ConfigError("topk_method", f"{self.topk_method!r} is not one of {', '.join(TOPK_METHODS)}")
        if self.scoring_func not in SCORING_FUNCS:
            raise ConfigError("scoring_func", f"{self.scoring_func!r} is not one of {', '.join(SCORING_FUNCS)}")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                "num_experts_per_tok", f"{self.num_experts_per_tok} exceeds the {self.n_routed_experts} routed experts"
            )
        if self.topk_method != "greedy":
            self._check_groups()

    def _check_groups(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ConfigError("n_group", f"{self.n_group} does not divide {self.n_routed_experts} routed experts")
        if self.topk_group > self.n_group:
            raise ConfigError("topk_group", f"{self.topk_group} exceeds the {self.n_group} groups")
        per_group = self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise ConfigError(
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} exceeds the experts of {self.topk_group} groups of {per_group}",
            )
        if self.topk_method == "noaux_tc" and per_group < 2 and self.n_group > 1:
            raise ConfigError("n_group", f"{self.n_group} groups of one expert; noaux_tc looks at a group's two best")

    @property
    def has_selection_bias(self) -> bool:
        return self.topk_method == "noaux_tc"

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the shared experts, which are stored and run as one MLP."""
        return self.n_shared_experts * self.moe_intermediate_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network. Sizes are in elements; `eos_token_id` holds every id that ends a text."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    attention: GQAConfig | MLAConfig
    moe: MoEConfig | None = None
    rope: RopeConfig = field(default_factory=RopeConfig)
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    mlp_bias: bool = False
    num_nextn_predict_layers: int = 0
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise ConfigError("model_type", f"{self.model_type!r} is not one of {', '.join(MODEL_TYPES)}")
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            _whole(name, getattr(self, name))
        _whole("num_hidden_layers", self.num_hidden_layers, high=1 << 14)
        _whole("max_position_embeddings", self.max_position_embeddings, high=1 << 40)
        _whole("num_nextn_predict_layers", self.num_nextn_predict_layers, low=0, high=64)
        _finite("rms_norm_eps", self.rms_norm_eps, 0.0, 1.0)
        _finite("initializer_range", self.initializer_range, 0.0, 100.0)
        _flags(self, ("tie_word_embeddings", "mlp_bias"))
        for name, ids in (
            ("bos_token_id", (self.bos_token_id,)),
            ("eos_token_id", self.eos_token_id),
            ("pad_token_id", (self.pad_token_id,)),
        ):
            for token in ids:
                if token is not None:
                    _whole(name, token, low=-1)
        if self.is_mla != isinstance(self.attention, MLAConfig):
            raise ConfigError("model_type", f"{self.model_type!r} does not go with {type(self.attention).__name__}")
        factors = self.rope.scaling.short_factor if self.rope.scaling is not None else ()
        if factors and len(factors) != self.attention.rope_dim // 2:
            problem = f"holds {len(factors)} numbers, the rotary dimensions are {self.attention.rope_dim // 2} pairs"
            raise ConfigError("rope_scaling.short_factor", problem)
        if self.moe is not None and not self.is_mla:
            raise ConfigError("n_routed_experts", f"experts are not part of model_type {self.model_type!r}")

    @property
    def is_mla(self) -> bool:
        return self.model_type in ("deepseek_v2", "deepseek_v3")

    @property
    def mtp_layers(self) -> range:
        """Indices of the multi-token-prediction layers, which follow the main ones (DeepSeek-V3 §2.2)."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_moe_layer(self, layer: int) -> bool:
        if self.moe is None:
            return False
        return layer >= self.moe.first_k_dense_replace and layer % self.moe.moe_layer_freq == 0

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))
