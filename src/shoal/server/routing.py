"""The live feed of the page, and of whoever asks with `"routing": true`: where the tokens of a stream went.

Each report is an event of its own in the stream, with no choices, as the one that carries `usage`:

    {…, "choices": [], "routing": {"index": 0, "first": 12, "prompt_tokens": 9, "tokens": ["The", …],
                                   "experts": [[[3, 8], …], …], "weights": the same shape, "entropy": [[1.9, …], …]}}

`experts` and `weights` are [layers with experts, tokens, picked], `entropy` [layers, tokens] in nats; `first` is the
position of the first token, and from `prompt_tokens` on they are the answer's. A token is reported when it has been
read, one event after the one that brought its text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from shoal.cost.model_cost import cache_bytes_per_token, full_cache_bytes_per_token
from shoal.engine import LLM
from shoal.engine.routing import Routing, routed_layers
from shoal.formats.tokenizer import Tokenizer
from shoal.server.worker import Piece

Events = Callable[[Piece], list[dict[str, Any]]]
HEAD = ("id", "object", "created", "model")


def with_routing(make_events: Events, tokenizer: Tokenizer) -> Events:
    """`make_events` followed by what a piece says about routing. It waits for the stream's first event, whose head it
    repeats."""
    head: dict[str, Any] = {}
    held: list[dict[str, Any]] = []

    def events(piece: Piece) -> list[dict[str, Any]]:
        out = make_events(piece)
        held.extend(describe(piece[0], routing, tokenizer) for routing in piece[1].routing)
        if out and not head:
            head.update({name: out[0][name] for name in HEAD})
        if head and held:
            # Before the events of this piece, the last of which may end the stream.
            ready = [{**head, "choices": [], "routing": report} for report in held]
            held.clear()
            return [*out[:1], *ready, *out[1:]]
        return out

    return events


def describe(index: int, routing: Routing, tokenizer: Tokenizer) -> dict[str, Any]:
    """One report as JSON, weights and entropy to four digits."""
    return {
        "index": index,
        "first": routing.first,
        "prompt_tokens": routing.prompt_tokens,
        "tokens": [tokenizer.token_bytes(token).decode(errors="replace") for token in routing.tokens],
        "experts": routing.experts_LTK.tolist(),
        "weights": _short(routing.weights_LTK),
        "entropy": _short(routing.entropy_LT),
    }


def _short(values: Any) -> Any:
    return np.round(values.astype(np.float64), 4).tolist()


def facts(llm: LLM, name: str) -> dict[str, Any]:
    """What the page shows beside the routing: the model's experts, and its cache beside one of full heads."""
    config, load = llm.config, llm.load
    experts = None
    if config.moe is not None:
        experts = {
            "layers": routed_layers(config),
            "n_routed_experts": config.moe.n_routed_experts,
            "num_experts_per_tok": config.moe.num_experts_per_tok,
            "n_shared_experts": config.moe.n_shared_experts,
        }
    cached = llm.cache_bytes_per_token
    full = round(cached * full_cache_bytes_per_token(config) / cache_bytes_per_token(config))
    return {
        "model": name,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "max_context": llm.max_context,
        "chat": llm.chat_format is not None,
        "temperature": llm.generation.temperature,  # what the model recommends, if anything
        "experts": experts,
        "cache": {
            "bytes_per_token": cached,
            "full_bytes_per_token": full,
            "tokens": load.pages * (llm.cache_tokens // load.pages),
            "tokens_in_use": load.pages_in_use * (llm.cache_tokens // load.pages),
        },
    }
