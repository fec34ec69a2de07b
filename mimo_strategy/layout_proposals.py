"""Layouts to offer: the one used when none is asked for, and the one nearest to one that does not fit."""

from collections.abc import Mapping
from dataclasses import replace

from mimo_strategy.layout_checks import wrong_numbers
from mimo_strategy.module_layout import ModuleParallel, ModuleSizes


def default_modules(sizes: Mapping[str, ModuleSizes], world_size: int) -> dict[str, ModuleParallel]:
    """The layout used when none is asked for: colocated, tp 1, dp = world, ep as large as fits."""
    return {
        name: ModuleParallel(dp=world_size, ep=_largest_common_divisor(size.num_experts, world_size))
        for name, size in sizes.items()
    }


def proposals(
    sizes: Mapping[str, ModuleSizes], world_size: int, modules: Mapping[str, ModuleParallel]
) -> list[dict[str, ModuleParallel]]:
    """What to try where ``modules`` do not fit: the nearest first. None of them may fit either."""
    asked = {name: _with_numbers(modules.get(name, ModuleParallel())) for name in sizes}
    return [_shrunk(sizes, asked, world_size), default_modules(sizes, world_size)]


def _with_numbers(asked: ModuleParallel) -> ModuleParallel:
    """What was asked for, with the default in the place of all that is no valid number."""
    return replace(asked, **{factor: getattr(ModuleParallel, factor) for factor in wrong_numbers(asked)})


def _shrunk(
    sizes: Mapping[str, ModuleSizes], asked: Mapping[str, ModuleParallel], world_size: int
) -> dict[str, ModuleParallel]:
    """Keep which module comes first and shrink every factor until it divides what it must."""
    disjoint = len({parallel.rank_offset for parallel in asked.values()}) > 1 and world_size >= len(asked)
    spans = _split(world_size, [asked[name] for name in sizes]) if disjoint else [(0, world_size)] * len(sizes)
    shrunk = {}
    for (name, size), (offset, num_ranks) in zip(sizes.items(), spans, strict=True):
        want = asked[name]
        stages = [number for number in size.pp_stages if num_ranks % number == 0]
        pp = min(stages, key=lambda number, want=want: (number > want.pp, abs(number - want.pp)), default=1)
        stage_ranks = num_ranks // pp
        tp = _largest_common_divisor(stage_ranks, *size.tp_divides.values(), at_most=want.tp)
        etp = 1
        if size.num_experts:
            etp = _largest_common_divisor(stage_ranks, *size.etp_divides.values(), at_most=want.etp)
        ep = _largest_common_divisor(stage_ranks // etp, size.num_experts, at_most=want.ep)
        shrunk[name] = ModuleParallel(tp=tp, dp=stage_ranks // tp, pp=pp, ep=ep, etp=etp, rank_offset=offset)
    return shrunk


def _split(world_size: int, asked: list[ModuleParallel]) -> list[tuple[int, int]]:
    """Cut the world into one span per module, in the order of their offsets, as (offset, number of ranks)."""
    order = sorted(range(len(asked)), key=lambda index: asked[index].rank_offset)
    spans = [(0, 0)] * len(asked)
    offset = 0
    for position, index in enumerate(order):
        following = len(order) - position - 1
        want = asked[index].num_ranks or asked[index].tp * asked[index].cp * asked[index].pp * (asked[index].dp or 1)
        num_ranks = max(1, min(want, world_size - offset - following)) if following else world_size - offset
        spans[index] = (offset, num_ranks)
        offset += num_ranks
    return spans


def _largest_common_divisor(*sizes: int, at_most: int | None = None) -> int:
    """The largest number up to ``at_most`` that divides every size; 1 when a size is 0 (has nothing to cut)."""
    if 0 in sizes:
        return 1
    limit = min(*sizes, at_most) if at_most else min(sizes)
    return max(number for number in range(1, max(limit, 1) + 1) if all(size % number == 0 for size in sizes))
