"""Load a checkpoint that any layout wrote: check all of it first, then read this rank's parts in place."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, override

import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_warn
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.checkpointable import (
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata

from mimo_strategy.agreement import of_every_rank
from mimo_strategy.checkpoint.directory import located
from mimo_strategy.checkpoint.errors import CheckpointError
from mimo_strategy.checkpoint.manifest import damage, read_manifest
from mimo_strategy.checkpoint.random_state import RANDOM
from mimo_strategy.checkpoint.safe_reading import read_index, read_object, tensor_shapes
from mimo_strategy.checkpoint.shards import MASTER, OPTIMIZER

LIGHTNING_STATE = "lightning.pt"


@dataclass(frozen=True)
class Mismatch:
    """Names by which a checkpoint and what is to be loaded differ.

    Attributes:
        missing: tensors that the checkpoint does not have.
        unexpected: tensors that only the checkpoint has.
        reshaped: shapes in the checkpoint and in the model, where they differ.
    """

    missing: list[str]
    unexpected: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    def warn(self, path: str | Path) -> None:
        """Say what was left out of loading ``path``, if anything was."""
        if self.missing or self.unexpected:
            rank_zero_warn(f"Loaded {path} without\n{self}")

    def __str__(self) -> str:
        lines = [
            f"{name}: {list(stored)} in the checkpoint, {list(wanted)} in the model"
            for name, (stored, wanted) in self.reshaped.items()
        ]
        lines += [f"{name}: not in the checkpoint" for name in self.missing]
        lines += [f"{name}: not in the model" for name in self.unexpected]
        return "\n".join(f"  {line}" for line in lines)


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint is of the model, and not of its optimizer or random streams."""
    return not name.startswith((OPTIMIZER, RANDOM))


class TensorSource(ABC):
    """Tensors by name that shards can be read from.

    Attributes:
        path: where they are.
        shapes: of the whole tensors, by name.
    """

    path: Path
    shapes: Mapping[str, Sequence[int]]

    @abstractmethod
    def read(self, shards: Iterable[ShardedTensor]) -> None:
        """Read into the shards' data, converting their dtype.

        Raises:
            CheckpointError: if a file cannot be read or does not hold what it says it does.
        """

    def compare(self, shards: Iterable[ShardedTensor], expected: Callable[[str], bool] = is_weight) -> Mismatch:
        """How the checkpoint differs from the tensors that all ranks hold shards of.

        Args:
            shards: this rank's.
            expected: whether a tensor of the checkpoint, by its name, should be among them.
        """
        wanted: dict[str, tuple[int, ...]] = {}
        for of_rank in of_every_rank({shard.key: tuple(shard.global_shape) for shard in shards}):
            wanted |= of_rank
        return Mismatch(
            sorted(wanted.keys() - self.shapes.keys()),
            sorted(name for name in self.shapes.keys() - wanted.keys() if expected(name)),
            {
                name: (tuple(self.shapes[name]), shape)
                for name, shape in sorted(wanted.items())
                if tuple(self.shapes.get(name, shape)) != shape
            },
        )

    def require(self, mismatch: Mismatch, *, strict: bool = True) -> None:
        """Raise if what differs cannot be loaded.

        Args:
            mismatch: from :meth:`compare`.
            strict: whether no tensor may be missing or unexpected; shapes must always agree.

        Raises:
            CheckpointError: listing all mismatches; on every rank.
        """
        if mismatch.reshaped or (strict and (mismatch.missing or mismatch.unexpected)):
            raise CheckpointError(f"{self.path} does not fit the model:\n{mismatch}")

    def holds(self, shard: ShardedTensor) -> bool:
        """Whether there is a tensor of this name and shape."""
        return tuple(self.shapes.get(shard.key, ())) == tuple(shard.global_shape)

    def in_best_precision(self, shard: ShardedTensor) -> ShardedTensor:
        """The shard under the name that its values are best read from: the optimizer's copy, or the weight itself."""
        master, weight = f"{MASTER}{shard.key}", shard.key.removeprefix(MASTER)
        if shard.dtype == torch.float32 and master in self.shapes:
            return replace(shard, key=master)
        return replace(shard, key=weight) if shard.key not in self.shapes and weight in self.shapes else shard


class Checkpoint(TensorSource):
    """A checkpoint whose files have been found to be what was written. Made by all ranks together.

    Without ``torch.distributed`` this process is alone.

    Raises:
        CheckpointError: if it is not whole, naming the files; on every rank.
    """

    def __init__(self, path: Path) -> None:
        self.path = located(path)
        problem = None
        try:
            files = read_manifest(self.path)["files"]
            # largest first, so that the ranks' shares are of similar size
            by_size = sorted(files, key=lambda name: (-files[name]["bytes"], name))
            share = by_size[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else by_size
            found = damage(self.path, {name: files[name] for name in share})
            if found:
                raise CheckpointError("\n  ".join([f"{self.path} is damaged:", *found]))
            self.index: Metadata = read_index(self.path, files)
            self.shapes = tensor_shapes(self.index)
        except CheckpointError as error:
            problem = str(error)
        problems = [problem for problem in of_every_rank(problem) if problem]
        if problems:
            raise CheckpointError("\n".join(dict.fromkeys(problems)))

    def lightning_state(self) -> dict[str, Any]:
        """What Lightning keeps in a checkpoint: loops, callbacks, schedulers, hyper-parameters."""
        return read_object(self.path / LIGHTNING_STATE)

    @override
    def read(self, shards: Iterable[ShardedTensor]) -> None:
        by_name = defaultdict(list)
        for shard in shards:
            by_name[shard.key].append(replace(shard, data=shard.data.detach()))
        planner = MCoreLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(
            {
                name: LocalShardsContainer([CheckpointableShardedTensor.from_sh_ten(shard) for shard in shards])
                for name, shards in by_name.items()
            },
            self.index,
        )
        items = planner.create_local_plan().items
        wanted = sum(shard.data.numel() for shards in by_name.values() for shard in shards)
        if sum(prod(item.lengths) for item in items) != wanted:
            raise CheckpointError(f"{self.path}: its index does not cover all tensors")
        places = self.index.storage_data
        last, stored = None, None
        for item in sorted(items, key=lambda item: _position(places[item.storage_index])):
            place = places[item.storage_index]
            if place is not last:
                path = self.path / place.relative_path
                last, stored = place, read_object(path, offset=place.offset, length=place.length)
            target = planner.resolve_tensor(item)
            target.copy_(stored[slices(item.storage_offsets, item.lengths)])


def _position(place: Any) -> tuple[str, int]:
    return place.relative_path, place.offset


def slices(offsets: Iterable[int], lengths: Iterable[int]) -> tuple[slice, ...]:
    """The index of a rectangle."""
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
