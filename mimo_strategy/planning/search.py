"""The layouts of a model that fit a world and its memory, the quickest first."""

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

from mimo_strategy.layout import LANGUAGE, Layout, LayoutError, ModuleParallel, ModuleSizes, Placement
from mimo_strategy.layout_checks import cuda_graph_failures
from mimo_strategy.planning.estimate import Estimate, Estimator, Job

LARGEST_TENSOR_PARALLEL = 8
"""Ranks of a node in the usual machine: beyond it tensor parallelism does not pay."""

_USED_MEMORY = 0.9
"""Of a device's memory; the rest is for buffers of communication, workspaces and fragmentation."""


@dataclass(frozen=True)
class Plan:
    """What a search found.

    Attributes:
        best: estimates of the quickest layouts that fit the memory, in order.
        fitting: how many layouts fit the memory.
        tried: how many fit the world and the step batch.
        smallest: the layout of least memory, where none fits.
        limit: bytes that a rank may use.
    """

    best: tuple[Estimate, ...]
    fitting: int
    tried: int
    smallest: Estimate | None
    limit: float


def search(job: Job, world_size: int, *, keep: int = 10) -> Plan:
    """Estimate all layouts of both placements and all numbers of microbatches that divide the step batch.

    Left out are tp beyond a node and etp other than 1 and tp. Nine tenths of a device's memory may be used.

    Args:
        job: model, step batch and machine.
        world_size: number of ranks.
        keep: how many of the best to return; beside them the best of each placement.
    """
    limit = _USED_MEMORY * job.machine.memory
    estimator = Estimator(job)
    best: list[tuple[float, int, Estimate]] = []
    by_placement: dict[Placement, Estimate] = {}
    smallest: Estimate | None = None
    tried = fitting = 0
    for layout in candidates(job.model.module_sizes(), world_size, job.batch_size):
        if job.cuda_graphs and any(cuda_graph_failures(layout.modules[LANGUAGE])):
            continue
        for num_microbatches in _divisors(job.batch_size // layout.largest_dp):
            tried += 1
            estimate = estimator.estimate(layout, num_microbatches)
            if estimate.peak_bytes > limit:
                if smallest is None or estimate.peak_bytes < smallest.peak_bytes:
                    smallest = estimate
                continue
            fitting += 1
            # of equals the one that was found first
            heapq.heappush(best, (-estimate.step_seconds, -tried, estimate))
            if len(best) > keep:
                heapq.heappop(best)
            other = by_placement.get(layout.placement)
            if other is None or estimate.step_seconds < other.step_seconds:
                by_placement[layout.placement] = estimate
    ordered = [estimate for *_, estimate in sorted(best, key=lambda entry: (-entry[0], -entry[1]))]
    ordered += [estimate for estimate in by_placement.values() if all(estimate is not one for one in ordered)]
    return Plan(tuple(ordered), fitting, tried, None if fitting else smallest, limit)


def candidates(sizes: Mapping[str, ModuleSizes], world_size: int, batch_size: int) -> Iterator[Layout]:
    """All layouts of both placements whose lanes divide the step batch."""
    lanes = [dp for dp in _divisors(batch_size) if dp <= world_size]
    encoders = [name for name in sizes if name != LANGUAGE]
    choices = [list(_modules(size, world_size, lanes, [1] if encoders else None)) for size in sizes.values()]
    for modules in product(*choices):
        yield from _resolved(sizes, world_size, modules)
    if len(encoders) == 1:
        yield from _disjoint(sizes, world_size, lanes)


def _disjoint(sizes: Mapping[str, ModuleSizes], world_size: int, lanes: Sequence[int]) -> Iterator[Layout]:
    """The encoder on the first ranks, the language model on all others."""
    (encoder,) = (name for name in sizes if name != LANGUAGE)
    for tp, dp in product(_tensor_parallel(sizes[encoder]), lanes):
        others = world_size - tp * dp
        if others < 1:
            continue
        first = ModuleParallel(tp=tp, dp=dp)
        for language in _modules(sizes[LANGUAGE], others, lanes, None, offset=tp * dp):
            by_name = {encoder: first, LANGUAGE: language}
            yield from _resolved(sizes, world_size, [by_name[name] for name in sizes])


def _modules(
    sizes: ModuleSizes, num_ranks: int, lanes: Sequence[int], stages: Sequence[int] | None, offset: int = 0
) -> Iterator[ModuleParallel]:
    """What a module may be on exactly ``num_ranks``."""
    for tp, pp in product(_tensor_parallel(sizes), sorted(sizes.pp_stages) if stages is None else stages):
        dp, rest = divmod(num_ranks, tp * pp)
        if rest or dp not in lanes:
            continue
        for etp in {1, tp} if sizes.num_experts and tp in _common_divisors(*sizes.etp_divides.values()) else {1}:
            for ep in _divisors(math.gcd(sizes.num_experts, tp * dp // etp)) if sizes.num_experts else (1,):
                yield ModuleParallel(tp=tp, dp=dp, pp=pp, ep=ep, etp=etp, rank_offset=offset)


def _resolved(sizes: Mapping[str, ModuleSizes], world_size: int, modules: Sequence[ModuleParallel]) -> Iterator[Layout]:
    largest, smallest = max(module.dp for module in modules), min(module.dp for module in modules)
    if largest % smallest:
        return
    try:
        yield Layout.resolve(sizes, world_size, dict(zip(sizes, modules, strict=True)))
    except LayoutError:
        return


def _tensor_parallel(sizes: ModuleSizes) -> list[int]:
    return [tp for tp in _common_divisors(*sizes.tp_divides.values()) if tp <= LARGEST_TENSOR_PARALLEL]


def _common_divisors(*sizes: int) -> tuple[int, ...]:
    return _divisors(math.gcd(*sizes)) if sizes else (1,)


@cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(divisor for divisor in range(1, number + 1) if number % divisor == 0)
