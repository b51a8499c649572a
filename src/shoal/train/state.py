"""The state of a run as named tensors, and back: weights, what the optimisers remember, random numbers.

Names are the model's own, so a state does not depend on how parameters are grouped or ordered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shoal.errors import FileError
from shoal.model import Model
from shoal.train.checkpoint import Saved, State
from shoal.train.process import Process

CPU_RANDOM, GPU_RANDOM = "torch.cpu", "torch.cuda"


def gather(model: Model, optimisers: Sequence[torch.optim.Optimizer], process: Process) -> State:
    """Everything that the next step depends on, besides its number and the recipe."""
    return {
        "model": {name: process.whole(value) for name, value in changing(model).items()},
        "optimiser": {name: process.whole(value) for name, value in _optimiser_tensors(model, optimisers)},
        "random": _random_tensors(),
    }


@torch.no_grad()
def restore(saved: Saved, model: Model, optimisers: Sequence[torch.optim.Optimizer], process: Process) -> None:
    """Put a checkpoint's state into a model and its optimisers.

    Raises:
        FileError: the checkpoint lacks a tensor, or has one of another shape or too many.
    """
    targets = {name: process.whole(value) for name, value in changing(model).items()}
    _check_names(saved, "model", targets)
    for name, target in targets.items():
        _check_shape(saved, "model", name, target)
    process.load(saved, "model", targets)
    _restore_optimisers(saved, model, optimisers, process)
    random = saved.tensors("random")
    torch.set_rng_state(random[CPU_RANDOM])
    if GPU_RANDOM in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[GPU_RANDOM])


def changing(model: Model) -> dict[str, Tensor]:
    """The weights and buffers of a model without those that are frozen, which come from where they came from."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _optimiser_tensors(model: Model, optimisers: Sequence[torch.optim.Optimizer]) -> list[tuple[str, Tensor]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [
        (f"{number}.{key}.{names[parameter]}", value)
        for number, optimiser in enumerate(optimisers)
        for parameter, entry in optimiser.state.items()
        for key, value in entry.items()
    ]


def _restore_optimisers(
    saved: Saved, model: Model, optimisers: Sequence[torch.optim.Optimizer], process: Process
) -> None:
    parameters = dict(model.named_parameters())
    held = [{p for group in optimiser.param_groups for p in group["params"]} for optimiser in optimisers]
    targets = {}
    for full, stored in saved.parts["optimiser"].items():
        number, key, name = full.split(".", 2)
        parameter = parameters.get(name)
        if parameter is None or not number.isdigit() or parameter not in dict(enumerate(held)).get(int(number), ()):
            raise FileError(saved.path, "belongs to no optimiser of this recipe", item=full)
        # A scalar counts steps. As in torch's own load_state_dict, fused optimisers do so on the parameter's device.
        scalar = torch.empty((), device=parameter.device)
        value = torch.empty_like(parameter if stored.shape else scalar, dtype=stored.dtype)
        targets[full] = process.whole(value)
        if stored.shape:
            _check_shape(saved, "optimiser", full, targets[full])
        optimisers[int(number)].state[parameter][key] = value
    process.load(saved, "optimiser", targets)


def _random_tensors() -> dict[str, Tensor]:
    out = {CPU_RANDOM: torch.get_rng_state()}
    if torch.cuda.is_available():
        out[GPU_RANDOM] = torch.cuda.get_rng_state()
    return out


def _check_names(saved: Saved, part: str, expected: Mapping[str, Tensor]) -> None:
    for name in expected.keys() ^ saved.parts[part].keys():
        problem = "is missing" if name in expected else "has no place in this recipe's model"
        raise FileError(saved.path / f"{part}.safetensors", problem, item=name)


def _check_shape(saved: Saved, part: str, name: str, expected: Tensor) -> None:
    shape = saved.parts[part][name].shape
    if shape != expected.shape:
        problem = f"has shape {list(shape)}, the recipe asks for {list(expected.shape)}"
        raise FileError(saved.path / f"{part}.safetensors", problem, item=name)
