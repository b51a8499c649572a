"""Several processes that train one model, started by `torchrun` (or anything that sets the same variables).

Every process reads its share of each batch. Weights, gradients and optimiser state are cut over all of them by FSDP2
(`fully_shard`); a layer is whole only while it is at work. With `parallel.expert` = S, the experts of a layer are first
dealt out over groups of S neighbours (`dispatch`) and cut over the groups. Losses are divided by the counts of the
whole batch, so gradients are summed, not averaged, and N processes take the steps that one would.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Shard

from shoal.config import ModelConfig
from shoal.errors import ShoalError
from shoal.model import Model
from shoal.model.block import Block
from shoal.model.moe import MoE
from shoal.settings import Launched
from shoal.train import checkpoint, pieces
from shoal.train.checkpoint import Saved, Say, State
from shoal.train.dispatch import deal_out
from shoal.train.process import Process
from shoal.train.recipe import Recipe
from shoal.train.rollcall import RollCall
from shoal.train.shards import local, mesh_of

# How long processes may take to find each other.
START_SECONDS = 600.0


@contextlib.contextmanager
def company(place: Launched) -> Iterator[Company]:
    """Join the other processes, and leave them in an orderly way: with last words if something goes wrong."""
    process = Company(place)
    try:
        with contextlib.closing(process.roll):
            yield process
            process.part()
    except BaseException as error:
        if process.leave(error):
            raise
        raise SystemExit(error.exit_code if isinstance(error, ShoalError) else 1) from error


class Company(Process):
    """A process that trains with others.

    Attributes:
        roll: what they know of each other.
        everybody: the mesh of all processes.
        dealt: the mesh that experts are cut over, [expert, replica]; None where they are cut like all else.
    """

    def __init__(self, place: Launched) -> None:
        super().__init__(f"cuda:{place.local_rank}" if torch.cuda.is_available() else "cpu")
        self.rank, self.world = place.rank, place.world
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=START_SECONDS)))
        self._store = store
        self.roll = RollCall(store, self.rank, self.world)
        self.dealt: DeviceMesh | None = None

    def begin(self, recipe: Recipe) -> None:
        super().begin(recipe)
        if not dist.is_initialized():
            self._connect(recipe.parallel.timeout)
        ranks = torch.arange(self.world)
        self.everybody = DeviceMesh(self.device.type, ranks, mesh_dim_names=("process",))
        self.dealt = None
        if recipe.parallel.expert > 1:
            # Neighbours exchange tokens: they are likeliest to share a machine.
            grid = ranks.view(-1, recipe.parallel.expert).T
            self.dealt = DeviceMesh(self.device.type, grid, mesh_dim_names=("expert", "replica"))

    def _connect(self, timeout: float) -> None:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=timeout),
        )

    # ---- the model in pieces

    def make(self, config: ModelConfig, seed: int) -> Model:
        # Layer by layer, in the order in which one process draws them: nobody ever holds the whole.
        with torch.device("meta"):
            model = Model(config)
        generator = torch.Generator().manual_seed(seed)
        inner = model.model
        for part in (inner.embed_tokens, *inner.layers, inner.norm, *([model.lm_head] if model.lm_head else [])):
            part.to_empty(device="cpu")
            model.init_weights(generator, part)
            if isinstance(part, Block):
                self._cut_layer(part)
        return self._cut_rest(model)

    def wrap(self, model: Model) -> Model:
        for layer in model.model.layers:
            self._cut_layer(cast(Block, layer))
        return self._cut_rest(model)

    def _cut_layer(self, layer: Block) -> None:
        if self.dealt is not None and isinstance(layer.mlp, MoE):
            deal_out(layer.mlp.experts, self.dealt.get_group("expert"))
            self._cut(layer.mlp.experts, self.dealt["replica"])
        self._cut(layer, self.everybody)

    def _cut_rest(self, model: Model) -> Model:
        # Embedding, last norm and head stay whole from `states` to the end of the backward pass, for the losses and the
        # MTP layers use them directly.
        self._cut(model, self.everybody)
        register_fsdp_forward_method(model, "states")
        return model

    def _cut(self, module: nn.Module, mesh: DeviceMesh) -> None:
        fully_shard(module, mesh=mesh)
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)

    def settle(self, model: Model) -> None:
        cast(FSDPModule, model).reshard()

    @torch.no_grad()
    def clip(self, model: Model, limit: float) -> Tensor:
        # Every value lies with one process, so the squares add up.
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        norm = self.sum(nn.utils.get_total_norm(grads).to(self.device).square()).sqrt()
        if limit:
            torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        if self.dealt is None or mesh_of(tensor) != self.dealt["replica"]:
            return tensor
        experts = tensor.shape[0] * self.dealt.size(0)
        shape = torch.Size((experts, *tensor.shape[1:]))
        stride = tensor.stride()
        return DTensor.from_local(
            local(tensor), self.dealt, (Shard(0), Shard(0)), run_check=False, shape=shape, stride=stride
        )

    # ---- agreeing

    def sum(self, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    def largest(self, number: int) -> int:
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            self.roll.lead_first()
        yield
        if self.leads:
            self.roll.lead_first()

    # ---- checkpoints

    def newest(self, folder: Path, say: Say) -> Saved | None:
        saved = None
        with self.in_turn():
            if self.leads:
                saved = checkpoint.newest(folder, say)
        step = self.largest(saved.step if saved is not None else -1)
        if self.leads or step < 0:
            return saved
        return checkpoint.open_saved(checkpoint.path_of(folder, step), step, verify=False)

    def save(self, folder: Path, step: int, state: State, meta: Mapping[str, Any], *, keep: int) -> None:
        pieces.save(folder, step, state, meta, keep=keep, rank=self.rank)

    def load(self, saved: Saved, part: str, targets: Mapping[str, Tensor]) -> None:
        pieces.load(saved, part, targets)

    # ---- ends

    def lost(self, error: RuntimeError) -> str | None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when it misses a process; first the news
        return self.roll.call(repr(error))

    def part(self) -> None:
        """End together: who leaves early would be taken for dead."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def leave(self, error: BaseException) -> bool:
        """Say why this process ends; whether it is also the one to tell the user."""
        first = min(set(range(self.world)) - set(self.roll.absent))
        with contextlib.suppress(DistError):
            self.roll.leave(str(error) if isinstance(error, (ShoalError, SystemExit)) else repr(error))
        return self.rank == first
