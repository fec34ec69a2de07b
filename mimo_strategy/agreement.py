"""What all ranks must agree on, compared before a difference could make them wait for each other forever."""

from typing import Any

import torch.distributed as dist


def of_every_rank(value: Any) -> list[Any]:
    """What every rank gives, in rank order; collective over the world. Without ``torch.distributed`` there is one."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def on_equal(what: str, value: Any) -> None:
    """Check that ``value`` is equal on every rank; collective over the world.

    Raises:
        ValueError: on every rank, with what each has.
    """
    values = of_every_rank(value)
    if any(other != values[0] for other in values):
        raise ValueError(f"the {what} must be the same on every rank, but is " + _by_value(values))


def on_next_batch(has_batch: bool, num_served: int) -> None:
    """Check that all ranks have a further batch, or none has; collective over the world.

    Raises:
        ValueError: on every rank, with the ranks whose loader has ended.
    """
    flags = of_every_rank(has_batch)
    if not all(flags) and any(flags):
        ended = [rank for rank, flag in enumerate(flags) if not flag]
        raise ValueError(
            f"the loader of rank(s) {ended} ended after {num_served} step batches, that of the others did not: every "
            "rank must read the same stream"
        )


def _by_value(values: list[Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on rank(s) {', '.join(map(str, held_by))}" for value, held_by in ranks.items())
