"""What the engine takes for its own: processors and memory, under containers' limits too; sizes told before loading."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.engine.conftest import open_tiny, tiny, with_prediction_layer
from tests.model.test_parity import CASES

from shoal.engine.memory import cache_bytes, weight_bytes
from shoal.engine.prefill import expands_from
from shoal.errors import ConfigError
from shoal.formats.checkpoint import Checkpoint
from shoal.machine import available_bytes, usable_cpus


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("M", (), {"available": 8 << 30}))


V2_GROUPS = {"proc/self/cgroup": "0::/pod/box\n"}
V1_GROUPS = {"proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": "0::/\n"}, 8),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/cpu.max": "max 100000"}, 8),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/cpu.max": "250000 100000"}, 3),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/x": "", "sys/fs/cgroup/pod/cpu.max": "50000 100000"}, 1),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/cpu.max": "9900000 100000"}, 8),
        ({**V2_GROUPS, "sys/fs/cgroup/cpu.max": "200000 100000"}, 2),  # the container's own view of its group
        (
            {
                **V1_GROUPS,
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        (
            {
                **V1_GROUPS,
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/cpu.max": "nonsense"}, 8),
    ],
)
def test_processors(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert usable_cpus(write(tmp_path, files)) == expected


def test_processors_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert usable_cpus(tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus(tmp_path) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 << 30),
        (
            {**V2_GROUPS, "sys/fs/cgroup/pod/box/memory.max": "max", "sys/fs/cgroup/pod/box/memory.current": "9"},
            8 << 30,
        ),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/memory.max": "1000", "sys/fs/cgroup/pod/box/memory.current": "400"}, 600),
        (
            {
                **V2_GROUPS,
                "sys/fs/cgroup/pod/box/memory.max": "1000",
                "sys/fs/cgroup/pod/box/memory.current": "990",
                "sys/fs/cgroup/pod/box/memory.stat": "anon 300\ninactive_file 200\n",
            },
            210,
        ),
        ({**V2_GROUPS, "sys/fs/cgroup/pod/box/memory.max": "10", "sys/fs/cgroup/pod/box/memory.current": "99"}, 0),
        (
            {
                **V1_GROUPS,
                "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "5000",
                "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1000",
                "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 7\n",
            },
            4007,
        ),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert available_bytes(write(tmp_path, files)) == expected


def test_threads_come_from_the_argument_then_the_setting_then_the_machine(
    llama: tuple[Any, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.engine.core.usable_cpus", lambda: 3)
    assert open_tiny(llama[1], threads=None)._core.threads == 3
    monkeypatch.setenv("SHOAL_THREADS", "2")
    assert open_tiny(llama[1], threads=None)._core.threads == 2
    assert open_tiny(llama[1], threads=1)._core.threads == 1
    monkeypatch.setenv("SHOAL_THREADS", "many")
    with pytest.raises(ConfigError, match="SHOAL_THREADS"):
        open_tiny(llama[1], threads=None)


@pytest.mark.parametrize("scheme", ["auto", "f32", "bf16", "q8", "q4", "q4m"])
@pytest.mark.parametrize("name", ["v2-groups", "v3-released", "llama-3", "qwen2", "qwen3"])
def test_the_size_of_the_weights_is_known_before_they_are_read(name: str, scheme: str) -> None:
    checkpoint = tiny(CASES[name])[1]
    packed = open_tiny(checkpoint, weights=scheme)._core.weight_bytes
    small = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 1 or name.endswith(".mlp.gate.weight")
    }
    estimate = weight_bytes(checkpoint, checkpoint.config, scheme, expand=expands_from(checkpoint.config) is not None)
    # The plan counts matrices; norms, biases and routers come on top.
    assert packed < estimate <= packed + sum(4 * tensor.read().size + 4096 for tensor in small.values())


@pytest.mark.parametrize("cache", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["v2-groups", "llama-3", "qwen3-tied"])
def test_the_size_of_the_cache_is_known_before_it_is_made(name: str, cache: str) -> None:
    checkpoint = tiny(CASES[name])[1]
    assert open_tiny(checkpoint, cache=cache, cache_tokens=700)._core.cache_bytes == cache_bytes(
        checkpoint.config, cache, 700
    )


def test_a_prediction_layer_counts_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = with_prediction_layer(tiny(CASES["v3-released"])[1])
    without = open_tiny(checkpoint, look_ahead=False)._core
    ahead = open_tiny(checkpoint, look_ahead=True)._core
    assert ahead.looks_ahead
    assert cache_bytes(checkpoint.config, "f32", 1024) == ahead.cache_bytes > without.cache_bytes
    plain = replace(checkpoint.config, num_nextn_predict_layers=0)
    more = weight_bytes(checkpoint, checkpoint.config, "f32", expand=True) - weight_bytes(
        checkpoint, plain, "f32", expand=True
    )
    assert 0 < ahead.weight_bytes - without.weight_bytes <= more
    left = ahead.weight_bytes + ahead.cache_bytes - 1
    monkeypatch.setattr("shoal.engine.memory.available_bytes", lambda: left)
    open_tiny(checkpoint, look_ahead=False)
    with pytest.raises(ConfigError, match="cache_tokens"):
        open_tiny(checkpoint, look_ahead=True)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_for_the_next_who_asks():
    """A second block of 96 MB, which glibc would map anew, lies where the first was: no page of it is new."""
    code = textwrap.dedent("""
        import resource, sys
        import numpy as np
        from shoal.machine import keep_freed_memory
        assert sys.argv[1] == "plain" or keep_freed_memory()
        def new_pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            np.empty(96 << 20, dtype=np.uint8).fill(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        new_pages()
        print(new_pages())
    """)
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, check=True, text=True).stdout)
        for how in ("plain", "kept")
    )
    assert kept < 20 < plain
