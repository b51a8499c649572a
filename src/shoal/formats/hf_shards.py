"""The safetensors files of a Hugging Face folder: one file, or numbered shards with an index, all inside the folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from shoal.errors import FileError
from shoal.formats.hf_config import read_json
from shoal.formats.safetensors import SafetensorsFile

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Map every tensor name to the open file that holds it.

    Raises:
        FileError: a shard is missing, damaged or outside the folder, a tensor lies in two of them or not where the
            index says, or the folder holds only pickles, which can run code when read and never are.
    """
    if (folder / SINGLE).exists():
        file = SafetensorsFile(inside(folder, SINGLE))
        return dict.fromkeys(file.entries, file)
    if not (folder / INDEX).exists():
        raise FileError(folder, _what_is_there(folder))
    weight_map = _read_index(folder)
    files = {name: SafetensorsFile(inside(folder, name)) for name in sorted(set(weight_map.values()))}
    holders: dict[str, SafetensorsFile] = {}
    for file in files.values():
        for name in file.entries:
            if name in holders:
                raise FileError(file.path, f"is also in {holders[name].path.name}", item=name)
            holders[name] = file
    for name, shard in weight_map.items():
        if name not in files[shard].entries:
            raise FileError(files[shard].path, f"is missing; {INDEX} says it is here", item=name)
    return holders


def _read_index(folder: Path) -> dict[str, str]:
    path = inside(folder, INDEX)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(path, "must map tensor names to files", item="weight_map")
    checked = set()
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise FileError(path, f"names {shard!r}, which is no safetensors file", item=name)
        if shard not in checked:
            inside(folder, shard, named_by=path)
            checked.add(shard)
    return weight_map


def inside(folder: Path, name: str, *, named_by: Path | None = None) -> Path:
    """`folder/name`, an existing file that lies in the folder, links followed.

    The cache of huggingface_hub is understood too: there, a snapshot's files are links into its sibling `blobs`.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise FileError(named_by or folder, "leaves the model's folder", item=name)
    path = folder / name
    if not path.is_file():
        raise FileError(path, f"is missing{f'; {named_by.name} names it' if named_by else ''}")
    home, real = folder.resolve(), path.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(allowed) for allowed in homes):
        raise FileError(path, "is a link that leaves the model's folder")
    return path


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"holds only pickled weights ({pickles[0]}), which can run code when read; convert them to safetensors"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        return f"holds no {SINGLE} but {ggufs[0]}; name that file itself"
    return f"holds neither {SINGLE} nor {INDEX}"
