"""Recordings: every number arrives, files are whole or absent, memory stays bounded."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.trace.conftest import SHAPE, WORDS, routing

from shoal.engine.routing import Routing
from shoal.errors import FileError
from shoal.trace import recorder as recorder_module
from shoal.trace.recorder import Recorder
from shoal.trace.table import TraceFile

Record = Callable[..., Path]


def two_texts() -> tuple[list[Routing], list[Routing]]:
    rng = np.random.default_rng(0)
    return [routing(rng, 0, 5, 1), routing(rng, 5, 1, 2)], [routing(rng, 64, 4, 2)]


@pytest.mark.parametrize("group_rows", [1, 7, 1 << 16])
def test_every_number_arrives(record: Record, group_rows: int) -> None:
    texts = two_texts()
    rows = pq.read_table(record(*texts, group_rows=group_rows)).to_pylist()
    expected = []
    for request, parts in enumerate(texts):
        for part in parts:
            for t, token in enumerate(part.tokens):
                for index, layer in enumerate(SHAPE.layers):
                    expected.append(
                        {
                            "request": request, "position": part.first + t, "generated": part.first + t >= 3,
                            "token": token, "text": WORDS[token].decode(errors="replace"), "layer": layer,
                            "experts": part.experts_LTK[index, t].tolist(),
                            "weights": part.weights_LTK[index, t].tolist(), "entropy": part.entropy_LT[index, t],
                            "step": part.step.number, "step_rows": part.step.rows,
                            "seconds": np.float32(part.step.seconds),
                        }
                    )  # fmt: skip
    starts = [row.pop("start") for row in rows]
    assert rows == expected
    assert all(-1 < start < 5 for start in starts)


def test_without_text_nobody_can_read_the_prompts(tmp_path: Path) -> None:
    with Recorder(tmp_path / "t.parquet", SHAPE) as recorder:
        for parts in two_texts():
            for part in parts:
                recorder.listen()(part)
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["token"].null_count == table["text"].null_count == table.num_rows == 30


def test_a_folder_gets_a_file_after_a_while_and_the_rest_at_the_end(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "traces", SHAPE, folder=True, group_rows=1 << 20, file_seconds=0.2)
    first, second = two_texts()
    for part in first:
        recorder.listen()(part)
    end = time.monotonic() + 20
    while not list((tmp_path / "traces").glob("*.parquet")):
        assert time.monotonic() < end
        time.sleep(0.02)
    for part in second:
        recorder.listen()(part)
    recorder.close()
    recorder.close()  # twice does no harm
    tables = [pq.read_table(path) for path in sorted((tmp_path / "traces").iterdir())]
    assert [table.num_rows for table in tables] == [18, 12]
    assert recorder.files == sorted((tmp_path / "traces").iterdir())


def test_files_of_a_folder_are_finished_in_time_also_where_reports_never_cease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(0, 400)
    monkeypatch.setattr(recorder_module.time, "monotonic", lambda: float(next(clock)))
    recorder = Recorder(tmp_path, SHAPE, folder=True, group_rows=1)
    for parts in two_texts():
        for part in parts:
            recorder.listen()(part)
    recorder.close()
    monkeypatch.undo()
    assert len(recorder.files) == 2


def test_a_file_that_cannot_be_finished_vanishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = pq.ParquetWriter.close, []

    def full(self: pq.ParquetWriter) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        real(self)

    monkeypatch.setattr(pq.ParquetWriter, "close", full)
    recorder = Recorder(tmp_path / "t.parquet", SHAPE, group_rows=1)
    recorder.listen()(two_texts()[0][0])
    with pytest.raises(FileError, match="No space left"):
        recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_folder_have_bounded_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "FILE_ROWS", 10)
    recorder = Recorder(tmp_path, SHAPE, folder=True, group_rows=1)
    for parts in two_texts():
        for part in parts:
            recorder.listen()(part)
    recorder.close()
    assert [pq.read_metadata(path).num_rows for path in recorder.files] == [15, 15]


def test_nothing_is_left_where_the_block_fails(tmp_path: Path) -> None:
    def fail() -> None:
        with Recorder(tmp_path / "t.parquet", SHAPE, group_rows=1) as recorder:
            recorder.listen()(two_texts()[0][0])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from tests.trace.conftest import SHAPE, routing
from shoal.trace.recorder import Recorder
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
said = []
recorder = Recorder(Path(sys.argv[1]), SHAPE, group_rows=1, on_failure=said.append)
rng = np.random.default_rng(0)
hear = recorder.listen()
for step in range(400):
    hear(routing(rng, 64 * step, 64, step))
try:
    recorder.close()
except Exception as error:
    print(type(error).__name__, error, len(said), sep="|")
"""


def run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    command = [sys.executable, "-c", textwrap.dedent(code), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_full_disk_ends_the_recording_with_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    done = run_python(FULL_DISK, str(path))
    assert done.returncode == 0, done.stderr
    kind, message, said = done.stdout.strip().split("|")
    assert (kind, said) == ("FileError", "1")
    assert message.startswith(f"{path}: cannot be written")
    assert list(tmp_path.iterdir()) == []
    assert "Exception ignored" not in done.stderr


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.trace.conftest import SHAPE, routing
from shoal.trace.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), SHAPE, folder=True, group_rows=1)
rng = np.random.default_rng(0)
import shoal.trace.recorder as module
module.FILE_ROWS = 500
hear = recorder.listen()
for step in range(10):
    hear(routing(rng, 64 * step, 64, step))
while not list(Path(sys.argv[1]).glob("*.parquet")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_it_leaves_whole_files(tmp_path: Path) -> None:
    assert run_python(KILLED, str(tmp_path)).returncode == -signal.SIGKILL
    whole = list(tmp_path.glob("*.parquet"))
    assert whole
    assert all(TraceFile(path).num_rows > 0 for path in whole)


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    part = routing(rng, 0, 4096, 1)
    with Recorder(tmp_path / "t.parquet", SHAPE, text=WORDS.__getitem__) as recorder:
        hear = recorder.listen()

        def peak(count: int) -> int:
            for _ in range(count):
                hear(part)
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        before = peak(40)
        after = peak(120)
    assert TraceFile(tmp_path / "t.parquet").num_rows == 160 * 4096 * 3
    assert after - before < 40_000, "KiB for 75 MB of columns"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is no Parquet file"),
        (b"PAR1 and nothing", "is no Parquet file"),
        (None, "is no trace that Shoal recorded"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "t.parquet"
    if content is None:
        import pyarrow as pa

        pq.write_table(pa.table({"layer": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(FileError, match=problem):
        TraceFile(path)


def test_a_damaged_or_contradictory_file_is_refused(record: Record, tmp_path: Path) -> None:
    path = record(*two_texts())
    raw = bytearray(path.read_bytes())
    raw[100:400] = bytes(300)
    (tmp_path / "damaged.parquet").write_bytes(raw)
    with pytest.raises(FileError, match=r"damaged\.parquet: is damaged"):
        list(TraceFile(tmp_path / "damaged.parquet").batches(["layer", "experts", "position", "request"]))
    table = pq.read_table(path)
    facts = json.loads(table.schema.metadata[b"shoal.trace"])
    for name, value in (("n_routed_experts", 3), ("layers", [1, 2, 4])):
        altered = table.replace_schema_metadata({b"shoal.trace": json.dumps({**facts, name: value}).encode()})
        pq.write_table(altered, tmp_path / "other.parquet")
        with pytest.raises(FileError, match="that the model lacks"):
            list(TraceFile(tmp_path / "other.parquet").batches(["layer", "experts"]))
    for name, value in (("n_routed_experts", 1 << 40), ("num_experts_per_tok", 0), ("layers", []), ("layers", "x")):
        altered = table.replace_schema_metadata({b"shoal.trace": json.dumps({**facts, name: value}).encode()})
        pq.write_table(altered, tmp_path / "other.parquet")
        with pytest.raises(FileError):
            TraceFile(tmp_path / "other.parquet")
