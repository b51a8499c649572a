"""The same shard tasks on a Ray cluster. The folder must lie where every node reaches it.

A task whose worker or node dies is given to another; files and markers appear whole or not at all, so that the bytes
are those of any other run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from shoal.data.run import WorkerError, prepare_worker
from shoal.errors import MissingExtraError

RETRIES = 8  # times that a shard is given to another worker after one was lost


def run_on_ray(
    finish: Callable[[int], None], shards: list[int], address: str | None, workers: int, memory: int | None
) -> Iterator[int]:
    """Numbers of shards as Ray finishes them.

    Args:
        finish: does a shard and sets its marker.
        address: of a running cluster (`auto`, `host:port`); None starts one on this machine with `workers` processors.
        memory: bytes that each task reserves and may use.

    Raises:
        what the task raised; WorkerError if its worker was killed again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("scale", "--engine ray") from error
    mine = not ray.is_initialized()
    if mine:
        options: dict[str, Any] = {"address": address} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(log_to_driver=False, **options)

    def work(shard: int) -> int:
        prepare_worker(memory)
        finish(shard)
        return shard

    reserved: dict[str, Any] = {"memory": memory} if memory and (address or not mine) else {}
    remote: Any = ray.remote(num_cpus=1, max_retries=RETRIES, **reserved)(work)
    try:
        waiting = [remote.remote(shard) for shard in shards]
        while waiting:
            done, waiting = ray.wait(waiting)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:  # its own text is the trace of the worker
        raise error.cause from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise WorkerError(f"a shard's worker was killed {RETRIES + 1} times; what is finished is kept") from error
    finally:
        if mine:
            ray.shutdown()
