"""Bytes of parameters, gradients and optimizer state on every rank, exactly as megatron-core 0.19.2 lays them out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from mimo_strategy.layout import ModuleLayout
from mimo_strategy.planning.cost import ModuleCost

# of megatron-core's buffers, in elements
_TENSOR_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128
_BUCKET_ALIGNMENT_FOR_BANDWIDTH = 2**16
_SMALLEST_BUCKET = 40_000_000
_BUCKET_PER_LANE = 1_000_000
_FLOAT = 4

_ELEMENT_SIZES = {"32-true": (4, 4), "bf16-mixed": (2, 4), "16-mixed": (2, 4), "bf16-true": (2, 2)}


@dataclass(frozen=True)
class Training:
    """How parameters are kept, reduced and updated (by Adam).

    Args:
        precision: of the Trainer.
        shards_optimizer: whether data-parallel ranks share the optimizer's state.
        buckets: whether gradients are reduced bucket by bucket.
        bucket_size: elements of a bucket; ``None`` is megatron-core's default.
        pads_for_bandwidth: whether buckets are padded to 2**16 elements.

    Raises:
        ValueError: for an unknown precision.
    """

    precision: str = "bf16-mixed"
    shards_optimizer: bool = True
    buckets: bool = False
    bucket_size: int | None = None
    pads_for_bandwidth: bool = False

    def __post_init__(self) -> None:
        if self.precision not in _ELEMENT_SIZES:
            raise ValueError(f"precision {self.precision!r} is not supported; choose one of {sorted(_ELEMENT_SIZES)}")

    @classmethod
    def of(cls, ddp: Any, precision: str) -> Self:
        """From megatron-core's ``DistributedDataParallelConfig``."""
        return cls(
            precision,
            ddp.use_distributed_optimizer,
            ddp.overlap_grad_reduce,
            ddp.bucket_size,
            ddp.pad_buckets_for_high_nccl_busbw,
        )

    @property
    def element_size(self) -> int:
        """Bytes of an element of parameters and activations."""
        return _ELEMENT_SIZES[self.precision][0]

    @property
    def gradient_size(self) -> int:
        """Bytes of an element of gradients."""
        return _ELEMENT_SIZES[self.precision][1]

    @property
    def state_size(self) -> int:
        """Bytes of optimizer state for an element: two averages, and the weight in float32 where the model's is not."""
        return 2 * _FLOAT + (_FLOAT if self.element_size < _FLOAT else 0)


@dataclass(frozen=True)
class FlatBuffer:
    """Tensors laid out one after another, as ranks of a group share them.

    Args:
        tensors: elements of each, in the order of the module.
        num_shards: ranks that share the optimizer's state.
        bucket_size: elements from which on a bucket ends; ``None`` is one bucket.
        training: how they are updated.
    """

    tensors: tuple[int, ...]
    num_shards: int
    bucket_size: int | None
    training: Training

    @cached_property
    def _buckets(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Start and end of every bucket, and of the tensors in it: from the last one on, as gradients come."""
        buckets, held = [], []
        begin = position = 0
        for elements in reversed(self.tensors):
            start = _rounded(position, _TENSOR_ALIGNMENT)
            position = start + elements
            held.append((start, position))
            if self.bucket_size is not None and position - begin >= self.bucket_size:
                position = _rounded(position, self._alignment)
                buckets.append((begin, position, held))
                begin, held = position, []
        if held:
            buckets.append((begin, _rounded(position, self._alignment), held))
        return buckets

    @property
    def _alignment(self) -> int:
        bandwidth = _BUCKET_ALIGNMENT_FOR_BANDWIDTH if self.training.pads_for_bandwidth else 1
        return math.lcm(self.num_shards, _BUCKET_ALIGNMENT, bandwidth)

    @cached_property
    def elements(self) -> int:
        """Of the whole buffer, with what megatron-core pads it by if the optimizer is sharded."""
        if not self.training.shards_optimizer:
            return sum(self.tensors)
        return self._buckets[-1][1] if self._buckets else 0

    @cached_property
    def shards(self) -> list[int]:
        """Elements that each rank of the group updates."""
        if not self.training.shards_optimizer:
            return [sum(self.tensors)] * self.num_shards
        shards = [0] * self.num_shards
        for begin, end, tensors in self._buckets:
            size = (end - begin) // self.num_shards
            for start, stop in tensors:
                for shard in range((start - begin) // size, -(-(stop - begin) // size)):
                    low, high = begin + shard * size, begin + (shard + 1) * size
                    shards[shard] += max(0, min(stop, high) - max(start, low))
        return shards


@dataclass(frozen=True)
class StageMemory:
    """What the ranks of one pipeline stage of a module hold between steps.

    Args:
        dense: tensors that all ranks of a tensor-parallel coordinate hold.
        experts: tensors that differ between ep ranks.
        training: how they are updated.
    """

    dense: FlatBuffer
    experts: FlatBuffer
    training: Training

    @cached_property
    def parameters(self) -> int:
        """Bytes of a rank's parameters."""
        return (self.dense.elements + self.experts.elements) * self.training.element_size

    @cached_property
    def gradients(self) -> int:
        """Bytes of a rank's gradients."""
        return (self.dense.elements + self.experts.elements) * self.training.gradient_size

    def optimizer(self, layout: ModuleLayout, rank: int) -> int:
        """Bytes of optimizer state on a global rank; without the counts of updates, one number a tensor."""
        at = layout.coordinates(rank)
        elements = self.dense.shards[at["dp"] * layout.cp + at["cp"]] + self.experts.shards[at["edp"]]
        return elements * self.training.state_size

    @cached_property
    def largest_optimizer(self) -> int:
        """Bytes of optimizer state that no rank exceeds."""
        per_rank = [
            -(-buffer.elements // buffer.num_shards) if self.training.shards_optimizer else buffer.elements
            for buffer in (self.dense, self.experts)
        ]
        return sum(per_rank) * self.training.state_size


def stage_memory(layout: ModuleLayout, cost: ModuleCost, stage: int, training: Training) -> StageMemory:
    """What the ranks of ``stage`` hold."""
    dense: list[int] = []
    experts: list[int] = []
    for layer in cost.stages[stage]:
        for elements, is_expert in layer.elements(layout):
            (experts if is_expert else dense).append(elements)
    bucket_size = None
    if training.buckets and stage == 0:
        # later stages are not bucketed
        bucket_size = training.bucket_size or max(_SMALLEST_BUCKET, _BUCKET_PER_LANE * layout.dp)
    return StageMemory(
        FlatBuffer(tuple(dense), layout.dp * layout.cp, bucket_size, training),
        FlatBuffer(tuple(experts), layout.edp, bucket_size, training),
        training,
    )


def gibibytes(size: float) -> str:
    """A number of bytes in the unit that fits."""
    units: Sequence[str] = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log2(size)) // 10, len(units) - 1) if size >= 1 else 0
    return f"{size / 1024**power:.{0 if power == 0 else 1}f} {units[power]}"


def _rounded(number: int, divisor: int) -> int:
    return -(-number // divisor) * divisor
