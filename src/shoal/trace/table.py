"""The file: Parquet with a row for every token and layer with experts.

Rows of one step are neighbours, and inside it those of one token. Columns, beside `experts` and `weights` (lists of K,
best first) and `entropy` (of the router's probabilities over all experts, in nats):

    request, position, generated    which text (numbered as they came), where in it, prompt or answer
    token, text                     what stands there; null where the recorder was told to keep no text
    layer                           of the network, as in the names of the weights
    step, step_rows                 the network call that read the token, and how many tokens it read
    start, seconds                  when that call began, after the recording began, and how long it took
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.config import ModelConfig
from shoal.engine.routing import Routing, routed_layers, router_entropy
from shoal.errors import ConfigError, FileError, MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:  # pragma: no cover - the extra is part of the tests' environment
    raise MissingExtraError("trace", "recording where tokens go") from error

META = b"shoal.trace"
MAX_EXPERTS = 1 << 16
BATCH_ROWS = 1 << 16
TokenText = Callable[[int], bytes]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The model whose experts were watched; kept in the file."""

    model: str
    layers: tuple[int, ...]
    n_routed_experts: int
    num_experts_per_tok: int
    started: str  # when the recording began, ISO 8601

    @staticmethod
    def of(config: ModelConfig, *, model: str, started: str) -> Shape:
        """ConfigError if the model has no experts."""
        layers = tuple(routed_layers(config))
        if config.moe is None or not layers:
            raise ConfigError("n_routed_experts", f"{model} has no experts, so there is nothing to trace")
        return Shape(
            model=model, layers=layers, n_routed_experts=config.moe.n_routed_experts,
            num_experts_per_tok=config.moe.num_experts_per_tok, started=started,
        )  # fmt: skip

    def schema(self) -> pa.Schema:
        experts = pa.int16() if self.n_routed_experts <= 1 << 15 else pa.int32()
        fields: list[tuple[str, Any]] = [
            ("request", pa.int32()), ("position", pa.int32()), ("generated", pa.bool_()), ("token", pa.int32()),
            ("text", pa.dictionary(pa.int32(), pa.string())), ("layer", pa.int16()),
            ("experts", pa.list_(experts, self.num_experts_per_tok)),
            ("weights", pa.list_(pa.float32(), self.num_experts_per_tok)), ("entropy", pa.float32()),
            ("step", pa.int64()), ("step_rows", pa.int32()), ("start", pa.float64()), ("seconds", pa.float32()),
        ]  # fmt: skip
        return pa.schema(fields, {META: json.dumps(asdict(self)).encode()})


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One report, and whose it is."""

    request: int
    routing: Routing


def to_table(parts: Sequence[Heard], shape: Shape, *, begin: float, text: TokenText | None) -> pa.Table:
    """Reports as rows. `begin` is the clock (`time.perf_counter`) when the recording began; without `text` neither
    tokens nor their text are kept."""
    layers, schema = len(shape.layers), shape.schema()

    def by_token(value: Callable[[Heard], Any], dtype: Any) -> Any:
        """A value for each token of a report, repeated for its layers."""
        pieces = [np.broadcast_to(np.asarray(value(part), dtype), len(part.routing.tokens)) for part in parts]
        return np.repeat(np.concatenate(pieces), layers)

    def by_row(name: str) -> Any:
        return np.concatenate([np.ascontiguousarray(getattr(p.routing, name).swapaxes(0, 1)).ravel() for p in parts])

    tokens = by_token(lambda part: part.routing.tokens, np.int32)
    positions = [part.routing.first + np.arange(len(part.routing.tokens)) for part in parts]
    generated = [place >= part.routing.prompt_tokens for place, part in zip(positions, parts, strict=True)]
    scores_LRE = np.concatenate([part.routing.scores_LTE for part in parts], axis=1)
    kind, width = schema.field("experts").type.value_type, shape.num_experts_per_tok
    columns = {
        "request": by_token(lambda part: part.request, np.int32),
        "position": np.repeat(np.concatenate(positions).astype(np.int32), layers),
        "generated": np.repeat(np.concatenate(generated), layers),
        "token": tokens if text else pa.nulls(len(tokens), pa.int32()),
        "text": _texts(tokens, text) if text else pa.nulls(len(tokens), schema.field("text").type),
        "layer": np.tile(np.array(shape.layers, np.int16), len(tokens) // layers),
        "experts": pa.FixedSizeListArray.from_arrays(pa.array(by_row("experts_LTK")).cast(kind), width),
        "weights": pa.FixedSizeListArray.from_arrays(pa.array(by_row("weights_LTK")), width),
        "entropy": router_entropy(scores_LRE, sigmoid=parts[0].routing.sigmoid).T.ravel(),
        "step": by_token(lambda part: part.routing.step.number, np.int64),
        "step_rows": by_token(lambda part: part.routing.step.rows, np.int32),
        "start": by_token(lambda part: part.routing.step.started - begin, np.float64),
        "seconds": by_token(lambda part: part.routing.step.seconds, np.float32),
    }
    return pa.table(columns, schema=schema)


def _texts(tokens: Any, text: TokenText) -> pa.DictionaryArray:
    unique, index = np.unique(tokens, return_inverse=True)
    words = [text(int(token)).decode(errors="replace") for token in unique]
    return pa.DictionaryArray.from_arrays(index.astype(np.int32), pa.array(words, pa.string()))


class TraceFile:
    """A recorded file, read piece by piece.

    Raises:
        FileError: it cannot be read or is no recording of ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            problem = error.strerror if isinstance(error, OSError) and error.strerror else "is no Parquet file"
            raise FileError(path, problem) from error
        self.shape = self._shape()
        self.num_rows: int = self._file.metadata.num_rows

    def _shape(self) -> Shape:
        schema = self._file.schema_arrow
        try:
            facts = json.loads((schema.metadata or {})[META])
            shape = Shape(**{**facts, "layers": tuple(facts["layers"])})
        except (KeyError, ValueError, TypeError) as error:
            raise FileError(self.path, "is no trace that Shoal recorded") from error
        counts = (shape.n_routed_experts, shape.num_experts_per_tok, *shape.layers)
        whole = all(type(count) is int for count in counts)
        if not whole or not 1 <= shape.num_experts_per_tok <= shape.n_routed_experts <= MAX_EXPERTS or not shape.layers:
            raise FileError(self.path, "describes an impossible model")
        if not schema.equals(shape.schema()):
            raise FileError(self.path, "has other columns than a trace of this model")
        return shape

    def batches(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Columns as NumPy arrays, at most 65536 rows at a time; lists as [rows, K], text as a list of strings."""
        known, last = np.array(self.shape.layers), self.shape.n_routed_experts
        try:
            for batch in self._file.iter_batches(BATCH_ROWS, columns=list(columns)):
                out = {name: _column(batch.column(name)) for name in columns}
                if "layer" in out and not np.isin(out["layer"], known).all():
                    raise FileError(self.path, "names a layer that the model lacks", item="layer")
                picks = out.get("experts", known[:0])
                if picks.size and not 0 <= picks.min() <= picks.max() < last:
                    raise FileError(self.path, "names an expert that the model lacks", item="experts")
                yield out
        except (OSError, pa.ArrowInvalid) as error:
            raise FileError(self.path, f"is damaged: {error}") from error


def _column(array: Any) -> Any:
    if pa.types.is_dictionary(array.type):
        return array.to_pylist()
    if pa.types.is_fixed_size_list(array.type):
        return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, array.type.list_size)
    return array.to_numpy(zero_copy_only=False)
