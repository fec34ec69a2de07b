"""Which ranks share a group, which lanes feed which, and what part of the batch a lane has: arithmetic of a layout."""

from typing import NamedTuple

from mimo_strategy.layout import Layout, ModuleLayout


def groups(module: ModuleLayout, rank: int) -> dict[str, range]:
    """The global ranks that share a group with ``rank``, by factor; only of factors above 1."""
    at = module.coordinates(rank)
    found = {}
    for factors in (("tp", "cp", "dp", "pp"), ("etp", "ep", "edp")):
        stride = 1
        for factor in factors:
            size = getattr(module, factor)
            first = rank - at[factor] * stride
            if size > 1:
                found[factor] = range(first, first + size * stride, stride)
            stride *= size
    return found


def lane_ranks(module: ModuleLayout, lane: int, stage: int) -> range:
    """The global ranks of one lane in one pipeline stage."""
    shards = module.tp * module.cp
    first = module.rank_offset + (stage * module.dp + lane) * shards
    return range(first, first + shards)


class Feed(NamedTuple):
    """Lanes of an encoder and the lanes of the language model that take their tokens; one side is a single lane."""

    encoder: range
    language: range


def feeds(encoder: ModuleLayout, language: ModuleLayout) -> list[Feed]:
    """What feeds what: both cut the same samples into equal blocks, in order."""
    coarse = min(encoder.dp, language.dp)
    fine, other = encoder.dp // coarse, language.dp // coarse
    return [
        Feed(range(lane * fine, (lane + 1) * fine), range(lane * other, (lane + 1) * other)) for lane in range(coarse)
    ]


def samples_per_lane(layout: Layout, batch_size: int, num_microbatches: int) -> dict[str, int]:
    """Samples that a lane of each module has in one microbatch."""
    return {name: batch_size // (module.dp * num_microbatches) for name, module in layout.modules.items()}
