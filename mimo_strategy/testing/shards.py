"""The tensors of a model as this rank holds them, under the names and places that checkpoints give them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from mimo_strategy.checkpoint.shards import model_entries, shards_of
from mimo_strategy.module import MimoModule
from mimo_strategy.optimizer import ModuleOptimizer


class Shard(NamedTuple):
    """A tensor, or the part of one that a rank holds.

    Attributes:
        name: of the whole tensor, the same in every layout.
        place: index of the part in the whole tensor.
        whole_shape: shape of the whole tensor.
        data: the part.
    """

    name: str
    place: tuple[int | slice, ...]
    whole_shape: tuple[int, ...]
    data: Tensor


def weight_shards(module: MimoModule) -> list[Shard]:
    """Parameters and buffers of this rank; what is written to them changes the model."""
    if module.runtime is not None:
        module.runtime.gather_parameters()
    return list(_shards(module, Tensor.detach))


def gradient_shards(module: MimoModule, optimizer: torch.optim.Optimizer) -> list[Shard]:
    """Gradients of this rank's parameters that the optimizer is about to apply; collective over each module's ranks.

    Frozen parameters have none.
    """
    if not isinstance(optimizer, ModuleOptimizer):
        return list(_shards(module, lambda tensor: tensor.grad))
    gradients = {
        parameter: parameter.main_grad for parameter in module.model.parameters() if hasattr(parameter, "main_grad")
    }
    for part in optimizer.megatron_optimizer.parts:
        if isinstance(part, DistributedOptimizer):
            gradients |= _gather_gradients(part)
    return list(_shards(module, gradients.get))


def assemble(shards: list[Shard]) -> dict[str, Tensor]:
    """Whole tensors, by name, from the shards of a process that holds all of them."""
    whole: dict[str, Tensor] = {}
    for shard in shards:
        whole.setdefault(shard.name, shard.data.new_zeros(shard.whole_shape))[shard.place] = shard.data
    return whole


def _shards(module: MimoModule, read: Callable[[Tensor], Tensor | None]) -> Iterator[Shard]:
    for entry in model_entries(module.model):
        data = read(entry.data)
        if data is None:
            continue
        for part in shards_of(replace(entry, data=data)):
            yield Shard(part.key, part.global_slice(), part.global_shape, part.data)


def _gather_gradients(optimizer: DistributedOptimizer) -> dict[Parameter, Tensor]:
    """Whole gradients from the ranges that each data-parallel rank has reduced and is going to apply."""
    gradients = {}
    for buffer in optimizer.buffers:
        reduced = torch.zeros_like(buffer.grad_data)
        for parameter in buffer.params:
            if parameter in optimizer.model_param_gbuf_map:
                owned = optimizer._get_model_param_range_map(parameter)["gbuf_world"]
                reduced[owned.start : owned.end] = buffer.grad_data[owned.start : owned.end]
        dist.all_reduce(reduced, group=optimizer.data_parallel_group)
        for parameter in buffer.params:
            start, end, _ = buffer.param_index_map[parameter]
            gradients[parameter] = reduced[start:end].view(parameter.shape)
    return gradients
