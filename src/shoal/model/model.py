"""The whole network: embed, decode layer by layer, normalise, project to the vocabulary.

`Model(config).state_dict()` has exactly the names and shapes of `formats.layout.expected_tensors(config)`. It knows
nothing of files, quantisation or parallelism; those wrap it from outside.

Shapes: B batch, T query, S cached, D model, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.attend import attention_mask
from shoal.model.block import Block
from shoal.model.cache import KVCache, LatentCache
from shoal.model.moe import Router, Routing, StackedLinear
from shoal.model.mtp import MTPBlock
from shoal.model.norm import RMSNorm
from shoal.model.rope import RopeTable, rope_table


class States(NamedTuple):
    """What the layers yield before the output head.

    Attributes:
        hidden_BTD: states after the final norm: `Model.logits` projects them, the MTP layers continue from them.
        routings: where the tokens went, by layer index; layers without experts are absent.
    """

    hidden_BTD: Tensor
    routings: dict[int, Routing]


class Decoder(nn.Module):
    """Embedding, layers and final norm. MTP layers, if any, follow the main ones in `layers`, as they are numbered."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [Block(config, moe=config.is_moe_layer(layer)) for layer in range(config.num_hidden_layers)]
        )
        self.layers.extend(MTPBlock(config) for _ in config.mtp_layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Model(nn.Module):
    """A decoder-only language model of any supported family, freshly initialised.

    To make one without touching its memory, build it under `torch.device("meta")`; `load_model` does.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self.init_weights()

    def forward(
        self,
        tokens_BT: Tensor,
        *,
        cache: LatentCache | KVCache | None = None,
        positions: Tensor | None = None,
        documents_BT: Tensor | None = None,
        absorbed: bool = False,
        last_only: bool = False,
    ) -> Tensor:
        """Read tokens and score what comes next: logits_BTV, or [B, 1, V] of the last position if `last_only`.

        Args:
            tokens_BT: token ids.
            cache: what was read before, equally long in all rows; the new tokens are added to it.
            positions: positions for the rotation, [T] or [B, T]; by default they count on from the cache.
            documents_BT: a number for each token; tokens see only those of the same document. Not with a filled cache.
            absorbed: compute latent attention over the cached latents themselves (`mla`). Same result, other cost.
        """
        states = self.states(tokens_BT, cache=cache, positions=positions, documents_BT=documents_BT, absorbed=absorbed)
        return self.logits(states.hidden_BTD[:, -1:] if last_only else states.hidden_BTD)

    def states(
        self,
        tokens_BT: Tensor,
        *,
        cache: LatentCache | KVCache | None = None,
        positions: Tensor | None = None,
        documents_BT: Tensor | None = None,
        absorbed: bool = False,
    ) -> States:
        """All of `forward` but the output head, and where the tokens went. Arguments as there."""
        rope, mask = self._rope_and_mask(tokens_BT, cache, positions, documents_BT)
        routings: dict[int, Routing] = {}
        x_BTD = self.model.embed_tokens(tokens_BT)
        for index in range(self.config.num_hidden_layers):
            layer_cache = cache.layer(index) if cache is not None else None
            x_BTD, routing = self.model.layers[index](x_BTD, rope, mask, layer_cache, absorbed=absorbed)
            if routing is not None:
                routings[index] = routing
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return States(self.model.norm(x_BTD), routings)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores over the vocabulary of states after the final norm or an MTP layer. [B, T, V]."""
        if self.lm_head is None:
            return F.linear(hidden_BTD, self.model.embed_tokens.weight)
        return self.lm_head(hidden_BTD)  # type: ignore[no-any-return]

    def predict_further(
        self,
        hidden_BTD: Tensor,
        next_tokens_BT: Tensor,
        *,
        depth: int = 1,
        cache: LatentCache | KVCache | None = None,
        positions: Tensor | None = None,
        documents_BT: Tensor | None = None,
        absorbed: bool = False,
    ) -> States:
        """Run MTP layer `depth` (from 1): states h_i and tokens t_{i+depth} to states whose logits score t_{i+depth+1}.

        Args:
            hidden_BTD: `States.hidden_BTD` of the main model, or of the depth before.
            next_tokens_BT: for each state, the token `depth` positions after it.
            cache: this depth's own, `new_cache(config, num_layers=1, …)`; the new tokens are added to it.
            positions, documents_BT, absorbed: as in `forward`, of the states.
        """
        if not 1 <= depth <= self.config.num_nextn_predict_layers:
            raise ValueError(f"depth {depth}: the model has {self.config.num_nextn_predict_layers} MTP layers")
        rope, mask = self._rope_and_mask(next_tokens_BT, cache, positions, documents_BT)
        layer = self.config.mtp_layers[depth - 1]
        layer_cache = cache.layer(0) if cache is not None else None
        next_BTD = self.model.embed_tokens(next_tokens_BT)
        hidden_BTD, routing = self.model.layers[layer](hidden_BTD, next_BTD, rope, mask, layer_cache, absorbed=absorbed)
        if cache is not None:
            cache.length += next_tokens_BT.shape[1]
        return States(hidden_BTD, {} if routing is None else {layer: routing})

    def predict_further_over_text(
        self,
        hidden_BTD: Tensor,
        tokens_BT: Tensor,
        *,
        positions: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> list[States]:
        """Every MTP depth over a known text, for training. Depth k's state i, of T - k, scores token i + k + 1.

        The text itself supplies the next tokens, so each depth ends one position earlier. At the end of a packed
        document the next token is the following document's: leave those targets out of the loss.
        """
        out: list[States] = []
        for depth in range(1, min(self.config.num_nextn_predict_layers, tokens_BT.shape[1] - 1) + 1):
            states = self.predict_further(
                hidden_BTD[:, :-1],
                tokens_BT[:, depth:],
                depth=depth,
                positions=None if positions is None else positions[..., :-depth],
                documents_BT=None if documents_BT is None else documents_BT[:, :-depth],
            )
            hidden_BTD = states.hidden_BTD
            out.append(states)
        return out

    def _rope_and_mask(
        self,
        tokens_BT: Tensor,
        cache: LatentCache | KVCache | None,
        positions: Tensor | None,
        documents_BT: Tensor | None,
    ) -> tuple[RopeTable, Tensor | None]:
        """What all layers of a pass share: the rotations of the new tokens and what they may see."""
        start, num_new = cache.length if cache is not None else 0, tokens_BT.shape[1]
        if positions is None:
            positions = torch.arange(start, start + num_new, device=tokens_BT.device)
        rope = rope_table(self.config.rope, self.config.attention.rope_dim, positions)
        return rope, attention_mask(num_new, start + num_new, documents_BT, tokens_BT.device)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None, part: nn.Module | None = None) -> None:
        """Draw every weight anew as published: normal of `initializer_range`, biases zero, norms one.

        Args:
            generator: source of randomness, on the parameters' device; by default torch's own.
            part: draw for this submodule only.
        """
        for module in (self if part is None else part).modules():
            if isinstance(module, (nn.Linear, nn.Embedding, StackedLinear, Router)):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            if isinstance(module, Router) and module.config.has_selection_bias:
                module.e_score_correction_bias.zero_()
