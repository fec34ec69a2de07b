"""One order of samples for all ranks: what draws at random draws alike on each of them."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DistributedSampler, Sampler

from mimo_strategy.lightning_private import inner_sampler


def generator(lane: int) -> torch.Generator:
    """Where random orders and workers' seeds come from; ranks may have default generators in different states."""
    return torch.Generator().manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)) + lane)


def draw_alike(sampler: Any) -> None:
    """Let a sampler, and those that it takes its samples from, draw the same order on every rank.

    Samplers of torch that were given no generator would draw from the rank's default one.

    Raises:
        ValueError: if one of them gives each rank a part of the order.
    """
    for part in _with_inner(sampler):
        if isinstance(part, DistributedSampler) and part.num_replicas > 1:
            raise ValueError(
                f"the DataLoader has a DistributedSampler of {part.num_replicas} replicas, but the strategy shares the "
                "samples of one global order itself: give it a plain sampler"
            )
        if isinstance(part, Sampler) and getattr(part, "generator", part) is None:
            part.generator = generator(0)


def sampler_name(sampler: Any) -> str:
    """The class that makes the order, within whatever wraps it."""
    *_, innermost = _with_inner(sampler)
    return type(innermost).__name__


def _with_inner(sampler: Any) -> Iterator[Any]:
    while sampler is not None:
        yield sampler
        sampler = inner_sampler(sampler)
