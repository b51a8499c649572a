"""The readable network as an engine: PyTorch, float32, one sequence a session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shoal.errors import MissingExtraError
from shoal.formats.checkpoint import Checkpoint

PREFILL_CHUNK = 512


class TorchBackend:
    """Holds the weights; `session` starts an independent sequence."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("train", "running a model on PyTorch") from error
        from shoal.model.load import load_model

        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(checkpoint).eval()

    def session(self, capacity: int) -> TorchSession:
        """An empty sequence that can grow to `capacity` tokens."""
        return TorchSession(self, capacity)


class TorchSession:
    """One sequence and its cache."""

    def __init__(self, backend: TorchBackend, capacity: int) -> None:
        from shoal.model.cache import new_cache

        self._model = backend.model
        self._cache = new_cache(backend.model.config, batch=1, capacity=capacity)

    def forward(self, tokens: Sequence[int], *, every: bool = False) -> NDArray[np.float32]:
        """Append tokens and return float32 logits: [1, V] after the last one, or [T, V] after each if `every`."""
        import torch

        out: list[NDArray[np.float32]] = []
        with torch.inference_mode():
            for start in range(0, len(tokens), PREFILL_CHUNK):
                chunk_BT = torch.tensor([tokens[start : start + PREFILL_CHUNK]])
                last = start + PREFILL_CHUNK >= len(tokens)
                logits_BTV = self._model(chunk_BT, cache=self._cache, last_only=not every)
                if every or last:
                    out.append(logits_BTV[0].numpy())
        return out[0] if len(out) == 1 else np.concatenate(out)
