"""What each matrix is multiplied with: the mean square of every input column over a text, from the engine's own run.

This is the diagonal of the layer's input covariance, the weight of a column's rounding error in the layer's output.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shoal.formats.checkpoint import Checkpoint

if TYPE_CHECKING:
    from shoal.engine.core import Core

Floats = NDArray[np.float32]
WINDOW = 512
# An expert that met few tokens is told by its layer's average, which counts as this many tokens.
PRIOR_TOKENS = 16.0
_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(.*)")


class Importance:
    """Mean squares by published tensor name. Matrices that the text never reached have none."""

    def __init__(self, moments: dict[str, Floats]) -> None:
        self._moments = moments

    def columns(self, name: str) -> Floats | None:
        """float32 [columns] for a tensor `…weight`; an expert's is `…experts.7.up_proj.weight`."""
        expert = _EXPERT.fullmatch(name)
        moments = self._moments.get(f"{expert[1]}.{expert[3]}" if expert else name)
        if moments is None:
            return None
        total = moments.sum(axis=0, dtype=np.float64)
        if total[-1] == 0:
            return None
        mean = total[:-1] / total[-1]
        if expert is None:
            return np.asarray(mean, np.float32)
        own = moments[int(expert[2])].astype(np.float64)
        return np.asarray((own[:-1] + PRIOR_TOKENS * mean) / (own[-1] + PRIOR_TOKENS), np.float32)


def calibrate(
    checkpoint: Checkpoint,
    windows: Sequence[Sequence[int]],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Importance:
    """Run windows of token ids through the model. The whole model is in memory meanwhile."""
    from shoal.engine.core import Core

    moments: dict[str, Floats] = {}
    longest = max((len(window) for window in windows), default=1)
    # A prediction layer runs after each step that leaves something to run: it sees all but the last one.
    step_tokens = -(-longest // 4) if checkpoint.config.num_nextn_predict_layers else longest
    core = Core(
        checkpoint, threads=threads, cache="f32", cache_tokens=longest, moments=moments, look_ahead=True,
        step_tokens=step_tokens,
    )  # fmt: skip
    done, total = 0, sum(len(window) for window in windows)
    for window in windows:
        _read(core, list(window))
        done += len(window)
        if progress is not None:
            progress(done, total)
    return Importance(moments)


def _read(core: Core, tokens: list[int]) -> None:
    from shoal.engine.params import SamplingParams
    from shoal.engine.sampler import Sampler
    from shoal.engine.sequence import Sequence as Running

    params = SamplingParams()
    running = Running(
        tokens=tokens, prompt_tokens=len(tokens), params=params, sampler=Sampler(params, tokens, core.vocab_size),
        max_tokens=0, watch=lambda first, rows: None,
    )  # fmt: skip
    core.submit(running)
    try:
        core.advance(running)
        if running.error is not None:
            raise running.error
    finally:
        core.release(running)
