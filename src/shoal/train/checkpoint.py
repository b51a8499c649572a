"""Checkpoints of a run: folders that appear whole or not at all, of which the newest whole one wins.

`step-00000040/` holds safetensors files and `state.json`, which is written last and names the size and SHA-256 of each.
All are written to a hidden sibling, synced, and renamed in one go; retired checkpoints are renamed before they are
deleted. So whatever moment a process is killed at, a folder with a visible name is complete unless a disk damaged it,
and that its digests show.

A process alone writes a file for each part of the state (`model.safetensors`); of several, each writes its pieces of
the tensors into files of its own (`model-00001.safetensors`), whose headers say where the pieces belong. Any number of
processes reads either.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from shoal.errors import FileError, RunError
from shoal.formats.atomic import atomic_file, atomic_folder, sync_folder
from shoal.formats.safetensors import Array, SafetensorsFile, array_spec, write_safetensors

FORMAT, VERSION = "shoal-train", 1
STATE = "state.json"
HASH_BYTES = 1 << 24
PIECES = "pieces"  # the key of a file's header under which the places of its pieces stand
_NAME = re.compile(r"step-([0-9]{8,})")
_FILE = re.compile(r"([a-z]+)(?:-[0-9]{5,})?\.safetensors")
_HEX = re.compile(r"[0-9a-f]{64}")

State = Mapping[str, Mapping[str, Tensor]]
Say = Callable[[str], None]


class Piece(NamedTuple):
    """A block of a tensor, and where in the tensor it begins."""

    file: SafetensorsFile
    offset: tuple[int, ...]


class Stored(NamedTuple):
    """A tensor on disk: its shape, and the pieces that make it up, in the order of their offsets."""

    name: str
    shape: tuple[int, ...]
    pieces: list[Piece]

    @property
    def dtype(self) -> torch.dtype:
        return to_torch(self.pieces[0].file.view(self.name)[:0] if self.shape else self.view(0)).dtype

    def view(self, number: int) -> Array:
        """The values of a piece, mapped from disk."""
        return self.pieces[number].file.view(self.name)

    def tensor(self) -> Tensor:
        """The whole, as a fresh copy on the CPU."""
        if len(self.pieces) == 1:
            return to_torch(self.view(0))
        out = torch.empty(self.shape, dtype=self.dtype)
        for number, piece in enumerate(self.pieces):
            value = to_torch(self.view(number))
            out[tuple(slice(at, at + size) for at, size in zip(piece.offset, value.shape, strict=True))] = value
        return out


class Saved(NamedTuple):
    """A checkpoint that was found whole.

    Attributes:
        path: its folder.
        step: steps that were done when it was saved.
        meta: what `save` was given.
        parts: for each part of the state, its tensors by name.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    parts: dict[str, dict[str, Stored]]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part of the state, as saved: fresh copies on the CPU."""
        return {name: stored.tensor() for name, stored in self.parts[part].items()}


def save(folder: Path, step: int, state: State, meta: Mapping[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`.

    Args:
        folder: where checkpoints live.
        state: for each file, its tensors by name.
        meta: plain data to keep with them.

    Raises:
        RunError: the disk refuses. The checkpoints that were there are untouched.
    """
    path = path_of(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as temporary:
            files: dict[str, Any] = {}
            for part, tensors in state.items():
                files |= write_part(temporary / f"{part}.safetensors", tensors)
            seal(temporary, step, files, meta)
    except (FileError, OSError) as error:
        raise not_saved(folder, step, problem_of(error, path)) from error
    retire(folder, keep)
    return path


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def write_part(
    file: Path, tensors: Mapping[str, Tensor], places: Mapping[str, tuple[Sequence[int], Sequence[int]]] | None = None
) -> dict[str, dict[str, Any]]:
    """Write one file of a checkpoint; its size and digest under its name.

    Args:
        places: of the tensors that are pieces, where in the whole they begin, and its shape.
    """
    header = {"format": "pt"}
    if places:
        header[PIECES] = json.dumps({name: [list(offset), list(shape)] for name, (offset, shape) in places.items()})
    specs = [array_spec(name, _to_numpy(value)) for name, value in tensors.items()]
    write_safetensors(file, specs, metadata=header)
    return {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)}}


def seal(folder: Path, step: int, files: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write the file that says what a checkpoint is and makes it one."""
    content = {"format": FORMAT, "version": VERSION, "step": step, "files": dict(files), "meta": dict(meta)}
    with atomic_file(folder / STATE) as out:
        out.write(json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8") + b"\n")


def retire(folder: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep`."""
    for old in steps_in(folder)[:-keep]:
        _discard(path_of(folder, old))


def problem_of(error: Exception, path: Path) -> str:
    return f"{path}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def not_saved(folder: Path, step: int, problem: str) -> RunError:
    left = steps_in(folder)
    kept = f"; the checkpoint of step {left[-1]} is intact" if left else ""
    return RunError(f"step {step} could not be saved: {problem}{kept}")


def newest(folder: Path, say: Say) -> Saved | None:
    """Open the newest whole checkpoint. Damaged ones are moved aside and named in one warning each.

    Raises:
        FileError: there are checkpoints, but none is whole.
    """
    steps = steps_in(folder)
    for step in reversed(steps):
        path = path_of(folder, step)
        try:
            return open_saved(path, step)
        except FileError as error:
            if step == steps[0]:
                problem = f"is damaged ({error}), and no other checkpoint is left; move it away to start anew"
                raise FileError(path, problem) from error
            aside = path.with_name(f"damaged-{path.name}-{secrets.token_hex(2)}")
            path.rename(aside)
            say(f"warning: {error}; moved to {aside.name}, going back to an earlier checkpoint")
    return None


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := _NAME.fullmatch(path.name)))


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that is ours alone."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _discard(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    path.rename(hidden)
    sync_folder(path.parent)
    shutil.rmtree(hidden)


def open_saved(path: Path, step: int, *, verify: bool = True) -> Saved:
    """Open a checkpoint.

    Args:
        verify: compare the files with their digests.

    Raises:
        FileError: something in it is missing or damaged.
    """
    state = path / STATE
    try:
        content = json.loads(state.read_bytes())
    except OSError as error:
        raise FileError(state, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(state, f"is not valid JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise FileError(state, f"is no checkpoint of version {VERSION}")
    if content.get("step") != step or not isinstance(content.get("meta"), dict):
        raise FileError(state, f"does not describe step {step}")
    listed = content.get("files")
    if not isinstance(listed, dict) or not all(isinstance(info, dict) for info in listed.values()):
        raise FileError(state, "must list files with their sizes and digests", item="files")
    parts: dict[str, dict[str, Stored]] = {}
    for name, info in listed.items():
        found = _FILE.fullmatch(name)
        if found is None or not _HEX.fullmatch(str(info.get("sha256"))):
            raise FileError(state, f"lists {name!r:.80} without a digest", item="files")
        _add_pieces(parts.setdefault(found[1], {}), _check_file(path / name, info, verify=verify))
    for part, tensors in parts.items():
        for name, stored in tensors.items():
            stored.pieces.sort(key=lambda piece: piece.offset)
            held = sum(math.prod(piece.file.entries[name].shape) for piece in stored.pieces)
            if held != math.prod(stored.shape):
                raise FileError(path, f"holds {held} of the {math.prod(stored.shape)} values of {part}", item=name)
    return Saved(path, step, content["meta"], parts)


def _add_pieces(tensors: dict[str, Stored], file: SafetensorsFile) -> None:
    """Note which tensors, or pieces of them, a file holds."""
    try:
        places = json.loads(file.metadata.get(PIECES, "{}"))
        for name, entry in file.entries.items():
            offset, shape = (
                tuple(map(int, sizes)) for sizes in places.get(name, ([0] * len(entry.shape), entry.shape))
            )
            stored = tensors.setdefault(name, Stored(name, shape, []))
            inside = all(0 <= at <= end - size for at, size, end in zip(offset, entry.shape, shape, strict=True))
            if not inside or stored.shape != shape:
                raise ValueError(name)
            stored.pieces.append(Piece(file, offset))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(file.path, "does not say where its pieces belong", item=PIECES) from error


def _check_file(path: Path, info: Mapping[str, Any], *, verify: bool) -> SafetensorsFile:
    try:
        size = path.stat().st_size
        if size != info.get("bytes"):
            raise FileError(path, f"holds {size} bytes, {STATE} says {info.get('bytes')}")
        if verify and _digest(path) != info["sha256"]:
            raise FileError(path, f"is damaged: its SHA-256 is not the one in {STATE}")
    except OSError as error:
        raise FileError(path, f"cannot be read: {error.strerror}") from error
    return SafetensorsFile(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _to_numpy(value: Tensor) -> Array:
    value = value.detach().cpu().contiguous()
    if value.dtype == torch.bfloat16:  # NumPy knows the type only by ml_dtypes
        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    array: Array = value.numpy()
    return array


def to_torch(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
