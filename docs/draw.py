"""Draws the pictures of the documentation: ``python docs/draw.py [FOLDER]``, by default ``docs/images``."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path as File
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path

from mimo_strategy import Layout, ModuleParallel
from mimo_strategy.layout import LANGUAGE, ModuleSizes
from mimo_strategy.pictures import draw_layout
from mimo_strategy.pictures.canvas import MARGIN, crop, page, text_width
from mimo_strategy.pictures.palette import BLUE, FAINT, GREEN, HUES, INK, MUTED, ORANGE, Color, tint

_TIMES = "\N{MULTIPLICATION SIGN}"
_SIZES = {"images": ModuleSizes(), LANGUAGE: ModuleSizes(num_experts=8, pp_stages=frozenset({1, 2}))}
# As few numbers as possible: paths make the text look alike everywhere, and pictures the same at every drawing.
_STYLE = {"svg.hashsalt": "mimo", "svg.fonttype": "path", "path.simplify": True}


def main() -> None:
    folder = File(sys.argv[1]) if len(sys.argv) > 1 else File(__file__).parent / "images"
    for name, figure in draw_all().items():
        with matplotlib.rc_context(_STYLE):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def draw_all() -> dict[str, Figure]:
    """The pictures by name."""
    return {
        "placement-non_colocated": draw_layout(
            _layout(4, images=ModuleParallel(dp=2), language=ModuleParallel(tp=2, dp=1, ep=2, rank_offset=2))
        ),
        "placement-colocated": draw_layout(
            _layout(4, images=ModuleParallel(dp=4), language=ModuleParallel(tp=2, dp=2, ep=2))
        ),
        "factorizations": draw_factorizations(tp=2, dp=4, ep=4, edp=2),
        "step-batch": draw_step_batch(),
        "fan": draw_fans(),
        "schedules": draw_schedules(),
    }


def _layout(world_size: int, **modules: ModuleParallel) -> Layout:
    return Layout.resolve(_SIZES, world_size, modules)


# ---- shapes, in inches from the upper left


def _box(axes: Axes, x: float, y: float, width: float, height: float, color: Color | str, edge: str = "none") -> None:
    style = f"round,pad=0,rounding_size={min(0.06, width / 4)}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=edge, linewidth=1))


def _text(axes: Axes, x: float, y: float, text: str, size: float = 10, **settings) -> None:
    axes.text(x, y, text, **({"size": size, "color": INK, "ha": "center", "va": "center"} | settings))


def _label(axes: Axes, x: float, y: float, text: str, **settings) -> None:
    _text(axes, x, y, text, **({"ha": "left", "color": MUTED} | settings))


def _heading(axes: Axes, x: float, y: float, text: str, remark: str = "") -> None:
    _text(axes, x, y, text, 13, ha="left", weight="bold")
    if remark:
        _label(axes, x + text_width(text, 13, "bold") + 0.2, y, remark)


def _curve(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    bend = (start[1] + end[1]) / 2
    path = Path([start, (start[0], bend), (end[0], bend), end], [Path.MOVETO, *[Path.CURVE4] * 3])
    axes.add_patch(PathPatch(path, fill=False, edgecolor=color, linewidth=2))


# ---- two factorizations


def draw_factorizations(*, tp: int, dp: int, ep: int, edp: int) -> Figure:
    """The same ranks in both factorizations: who shares what, once for dense layers and once for experts."""
    cell, left, ranks = 0.9, MARGIN + 1.75, tp * dp
    _, axes = page(left + ranks * cell + MARGIN)
    _heading(
        axes,
        MARGIN,
        0.4,
        "One set of ranks, cut twice",
        f"tp {tp} {_TIMES} dp {dp}  =  {ranks}  =  ep {ep} {_TIMES} edp {edp}",
    )
    rows = (
        ("dense layers", "same hue: a tp group,", "shards of one replica", ("tp", "dp"), tp, HUES),
        ("expert layers", "same hue: an ep group,", "each expert once", ("ep", "edp"), ep, HUES[::-1]),
    )
    y = 0.75
    for title, first, second, names, size, hues in rows:
        _label(axes, MARGIN, y + 0.16, title, color=INK, weight="bold", size=11)
        _label(axes, MARGIN, y + 0.42, first, size=9)
        _label(axes, MARGIN, y + 0.6, second, size=9)
        for rank in range(ranks):
            group, member = divmod(rank, size)
            x = left + rank * cell
            strength = 0.25 + 0.4 * member / max(size - 1, 1)
            _box(axes, x + 0.03, y, cell - 0.06, 0.75, tint(hues[group], strength))
            _text(axes, x + cell / 2, y + 0.17, f"rank {rank}", 9, weight="bold")
            _text(axes, x + cell / 2, y + 0.4, f"{names[0]} {member}", 10)
            _text(axes, x + cell / 2, y + 0.58, f"{names[1]} {group}", 10)
        y += 0.95
    _label(
        axes,
        left + 0.03,
        y + 0.02,
        "Attention and Mamba weights are cut in 2 and held 4 times. The experts are cut in 4 and held twice.",
        size=9.5,
    )
    crop(axes, y + 0.3)
    return axes.get_figure()


# ---- a step batch


def draw_step_batch() -> Figure:
    """How 8 samples become 2 microbatches, and each of these the parts of 4 and of 2 lanes."""
    cell, left = 0.78, MARGIN + 1.95
    _, axes = page(left + 8 * cell + MARGIN)
    _heading(axes, MARGIN, 0.4, "One step batch", "batch_size 8, num_microbatches 2, images dp 4, language dp 2")
    rows = (("step batch", 8, 1), ("microbatches", 4, 2), ("images", 1, 4), (LANGUAGE, 2, 2))
    for row, (title, size, count) in enumerate(rows):
        y = 0.75 + row * 0.63
        _label(axes, MARGIN, y + 0.25, title, size=11, color=INK, weight="bold" if row > 1 else "normal")
        for start in range(0, 8, size):
            part = start // size % count
            color = tint(MUTED, 0.14 + 0.14 * part) if row < 2 else tint(HUES[part * (4 // count)], 0.42)
            _box(axes, left + start * cell + 0.03, y, size * cell - 0.06, 0.5, color)
            middle = left + (start + size / 2) * cell
            name = ("", f"microbatch {part}", f"lane {part}", f"lane {part}")[row]
            samples = f"samples {start}-{start + size - 1}" if size > 1 else f"sample {start}"
            if name:
                _text(axes, middle, y + 0.16, name, 10, weight="bold")
            _text(axes, middle, y + (0.36 if name else 0.25), samples, 8.5 if name else 10)
    crop(axes, 0.75 + len(rows) * 0.63 + 0.1)
    return axes.get_figure()


# ---- fan-in and fan-out


def draw_fans() -> Figure:
    """Which lanes of an encoder feed which lanes of the language model, with the samples that they carry."""
    panel, gap, left = 3.9, 0.55, MARGIN + 1.0
    _, axes = page(left + 2 * panel + gap + MARGIN)
    panels = (("Fan-in", 4, 2, "outputs are gathered"), ("Fan-out", 2, 4, "outputs are split"))
    top, bar, reach = 0.75, 0.5, 0.75
    for name, y in (("images", top), (LANGUAGE, top + bar + reach)):
        _label(axes, MARGIN, y + bar / 2, name, color=INK, weight="bold", size=11)
    for position, (title, images, language, remark) in enumerate(panels):
        x = left + position * (panel + gap)
        _heading(axes, x, 0.4, title, f"{images} lanes → {language} lanes: {remark}")
        for count, y in ((images, top), (language, top + bar + reach)):
            width = panel / count
            for lane in range(count):
                color = tint(HUES[lane * (4 // count)], 0.42)
                _box(axes, x + lane * width + 0.03, y, width - 0.06, bar, color)
                samples = range(lane * 8 // count, (lane + 1) * 8 // count)
                _text(axes, x + (lane + 0.5) * width, y + 0.16, f"lane {lane}", 10, weight="bold")
                _text(axes, x + (lane + 0.5) * width, y + 0.36, f"samples {samples[0]}-{samples[-1]}", 8.5)
        for lane in range(4):
            start = x + (lane * images // 4 + 0.5) * panel / images
            end = x + (lane * language // 4 + 0.5) * panel / language
            _curve(axes, (start, top + bar), (end, top + bar + reach), HUES[lane])
    crop(axes, top + 2 * bar + reach + 0.25)
    return axes.get_figure()


# ---- schedules


class Work(NamedTuple):
    """A pass over a microbatch: what a row of ranks does from ``start`` to ``end``."""

    row: int
    module: str
    kind: str
    microbatch: int
    start: float
    end: float


def pipeline(durations: list[float], num_microbatches: int) -> list[Work]:
    """1F1B over stages whose forward passes take ``durations``, and backward passes twice as long."""
    stages = len(durations)
    orders = []
    for stage in range(stages):
        warmup = min(stages - 1 - stage, num_microbatches)
        steady = [
            ("F", i) if kind == "F" else ("B", i - warmup) for i in range(warmup, num_microbatches) for kind in "FB"
        ]
        cooldown = [("B", i) for i in range(num_microbatches - warmup, num_microbatches)]
        orders.append([("F", i) for i in range(warmup)] + steady + cooldown)
    ends: dict[tuple[int, str, int], float] = {}
    free, done, found = [0.0] * stages, [0] * stages, []
    while any(done[stage] < len(orders[stage]) for stage in range(stages)):
        for stage in range(stages):
            if done[stage] == len(orders[stage]):
                continue
            kind, microbatch = orders[stage][done[stage]]
            needs = [(stage - 1, "F")] if kind == "F" and stage else []
            needs += [(stage + 1, "B")] if kind == "B" and stage + 1 < stages else []
            if any((*need, microbatch) not in ends for need in needs):
                continue
            start = max([free[stage], *(ends[(*need, microbatch)] for need in needs)])
            free[stage] = start + durations[stage] * (2 if kind == "B" else 1)
            ends[stage, kind, microbatch] = free[stage]
            done[stage] += 1
            found.append(Work(stage, "images" if stage == 0 else LANGUAGE, kind, microbatch, start, free[stage]))
    return found


def in_turns(durations: Mapping[str, float], num_microbatches: int) -> Iterator[Work]:
    """Modules on the same ranks: forward in order, then backward, microbatch by microbatch."""
    now = 0.0
    for microbatch in range(num_microbatches):
        for kind, modules in (("F", list(durations)), ("B", list(reversed(durations)))):
            for module in modules:
                end = now + durations[module] * (2 if kind == "B" else 1)
                yield Work(0, module, kind, microbatch, now, end)
                now = end


_HUE = {"images": BLUE, LANGUAGE: ORANGE}


def draw_schedules() -> Figure:
    """1F1B over disjoint ranks, and modules in turns on shared ranks, which run each of them three times as fast."""
    apart = pipeline([1.0, 1.0, 1.0], 6)
    together = list(in_turns({"images": 1 / 3, LANGUAGE: 2 / 3}, 6))
    unit, left, height = 0.29, MARGIN + 2.05, 0.42
    width = max(work.end for work in [*apart, *together]) * unit
    _, axes = page(left + width + 1.05 + MARGIN)
    _heading(axes, MARGIN, 0.4, "Non-colocated", "one pipeline over all ranks, 1F1B; here language has pp 2")
    rows = ("images, ranks 0-1", "language pp 0, ranks 2-3", "language pp 1, ranks 4-5")
    y = _draw_rows(axes, apart, rows, 0.7, left, unit, height) + 0.45
    _heading(
        axes,
        MARGIN,
        y,
        "Colocated",
        "all ranks run each module in turn; drawn as if three times as fast on three times the ranks",
    )
    y = _draw_rows(axes, together, ("all ranks 0-5",), y + 0.3, left, unit, height) + 0.3
    x = left
    legend = [
        (tint(BLUE, 0.35), "images forward"),
        (tint(BLUE, 0.75), "backward"),
        (tint(ORANGE, 0.35), "language forward"),
        (tint(ORANGE, 0.75), "backward"),
        (tint(GREEN, 0.35), "optimizer step"),
        (FAINT, "bubble: waiting"),
    ]
    for color, text in legend:
        _box(axes, x, y - 0.08, 0.16, 0.16, color)
        _label(axes, x + 0.23, y, text, size=9)
        x += 0.23 + text_width(text, 9) + 0.22
    crop(axes, y + 0.3)
    return axes.get_figure()


def _draw_rows(
    axes: Axes, works: list[Work], rows: tuple[str, ...], y: float, left: float, unit: float, height: float
) -> float:
    """Draw a timeline from ``y`` down; returns where it ends."""
    end = max(work.end for work in works)
    for row, title in enumerate(rows):
        top = y + row * (height + 0.08)
        _label(axes, MARGIN, top + height / 2, title, color=INK)
        _box(axes, left, top, end * unit, height, FAINT)
        _box(axes, left + end * unit + 0.04, top, 0.75, height, tint(GREEN, 0.35))
        _text(axes, left + end * unit + 0.415, top + height / 2, "step", 9)
    for work in works:
        top, width = y + work.row * (height + 0.08), (work.end - work.start) * unit
        color = tint(_HUE[work.module], 0.35 if work.kind == "F" else 0.75)
        _box(axes, left + work.start * unit + 0.01, top, width - 0.02, height, color)
        middle = left + (work.start + work.end) / 2 * unit
        _text(axes, middle, top + height / 2, str(work.microbatch), 10 if width > 0.25 else 7)
    return y + len(rows) * (height + 0.08)


if __name__ == "__main__":
    main()
