"""A whole run: plan, clean, duplicates, band, tokenizer, pack, report; each stage goes on where it was interrupted."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from shoal.data import clean, duplicates, entropy, pack, store, vocabulary
from shoal.data.ledger import Ledger
from shoal.data.plan import Part, Source, find_files, plan_shards
from shoal.data.recipe import Recipe, recipe_from
from shoal.data.run import DOCUMENT_COST, MARKER_BYTES, Machine, Stage, marker_path, run_stage
from shoal.data.shards import INDEX
from shoal.data.steps import Steps, standard_steps
from shoal.errors import ConfigError, FileError
from shoal.formats.atomic import LOCK, atomic_file, sole_user
from shoal.formats.digest import file_digest
from shoal.formats.hf_config import read_json

# Fields that may change between two runs into one folder, and the first stage that sees them.
LATER = {
    "near_duplicates": "duplicates", "band": "band", "entropy_model": "band", "tokenizer": "pack", "vocab_size": "pack",
}  # fmt: skip
ALONE = Machine(workers=1)
Notice = Callable[[str, int, int], None]  # stage, done, in all


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to: documents and characters read, documents kept, tokens packed, rows that could not be read."""

    folder: Path
    read: int
    kept: int
    tokens: int
    unreadable: int


def prepare(
    recipe: Recipe,
    folder: str | Path,
    machine: Machine | None = None,
    *,
    steps: Steps = standard_steps,
    notice: Notice = lambda *_: None,
) -> Result:
    """Read, clean, dedupe, choose, tokenize and pack into a folder; the same command goes on after an interruption.

    Args:
        recipe: what decides the result.
        folder: free, or holding an earlier run of the same recipe (fields of `LATER` may differ).
        machine: where it runs; changes no byte of the result.
        steps: the pipeline, a module-level function from a recipe to named steps.
        notice: told how far each stage is.

    Raises:
        FileError, ConfigError, WorkerError: input, recipe or machine are at fault; what is finished is kept.
    """
    folder, machine = Path(folder), machine or Machine()
    shards, plan = _plan(folder, recipe)  # nothing is written before the input is known to be there
    if folder.is_dir() and not (folder / "recipe.json").is_file() and any(p.name != LOCK for p in folder.iterdir()):
        raise FileError(folder, "already exists and is not empty")
    folder.mkdir(parents=True, exist_ok=True)
    with sole_user(folder):
        key = _claim(folder, recipe, steps, plan)
        job = clean.Cleaning(folder=folder, recipe=recipe, shards=shards, steps=steps)
        stage = Stage(
            folder=folder, name=clean.STAGE, key=key, task=_Task(clean.clean_shard, job),
            files=functools.partial(clean.files, folder),
        )  # fmt: skip
        numbers = list(range(len(shards)))
        largest = DOCUMENT_COST * recipe.max_document
        run_stage(stage, numbers, machine, largest=largest, progress=_named(notice, "clean"))
        key = _find_duplicates(folder, recipe, machine, key, notice)
        _choose(folder, recipe, key, notice)
        return _pack(folder, recipe, machine, notice)


def pack_folder(
    folder: Path,
    machine: Machine | None = None,
    *,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    notice: Notice = lambda *_: None,
) -> Result:
    """Tokenize and pack what the verdicts of a prepared folder keep, and write its report; again after a selection.

    Args:
        tokenizer, vocab_size: take the place of the recipe's.

    Raises:
        FileError: the folder was not prepared, or not to the end.
    """
    recipe = read_recipe(folder)
    if tokenizer or vocab_size:
        recipe = replace(recipe, tokenizer=tokenizer, vocab_size=vocab_size)
    with sole_user(folder):
        _write_json(folder / "recipe.json", {"key": _key_of(folder), "recipe": recipe.to_dict()})
        return _pack(folder, recipe, machine or Machine(), notice)


def _pack(folder: Path, recipe: Recipe, machine: Machine, notice: Notice) -> Result:
    from shoal.data.report import write_report

    plan = read_json(folder / "plan.json", MARKER_BYTES)
    numbers = list(range(len(plan["shards"])))
    for path in (path for number in numbers for path in clean.files(folder, number)):
        if not path.exists():
            raise FileError(path, "is missing; `shoal data prepare` with the same recipe makes it")
    verdicts = tuple(store.verdict_names(folder))
    home = _tokenizer(folder, recipe)
    digest = vocabulary.digest(home) if home else "none"
    key = _key(_key_of(folder), pack.verdicts_digest(folder, verdicts), digest, *verdicts)
    job = pack.Packing(folder=folder, tokenizer=home, verdicts=verdicts, seed=recipe.seed)
    stage = Stage(folder=folder, name=pack.STAGE, key=key, task=_Task(pack.pack_shard, job))
    if home is not None:
        stage = replace(stage, files=functools.partial(pack.files, folder))
    joined = Stage(
        folder=folder,
        name="join",
        key=key,
        task=lambda _: {"tokens": pack.join_parts(job, numbers, _provenance(folder, recipe))},
        files=lambda _: [folder / "tokens" / INDEX],
    )
    ledgers = run_stage(
        stage, numbers, machine, largest=pack.largest_cost(job, numbers), progress=_named(notice, "pack")
    )
    if home is not None:
        run_stage(joined, [0], ALONE)
        pack.remove_parts(folder)
    cleaned = _ledgers(folder, clean.STAGE, numbers)
    summary: dict[str, Any] = {"clean": _merged(cleaned), "pack": _merged(ledgers), "recipe": recipe.to_dict()}
    for name in ("duplicates", "band"):
        found = _ledgers(folder, name, [0])
        summary[name] = found[0] if found else None
    summary["passed_over"] = plan["passed_over"]
    _write_json(folder / "summary.json", summary)
    write_report(folder)
    notice("report", 1, 1)
    return _result(folder, summary)


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a prepared folder. Raises FileError if it is none."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise FileError(folder, "holds no recipe.json; `shoal data prepare` makes one")
    return recipe_from(read_json(path)["recipe"], path.absolute())


@dataclass(frozen=True)
class _Task:
    """A function of a job and a shard's number with the job filled in; it can go to another process."""

    function: Callable[[Any, int], dict[str, Any]]
    job: Any

    def __call__(self, shard: int) -> dict[str, Any]:
        return self.function(self.job, shard)


def _claim(folder: Path, recipe: Recipe, steps: Steps, plan: dict[str, Any]) -> str:
    """Write `recipe.json` and `plan.json`, unless another recipe's run lies there, or one over input that has changed
    since. Returns the key of the cleaning."""
    data = recipe.to_dict()
    fixed = {name: value for name, value in data.items() if name not in LATER}
    fixed["steps"] = f"{steps.__module__}.{steps.__qualname__}"
    # Shards that are cleaned by one evaluation set must not lie beside shards cleaned by another.
    evaluations = [file_digest(file) for path in recipe.evaluations for file in find_files(Source(path=path))]
    key = _key(json.dumps(fixed, sort_keys=True), *evaluations)
    path = folder / "recipe.json"
    if path.is_file():
        old = read_json(path)
        if old["key"] != key:
            different = [name for name in fixed if name != "steps" and fixed[name] != old["recipe"].get(name)]
            what = ", ".join(different) or "steps or the content of evaluation sets"
            raise FileError(folder, f"holds a run of another recipe ({what} differ)")
    path = folder / "plan.json"
    if path.is_file():
        planned = read_json(path, MARKER_BYTES)
        before = planned.get("contents", {})
        changed = next((path for path, digest in plan["contents"].items() if before.get(path, digest) != digest), None)
        if changed or before.keys() != plan["contents"].keys() or planned["shards"] != plan["shards"]:
            what = f"{changed} has changed" if changed else "files were added or removed"
            raise FileError(folder, f"holds a run over other input: {what} since")
    _write_json(folder / "recipe.json", {"key": key, "recipe": data})
    _write_json(path, plan)
    return key


def _plan(folder: Path, recipe: Recipe) -> tuple[tuple[tuple[Part, ...], ...], dict[str, Any]]:
    """The shards of the input, and what `plan.json` holds of them."""
    inside = next((one.path for one in recipe.sources if folder.resolve().is_relative_to(one.path.resolve())), None)
    if inside is not None:
        raise ConfigError("out", f"{folder} lies inside {inside}, which is to be read")
    for path in recipe.evaluations:
        if not path.exists():
            raise FileError(path, "there is no such file or folder")
    found, passed = plan_shards(recipe.sources, shard_bytes=recipe.shard_bytes)
    if not found:
        raise FileError(recipe.sources[0].path, "holds nothing to read")
    contents = {str(path): _content(path) for path in dict.fromkeys(part.path for shard in found for part in shard)}
    shards = json.loads(json.dumps([[asdict(part) for part in shard] for shard in found], default=str))
    return tuple(map(tuple, found)), {"shards": shards, "contents": contents, "passed_over": passed}


def _content(path: Path) -> str:
    """By content, not by size and time: an edit may keep the one, a copy or a checkout changes the other, and reading
    a file once more is little beside cleaning it."""
    try:
        return file_digest(path)
    except FileError:
        return "unreadable"  # reading it will say what is wrong


def _find_duplicates(folder: Path, recipe: Recipe, machine: Machine, key: str, notice: Notice) -> str:
    key = _key(key, str(recipe.near_duplicates))

    def task(_: int) -> dict[str, Any]:
        found = duplicates.find_duplicates(folder, recipe.near_duplicates, machine.memory)
        duplicates.write_duplicates(folder, found)
        return {"exact": int((found.how == 1).sum()), "near": int((found.how == 2).sum()), "of": len(found.how)}

    numbers = store.shard_numbers(folder)
    stage = Stage(
        folder=folder, name="duplicates", key=key, task=task,
        files=lambda _: [store.attribute_path(folder, duplicates.ATTRIBUTES, number) for number in numbers],
    )  # fmt: skip
    run_stage(stage, [0], ALONE, progress=_named(notice, "dedupe"))
    return key


def _choose(folder: Path, recipe: Recipe, key: str, notice: Notice) -> None:
    """Stage one: scores of the reference model if one is named, then the band; an old band goes if none is wanted."""
    if recipe.band is None:
        marker_path(folder, "band", 0).unlink(missing_ok=True)
        store.remove_attributes(folder, entropy.VERDICT)
        return
    numbers = store.shard_numbers(folder)
    verdicts = [duplicates.ATTRIBUTES]
    if recipe.entropy_model:
        key = _key(key, recipe.entropy_model)
        opened: list[Any] = []

        def score(shard: int) -> dict[str, Any]:
            if not opened:  # nothing is loaded if every shard is scored already
                opened.append(entropy.open_reference(str(recipe.entropy_model)))
            return entropy.score_shard(opened[0], folder, shard, verdicts)

        stage = Stage(
            folder=folder, name="surprise", key=key, task=score,
            files=lambda shard: [store.attribute_path(folder, entropy.SCORES, shard)],
        )  # fmt: skip
        run_stage(stage, numbers, ALONE, progress=_named(notice, "score"))
    key, with_model = _key(key, *map(str, recipe.band)), recipe.entropy_model is not None
    choose = functools.partial(entropy.choose_band, folder, recipe.band, verdicts, with_model=with_model)
    stage = Stage(
        folder=folder, name="band", key=key, task=lambda _: choose(),
        files=lambda _: [store.attribute_path(folder, entropy.VERDICT, number) for number in numbers],
    )  # fmt: skip
    run_stage(stage, [0], ALONE)


def _tokenizer(folder: Path, recipe: Recipe) -> Path | None:
    """The folder's own copy of the tokenizer, made or trained if it is not there yet.

    It learns from everything but duplicates: a selection must not change what a token is.
    """
    target = folder / "tokenizer"
    if not recipe.tokenizer and not recipe.vocab_size:
        return None
    origin = {"tokenizer": recipe.tokenizer, "vocab_size": recipe.vocab_size, "near": recipe.near_duplicates}
    if recipe.tokenizer and (Path(recipe.tokenizer) / "tokenizer.json").is_file():
        origin["digest"] = vocabulary.digest(Path(recipe.tokenizer))
    marker = folder / "done" / "tokenizer.json"
    if marker.is_file() and read_json(marker) == origin and target.is_dir():
        return target
    if recipe.tokenizer:
        pack.keep_tokenizer(folder, recipe.tokenizer)
    else:
        assert recipe.vocab_size is not None
        verdicts = (duplicates.ATTRIBUTES,)
        train_on_folder(folder, target, vocab_size=recipe.vocab_size, seed=recipe.seed, verdicts=verdicts)
    _write_json(marker, origin)
    return target


def train_on_folder(
    folder: Path, target: Path, *, vocab_size: int, seed: int, verdicts: Sequence[str] | None = None
) -> None:
    """Train a tokenizer on what the verdicts (by default all) of a folder keep, or on a sample of it."""
    import shutil

    shards = store.shard_numbers(folder)
    total = sum(sum(store.read_attributes(folder, clean.ATTRIBUTES, shard)["characters"]) for shard in shards)
    kept = (document for shard in shards for document in store.read_kept(folder, shard, verdicts=verdicts))
    shutil.rmtree(target, ignore_errors=True)
    vocabulary.train_tokenizer(vocabulary.sampled(kept, total, seed=seed), target, vocab_size=vocab_size)


def _provenance(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the packed tokens say of themselves: recipe, versions, and documents by source and licence."""
    import importlib.metadata as metadata

    merged = _merged(_ledgers(folder, pack.STAGE, store.shard_numbers(folder)))
    versions = {name: metadata.version(name) for name in ("numpy", "tokenizers", "pyarrow", "rensa")}
    return {"recipe": recipe.to_dict(), "groups": merged["groups"]["after"], "versions": versions}


def _key_of(folder: Path) -> str:
    return str(read_json(folder / "recipe.json")["key"])


def _ledgers(folder: Path, stage: str, numbers: Iterable[int]) -> list[dict[str, Any]]:
    paths = [marker_path(folder, stage, number) for number in numbers]
    return [read_json(path, MARKER_BYTES)["ledger"] for path in paths if path.is_file()]


def _merged(ledgers: Iterable[dict[str, Any]]) -> dict[str, Any]:
    total = Ledger()
    for ledger in ledgers:
        total.add(ledger)
    return total.data


def _result(folder: Path, summary: dict[str, Any]) -> Result:
    cleaned, packed = summary["clean"], summary["pack"]
    kept = packed["groups"]["after"].get("kind", {})
    return Result(
        folder=folder,
        read=cleaned["steps"].get("read", [0])[0],
        kept=sum(row[0] for row in kept.values()),
        tokens=packed.get("tokens", 0),
        unreadable=sum(row[0] for row in cleaned["dropped"].get("read", {}).values()),
    )


def _named(notice: Notice, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: notice(stage, done, total)


def _key(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as out:
        out.write(json.dumps(data, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
