"""Checkpoints of several processes: PyTorch's Distributed Checkpoint decides who writes and reads which piece of which
tensor, whatever the number of processes then and now; the files are those of `checkpoint`, whole or not there at all.

DCP's own storage keeps what lies where as a pickle, which a house without pickles does not read.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from shoal.errors import RunError
from shoal.formats.atomic import require_empty, sync_folder
from shoal.train import checkpoint
from shoal.train.checkpoint import Saved, State


def save(folder: Path, step: int, state: State, meta: Mapping[str, Any], *, keep: int, rank: int) -> None:
    """As `checkpoint.save`, but by all processes together, each with its pieces of the state.

    Raises:
        RunError: in every process, if the disk refuses any of them.
    """
    flat = {f"{part}/{name}": value for part, tensors in state.items() for name, value in tensors.items()}
    writer = Writer(folder, step, meta, keep=keep, rank=rank)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        state_dict_saver.save(flat, storage_writer=writer, planner=planner)
    except CheckpointException as failure:
        if rank == 0:
            shutil.rmtree(writer.temporary, ignore_errors=True)
        first = min(failure.failures)
        raise checkpoint.not_saved(folder, step, f"rank {first}: {failure.failures[first][0]}") from failure


def load(saved: Saved, part: str, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill `targets`, plain tensors or this process's pieces of them (DTensor), from one part of a checkpoint."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        state_dict_loader.load(dict(targets), storage_reader=Reader(saved, part), planner=planner)
    except CheckpointException as failure:
        first = min(failure.failures)
        raise RunError(f"{saved.path} could not be read: rank {first}: {failure.failures[first][0]}") from failure


class Writer(StorageWriter):
    """Writes a checkpoint: every process its files, then the coordinator what makes them one.

    Attributes:
        temporary: the hidden folder in which it grows; the same for all processes.
    """

    def __init__(self, folder: Path, step: int, meta: Mapping[str, Any], *, keep: int, rank: int) -> None:
        self.folder, self.step, self.meta, self.keep, self.rank = folder, step, meta, keep, rank
        self.path = checkpoint.path_of(folder, step)
        self.temporary = folder / f".{self.path.name}.shared.partial"

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """The coordinator makes room, before any process writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        require_empty(self.path)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, tuple[list[int], list[int]]]]] = {}
        for item in plan.items:
            assert item.tensor_data is not None
            chunk, shape = item.tensor_data.chunk, list(item.tensor_data.size)
            if not math.prod(chunk.sizes):
                continue
            part, name = item.index.fqn.split("/", 1)
            tensors, places = parts.setdefault(part, ({}, {}))
            value = planner.resolve_data(item)
            assert isinstance(value, torch.Tensor)
            tensors[name] = value
            if list(chunk.sizes) != shape:
                places[name] = (list(chunk.offsets), shape)
        files: dict[str, Any] = {}
        try:
            for part, (tensors, places) in parts.items():
                files |= checkpoint.write_part(self.temporary / f"{part}-{self.rank:05d}.safetensors", tensors, places)
        except Exception as error:  # an exception of any kind travels to the others as text
            problem = checkpoint.problem_of(error, self.path)
            raise RuntimeError(problem.replace(str(self.temporary), str(self.path))) from None
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, files) for item in plan.items[:1]])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        files = {name: info for each in results for result in each for name, info in result.storage_data.items()}
        checkpoint.seal(self.temporary, self.step, dict(sorted(files.items())), self.meta)
        sync_folder(self.temporary)
        self.temporary.rename(self.path)
        sync_folder(self.folder)
        checkpoint.retire(self.folder, self.keep)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class Reader(StorageReader):
    """Reads one part of a checkpoint of any number of processes."""

    def __init__(self, saved: Saved, part: str) -> None:
        self.tensors = saved.parts[part]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        out: dict[str, Any] = {}
        for name, stored in self.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.file.entries[name].shape))
                for piece in stored.pieces
            ]
            properties = TensorProperties(dtype=stored.dtype)
            out[name] = TensorStorageMetadata(properties, torch.Size(stored.shape), chunks)
        return Metadata(state_dict_metadata=out)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            index: MetadataIndex = item.storage_index
            stored = self.tensors[index.fqn]
            number = next(n for n, piece in enumerate(stored.pieces) if piece.offset == tuple(index.offset or ()))
            block: Any = (*map(slice, item.storage_offsets, map(int.__add__, item.storage_offsets, item.lengths)), ...)
            target = planner.resolve_tensor(item).detach()
            target.copy_(checkpoint.to_torch(stored.view(number)[block]))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
