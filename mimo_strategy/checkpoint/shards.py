"""What is saved: tensors by name, of which every rank holds some parts.

Names and shapes are those of the whole model, whatever the layout, and so is the state of the optimizer: the part of a
flattened parameter that a distributed optimizer updates on one rank is cut into rectangles of the parameter.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from mimo_strategy.layout import LANGUAGE
from mimo_strategy.runtime.model import HeteroMimoModel
from mimo_strategy.runtime.optimizer import HeteroOptimizer
from mimo_strategy.runtime.optimizer_state import MASTER_WEIGHTS, parameter_states

OPTIMIZER = "optimizer."
MASTER = f"{OPTIMIZER}{MASTER_WEIGHTS}."

# Each layer and each expert under a name of its own, not stacked with the others.
_METADATA = {"non_homogeneous_layers": True, "singleton_local_shards": True}


def name_prefix(module: str) -> str:
    """What the names of all weights of a module start with."""
    return "language_model." if module == LANGUAGE else f"modality_submodules.{module}."


def model_entries(model: HeteroMimoModel) -> list[ShardedTensor | ShardedTensorFactory]:
    """This rank's weights and buffers, under the names that checkpoints give them.

    Args:
        model: wrapped or not; the names are the same.
    """
    entries = []
    for entry in model.sharded_state_dict(metadata=_METADATA).values():
        if not isinstance(entry, ShardedObject):
            entries.append(replace(entry, key=_stable_name(entry.key)))
        elif not entry.key.endswith("._extra_state"):
            # those are Transformer Engine's scaling factors of FP8, pickled; they are found anew in a few steps
            raise TypeError(f"{entry.key} is a {type(entry.data).__name__}, only tensors can be saved")
    return entries


def shards_of(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The parts of an entry that have names of their own, such as the projections that Mamba computes in one."""
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    return [replace(part, allow_shape_mismatch=False) for part in parts]


def model_shards(model: HeteroMimoModel) -> list[ShardedTensor]:
    """This rank's shards of weights and buffers, whose data are those of the model, wrapped or not."""
    return [shard for entry in model_entries(model) for shard in shards_of(entry)]


def model_and_optimizer_shards(
    model: HeteroMimoModel, optimizer: HeteroOptimizer
) -> tuple[list[ShardedTensor], list[ShardedTensor]]:
    """This rank's shards of the model and of the optimizer's state, named ``optimizer.<state>.<weight>``.

    Their data are those in use.
    """
    weights = [(entry.data, shards_of(entry)) for entry in model_entries(model)]
    by_parameter = {id(tensor): shards for tensor, shards in weights}
    states = [
        shard
        for held in parameter_states(optimizer)
        for name, tensor in held.tensors.items()
        for weight in by_parameter[id(held.parameter)]
        for shard in _within(weight, held.parameter, held.start, held.stop, tensor, f"{OPTIMIZER}{name}", held.instance)
    ]
    return [shard for _, shards in weights for shard in shards], states


def _stable_name(key: str) -> str:
    """The key without the wrappers, whose number depends on the precision."""
    return re.sub(r"^(language_model|modality_submodules\.\w+)(\.module)+\.", r"\1.", key)


def _within(
    weight: ShardedTensor,
    parameter: torch.Tensor,
    start: int,
    stop: int,
    state: torch.Tensor,
    prefix: str,
    instance: int | None,
) -> Iterator[ShardedTensor]:
    """The parts of ``weight``, itself a part of ``parameter``, that the elements from ``start`` to ``stop`` cover."""
    first = weight.data.storage_offset() - parameter.storage_offset()
    begin, end = max(start, first), min(stop, first + weight.data.numel())
    if begin >= end:
        return
    # a distributed optimizer's shards are held once among the data-parallel ranks, the last of the replica's indices
    replica = weight.replica_id if instance is None else (*weight.replica_id[:-1], instance)
    for offset, sizes, position in rectangles(weight.local_shape, begin - first, end - first):
        part = state.narrow(0, first + position - start, prod(sizes)).view(sizes)
        yield ShardedTensor(
            f"{prefix}.{weight.key}",
            part,
            part.dtype,
            sizes,
            weight.global_shape,
            tuple(whole + local for whole, local in zip(weight.global_offset, offset, strict=True)),
            None,
            replica,
        )


def rectangles(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Cut the elements from ``start`` to ``stop`` of a flattened tensor into rectangles of the tensor.

    Yields:
        Offset and sizes of a rectangle, and its first element in the flattened tensor, in the order of the elements.
    """
    if len(shape) < 2:
        yield (start,) * len(shape), (stop - start,) * len(shape), start
        return
    row = prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        whole_rows = 0 if within else (stop - start) // row
        if whole_rows:
            yield (index, *[0] * (len(shape) - 1)), (whole_rows, *shape[1:]), start
            start += whole_rows * row
            continue
        end = min(stop, (index + 1) * row)
        for offset, sizes, position in rectangles(shape[1:], within, end - index * row):
            yield (index, *offset), (1, *sizes), index * row + position
        start = end
