"""Everything that decides what comes out of a run: one frozen value, stored beside the result."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shoal.data.plan import SHARD_BYTES, Source
from shoal.data.read import MAX_DOCUMENT, ReadOptions
from shoal.data.rules import rules_for
from shoal.errors import ConfigError, FileError, MissingExtraError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to read and what to do with it. Neither workers nor memory nor engine are part of it: they change no byte.

    Attributes:
        sources: files and folders; earlier ones win where two hold the same text.
        text_field, id_field: columns of rows.
        max_document: bytes; larger documents and lines are passed over.
        rules: names of rule sets (`shoal.data.rules`).
        identify_language: tell the natural language of texts, for 60 MB a worker and a millisecond a text.
        languages: what to keep, ISO 639-1 codes for text and names such as `python` for code; empty keeps all.
        licences: `any`, or `permissive`: only what asks for attribution at most.
        evaluations: files whose pieces no document may hold.
        mask_pii: replace addresses, keys and numbers of people.
        near_duplicates: similarity of five-word runs from which two documents are one; 0 looks for exact copies only.
        band: quantiles of compressibility (and surprise) between which documents are kept; None leaves that stage out.
        entropy_model: reference model whose surprise counts in the band as well; None for compressibility alone.
        tokenizer: folder or model name; None with `vocab_size` trains one, None without packs nothing.
        vocab_size: of the tokenizer to train.
        keep_rejects: write what was dropped to `rejects/`.
        strict: the first unreadable row or file stops the run.
        seed: of samples, hashes and the tokenizer's training text.
        shard_bytes: of input in one shard.
    """

    sources: tuple[Source, ...]
    text_field: str = "text"
    id_field: str = "id"
    max_document: int = MAX_DOCUMENT
    rules: tuple[str, ...] = ("auto",)
    identify_language: bool = True
    languages: tuple[str, ...] = ()
    licences: str = "any"
    evaluations: tuple[Path, ...] = ()
    mask_pii: bool = True
    near_duplicates: float = 0.7
    entropy_model: str | None = None
    band: tuple[float, float] | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    keep_rejects: bool = False
    strict: bool = False
    seed: int = 0
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        rules_for(self.rules)
        if not self.sources:
            raise ConfigError("sources", "must name at least one file or folder")
        names = [source.metadata()["source"] for source in self.sources]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise ConfigError("sources", f"two are called {twice!r}; give one another name in a recipe file")
        kind = next((source.kind for source in self.sources if source.kind not in (None, "text", "code")), None)
        if kind is not None:
            raise ConfigError("kind", f"must be text or code, got {kind!r}")
        if self.languages and not self.identify_language:
            raise ConfigError("languages", "cannot be told apart with identify_language off")
        if self.licences not in ("any", "permissive"):
            raise ConfigError("licences", f"must be any or permissive, got {self.licences!r}")
        if not 0 <= self.near_duplicates <= 1:
            raise ConfigError("near_duplicates", f"must lie between 0 and 1, got {self.near_duplicates}")
        if self.band is not None and (len(self.band) != 2 or not 0 <= self.band[0] < self.band[1] <= 1):
            raise ConfigError("band", f"must be two rising numbers between 0 and 1, got {self.band}")
        if self.entropy_model and self.band is None:
            raise ConfigError("entropy_model", "scores documents for a band, and none is given")
        if self.tokenizer and self.vocab_size:
            raise ConfigError("vocab_size", "trains a tokenizer, so that none can be given as well")
        for name, low in (("max_document", 1), ("shard_bytes", 1), ("vocab_size", 258), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not low <= value < 1 << 63:
                raise ConfigError(name, f"must be at least {low} and below 2**63, got {value}")

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(
            text_field=self.text_field, id_field=self.id_field, max_document=self.max_document, strict=self.strict
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `recipe.json` holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))  # type: ignore[no-any-return]


def recipe_from(data: Mapping[str, Any], where: Path) -> Recipe:
    """A recipe from the values of a TOML or JSON file; paths are relative to the file.

    Raises:
        ConfigError: a field is unknown or impossible.
    """
    fields = {field.name for field in dataclasses.fields(Recipe)}
    values = {_known(key.replace("-", "_"), fields, where): value for key, value in data.items()}
    for field in dataclasses.fields(Recipe):
        value = values.get(field.name, field.default)
        if type(field.default) in (bool, int, str) and type(value) is not type(field.default):
            raise FileError(where, f"must be a {type(field.default).__name__}, got {value!r}", item=field.name)
    base = where.parent
    try:
        for name in ("sources", "evaluations", "rules", "languages", "band"):
            if values.get(name) is not None:
                values[name] = tuple([values[name]] if isinstance(values[name], str) else values[name])
        values["sources"] = tuple(_source(one, base, where) for one in values.get("sources", ()))
        values["evaluations"] = tuple(base / one for one in values.get("evaluations", ()))
        return Recipe(**values)
    except TypeError as error:
        raise FileError(where, f"a field has the wrong type: {error}") from error


def load_recipe(path: Path) -> Recipe:
    """Read a recipe file. Raises FileError or ConfigError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    try:
        data = json.loads(content) if path.suffix == ".json" else _toml(content.decode())
    except ValueError as error:
        raise FileError(path, f"is not valid {path.suffix[1:].upper() or 'TOML'}: {error}") from error
    if not isinstance(data, dict):
        raise FileError(path, "must hold an object")
    return recipe_from(data, path)


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        try:
            import tomli as tomllib
        except ImportError as error:
            raise MissingExtraError("data", "reading TOML") from error
    else:
        import tomllib
    return tomllib.loads(text)


def _source(value: Any, base: Path, where: Path) -> Source:
    if isinstance(value, str):
        return Source(path=base / value)
    fields = {field.name for field in dataclasses.fields(Source)}
    if not isinstance(value, dict) or "path" not in value:
        raise FileError(where, "each of sources must be a path or have one", item="sources")
    for key in value:
        _known(key, fields, where)
    return Source(**{**value, "path": base / value["path"]})


def _known(key: str, fields: set[str], where: Path) -> str:
    import difflib

    if key not in fields:
        close = difflib.get_close_matches(key, sorted(fields), 1)
        raise FileError(where, f"unknown field{f', did you mean {close[0]}?' if close else ''}", item=key)
    return key
