"""Programs that behave, fail, hang, eat memory, fill the disk, leave children behind and call home."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from shoal.evaluate.sandbox import Limits, run_program

QUICK = Limits(seconds=3.0, memory=256 << 20, file_bytes=1 << 16)


@pytest.mark.parametrize(("program", "status", "says"), [
    ("print('fine')", "ok", "fine"), ("assert 1 == 2", "failed", "AssertionError"),
    ("def broken(:", "failed", "SyntaxError"), ("raise SystemExit(3)", "failed", ""),
    ("x = bytearray(1 << 30)", "failed", "MemoryError"), ("open('f', 'wb').write(b'0' * (1 << 20))", "failed", ""),
    ("import os; print(sorted(k for k in os.environ if k != 'LC_CTYPE'))", "ok", "[]"),
    ("print(input())", "failed", "EOFError"), ("import os; print(os.listdir())", "ok", "['program.py']"),
])  # fmt: skip
def test_what_programs_may_do(program: str, status: str, says: str) -> None:
    outcome = run_program(program, QUICK)
    assert outcome.status == status, outcome.output
    assert says in outcome.output


def test_one_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "alive"
    child = f"import time\ntime.sleep(3)\nopen({str(mark)!r}, 'w').close()"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nwhile True: pass"
    assert run_program(program, Limits(seconds=1.0)).status == "timeout"
    time.sleep(3.0)
    assert not mark.exists()


def test_output_is_bounded() -> None:
    outcome = run_program("for i in range(10**6): print(i)", Limits(seconds=10.0, file_bytes=1 << 26))
    assert len(outcome.output) <= 64 * 1024
    assert outcome.output.endswith("999999\n")


@pytest.mark.filterwarnings("ignore:this kernel")
def test_the_network_is_gone_where_the_kernel_allows_that() -> None:
    from shoal.evaluate import sandbox

    if sandbox._network_stays():
        pytest.skip("this kernel lets no network namespace be made")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert run_program(program, QUICK).status == "failed"
        exec(program)  # from here it can be reached
