"""What all ranks must agree on, compared before a difference could make them wait for each other forever."""

from collections.abc import Mapping
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
        raise ValueError(f"the {what} must be the same on every rank, but is " + _by_value(dict(enumerate(values))))


def on_next_batch(source: str, num_served: int, samples: Mapping[int, Any] | None) -> None:
    """Check that all ranks have a further step batch, of the same samples, or none has; collective over the world.

    Args:
        source: what the samples come from, in words.
        num_served: step batches before it.
        samples: what this rank knows of its samples, by their position in the step batch; ``None`` without a batch.

    Raises:
        ValueError: on every rank, with the ranks whose loader has ended, or with a sample that differs.
    """
    known = of_every_rank(samples)
    ended = [rank for rank, theirs in enumerate(known) if theirs is None]
    if 0 < len(ended) < len(known):
        raise ValueError(
            f"the loader of rank(s) {ended} ended after {num_served} step batches, that of the others did not: every "
            "rank must read the same stream"
        )
    if ended:
        return
    agreed: dict[int, Any] = {}
    for theirs in known:
        for position, sample in theirs.items():
            if agreed.setdefault(position, sample) != sample:
                here = {rank: theirs[position] for rank, theirs in enumerate(known) if position in theirs}
                raise ValueError(
                    f"{source} must give every rank the same samples in the same order, but sample {position} of step "
                    f"batch {num_served} is {_by_value(here)}"
                )


def _by_value(values: Mapping[int, Any]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(str(value), []).append(rank)
    return ", ".join(f"{value} on rank(s) {', '.join(map(str, held_by))}" for value, held_by in ranks.items())
