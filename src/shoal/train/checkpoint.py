"""Checkpoints of a run: folders that appear whole or not at all, of which the newest whole one wins.

`step-00000040/` holds safetensors files and `state.json`, which is written last and names the size and SHA-256 of each.
All are written to a hidden sibling, synced, and renamed in one go; retired checkpoints are renamed before they are
deleted. So whatever moment a process is killed at, a folder with a visible name is complete unless a disk damaged it,
and that its digests show.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
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
_NAME = re.compile(r"step-([0-9]{8,})")
_HEX = re.compile(r"[0-9a-f]{64}")

State = Mapping[str, Mapping[str, Tensor]]
Say = Callable[[str], None]


class Saved(NamedTuple):
    """A checkpoint that was found whole.

    Attributes:
        path: its folder.
        step: steps that were done when it was saved.
        meta: what `save` was given.
        files: the tensors of each file by name, mapped from disk.
    """

    path: Path
    step: int
    meta: dict[str, Any]
    files: dict[str, SafetensorsFile]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part of the state, as saved: fresh copies on the CPU."""
        file = self.files[part]
        return {name: _to_torch(file.view(name)) for name in file.entries}


def save(folder: Path, step: int, state: State, meta: Mapping[str, Any], *, keep: int) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`.

    Args:
        folder: where checkpoints live.
        state: for each file, its tensors by name.
        meta: plain data to keep with them.

    Raises:
        RunError: the disk refuses. The checkpoints that were there are untouched.
    """
    path = folder / f"step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_folder(path) as temporary:
            files = {}
            for part, tensors in state.items():
                file = temporary / f"{part}.safetensors"
                write_safetensors(file, [array_spec(name, _to_numpy(value)) for name, value in tensors.items()])
                files[file.name] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
            content = {"format": FORMAT, "version": VERSION, "step": step, "files": files, "meta": dict(meta)}
            with atomic_file(temporary / STATE) as out:
                out.write(json.dumps(content, indent=1, ensure_ascii=False).encode("utf-8") + b"\n")
    except (FileError, OSError) as error:
        problem = str(error) if isinstance(error, FileError) else f"{path}: {error.strerror or error}"
        left = steps_in(folder)
        kept = f"; the checkpoint of step {left[-1]} is intact" if left else ""
        raise RunError(f"step {step} could not be saved: {problem}{kept}") from error
    for old in steps_in(folder)[:-keep]:
        _discard(folder / f"step-{old:08d}")
    return path


def newest(folder: Path, say: Say) -> Saved | None:
    """Open the newest whole checkpoint. Damaged ones are moved aside and named in one warning each.

    Raises:
        FileError: there are checkpoints, but none is whole.
    """
    steps = steps_in(folder)
    for step in reversed(steps):
        path = folder / f"step-{step:08d}"
        try:
            return _open(path, step)
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


def _open(path: Path, step: int) -> Saved:
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
    files = {}
    for name, info in listed.items():
        if Path(name).name != name or not name.endswith(".safetensors") or not _HEX.fullmatch(str(info.get("sha256"))):
            raise FileError(state, f"lists {name!r:.80} without a digest", item="files")
        files[name.removesuffix(".safetensors")] = _check_file(path / name, info)
    return Saved(path, step, content["meta"], files)


def _check_file(path: Path, info: Mapping[str, Any]) -> SafetensorsFile:
    try:
        size = path.stat().st_size
        if size != info.get("bytes"):
            raise FileError(path, f"holds {size} bytes, {STATE} says {info.get('bytes')}")
        if _digest(path) != info["sha256"]:
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


def _to_torch(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
