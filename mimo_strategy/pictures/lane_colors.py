"""The colour of a rank: a hue for its lane, a shade for its shard; the same in pictures and in a terminal."""

from mimo_strategy.layout import ModuleLayout
from mimo_strategy.pictures.palette import HUES, Color, tint


def lane_hue(module: ModuleLayout, lane: int, finest: int) -> str:
    """Hue of a lane: that of the first of the finest lanes which hold the same samples, while hues last."""
    stride = finest // module.dp
    # a stride of all hues would give every lane the same one
    return HUES[lane * (stride if stride % len(HUES) else 1) % len(HUES)]


def between(low: float, high: float, index: int, count: int) -> float:
    """The value at ``index`` of ``count`` evenly from ``low`` to ``high``."""
    return low + (high - low) * index / max(count - 1, 1)


def lane_color(module: ModuleLayout, at: dict[str, int], finest: int) -> Color:
    """Colour of a rank: the hue of its lane, in a shade for its shard."""
    shard, shards = at["cp"] * module.tp + at["tp"], module.tp * module.cp
    strength = 0.4 if shards == 1 else between(0.28, 0.58, shard, shards)
    return tint(lane_hue(module, at["dp"], finest), strength)
