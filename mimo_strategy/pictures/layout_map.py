"""A map of which rank holds what, in both factorizations, and of which lane feeds which."""

from dataclasses import dataclass
from itertools import chain, product
from math import ceil

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from mimo_strategy.layout import LANGUAGE, Layout, ModuleLayout
from mimo_strategy.module_layout import span
from mimo_strategy.pictures.canvas import MARGIN, crop, page, text_width
from mimo_strategy.pictures.lane_colors import between, lane_color, lane_hue
from mimo_strategy.pictures.layout_text import (
    expert_factors,
    fan,
    heading,
    lanes_label,
    primary_factors,
    title,
)
from mimo_strategy.pictures.palette import BLUE, FAINT, INK, MUTED, ORANGE, PALE, Color, tint
from mimo_strategy.planning.groups import feeds, lane_ranks

_TITLE, _NAME, _TEXT, _CELL, _SMALL = 15, 13, 10, 9, 7
"""Font sizes in points."""
_MOST_CELLS = 2048
"""Ranks that are drawn one by one."""
_LINE = 0.165
"""Height of a line of text in a cell, in inches."""
_BAR, _BRIDGE, _GAP = 0.22, 0.7, 0.05
"""Heights of a lane's bar and of the lines between two, and the gap between cells, in inches."""


def draw_layout(layout: Layout) -> Figure:
    """Draw which rank holds what.

    Every module is a row of cells, one for each rank of the world; a pale cell is a rank that the module does
    not run on. The coloured part of a cell says where the rank is in the primary factorization, the grey part
    where it is in the expert factorization. Between an encoder and the language model, lines lead from every
    encoder lane to the language lanes that it feeds. A large world wraps: bars above all then show which ranks each
    module has. Above 64 ranks a cell keeps only the number of its rank and the colours, and rows without a module are
    left out. Above 2,048 ranks there are only the bars.
    """
    language = layout.modules[LANGUAGE]
    encoders = [module for name, module in layout.modules.items() if name != LANGUAGE]
    modules = [*encoders, language]
    grid = _Grid.fit(layout)
    finest = layout.largest_dp

    figure, axes = page(max(grid.left + grid.width, *map(_heading_right, modules), 7.0) + MARGIN)
    axes.text(MARGIN, MARGIN, title(layout), size=_TITLE, weight="bold", color=INK, va="top")
    y = MARGIN + 0.45
    if grid.rows > 1:
        y = _draw_overview(axes, grid, modules, y) + 0.2
    if layout.world_size > _MOST_CELLS:
        for module in modules:
            _draw_heading(axes, module, y + 0.24)
            y += 0.3
        crop(axes, y + MARGIN)
        return figure
    for encoder in encoders:
        y = _draw_module(axes, grid, encoder, finest, y)
        y = _draw_bridge(axes, grid, encoder, language, finest, y + 0.06) + 0.15
    y = _draw_module(axes, grid, language, finest, y)
    y = _draw_legend(axes, modules, y + 0.22)
    crop(axes, y + MARGIN)
    return figure


@dataclass(frozen=True)
class _Grid:
    """Where the ranks are: rows of cells, all modules alike, so that a column is always the same rank."""

    world_size: int
    left: float
    columns: int
    cell_width: float
    detailed: bool

    @classmethod
    def fit(cls, layout: Layout) -> "_Grid":
        detailed = layout.world_size <= 64
        rows = ceil(layout.world_size / (16 if detailed else 32))
        columns = ceil(layout.world_size / rows)
        language = layout.modules[LANGUAGE]
        labels = [text_width(lanes_label(module, 0), _CELL) for module in layout.modules.values()]
        labels += [text_width(fan(module, language), _CELL, "bold") for module in layout.modules.values()]
        return cls(
            world_size=layout.world_size,
            left=MARGIN + max(labels) + 0.15,
            columns=columns,
            cell_width=min(1.25, max(0.75, 8 / columns)) if detailed else 0.4,
            detailed=detailed,
        )

    @property
    def width(self) -> float:
        return self.columns * self.cell_width

    @property
    def rows(self) -> int:
        return ceil(self.world_size / self.columns)

    def cell(self, rank: int) -> tuple[int, float]:
        """Row of the rank's cell, and its left edge."""
        row, column = divmod(rank, self.columns)
        return row, self.left + column * self.cell_width

    def rows_of(self, module: ModuleLayout) -> range:
        """The rows to draw: where not every rank is told of, those that the module runs on."""
        if self.detailed:
            return range(self.rows)
        return range(module.ranks[0] // self.columns, module.ranks[-1] // self.columns + 1)

    def lane_span(self, module: ModuleLayout, lane: int, stage: int) -> tuple[float, float]:
        """Left edge and width of a lane: above its ranks, or spread over the whole width once ranks wrap."""
        if self.world_size > self.columns:
            return self.left + self.width * lane / module.dp, self.width / module.dp
        ranks = lane_ranks(module, lane, stage)
        return self.cell(ranks[0])[1], len(ranks) * self.cell_width


def _heading_left(module: ModuleLayout) -> float:
    return MARGIN + text_width(module.name, _NAME, "bold") + 0.25


def _heading_right(module: ModuleLayout) -> float:
    return _heading_left(module) + text_width(heading(module), _TEXT)


def _draw_module(axes: Axes, grid: _Grid, module: ModuleLayout, finest: int, y: float) -> float:
    """Draw the heading and the cells of a module from ``y`` down; returns where they end."""
    top = y + 0.36
    _draw_heading(axes, module, y + 0.24)
    primary, experts = primary_factors(module), expert_factors(module)
    if grid.detailed:
        primary_height = 0.34 + _LINE * len(primary)
        expert_height = 0.12 + _LINE * len(experts) if experts else 0.0
        _draw_label(axes, grid, "primary", top + primary_height / 2)
        if experts:
            _draw_label(axes, grid, "experts", top + primary_height + expert_height / 2)
    else:
        primary_height, expert_height = 0.22, 0.09 if experts else 0.0
    height = primary_height + expert_height
    rows = grid.rows_of(module)
    for rank in range(rows[0] * grid.columns, min((rows[-1] + 1) * grid.columns, grid.world_size)):
        row, x = grid.cell(rank)
        cell_y = top + (row - rows[0]) * (height + _GAP)
        if rank not in module.ranks:
            _draw_box(axes, grid, x, cell_y, height, tint(FAINT, 0.35))
            _draw_rank(axes, grid, x, cell_y, rank, PALE)
            continue
        at = module.coordinates(rank)
        cell = _draw_box(axes, grid, x, cell_y, primary_height, lane_color(module, at, finest))
        cell.set_gid(f"{module.name} rank {rank}")
        _draw_rank(axes, grid, x, cell_y, rank, INK)
        if experts:
            _draw_box(axes, grid, x, cell_y + primary_height, expert_height, _expert_color(module, at))
        if grid.detailed:
            for names, names_y in ((primary, cell_y + 0.29), (experts, cell_y + primary_height + 0.05)):
                _draw_coordinates(axes, grid, x, names_y, {name: at[name] for name in names})
    if module.pp > 1 and not grid.detailed:
        for stage in range(module.pp):
            row, _ = grid.cell(module.stage_ranks(stage)[0])
            _draw_label(axes, grid, f"pp {stage}", top + (row - rows[0]) * (height + _GAP) + height / 2)
    return top + len(rows) * (height + _GAP) - _GAP


def _draw_heading(axes: Axes, module: ModuleLayout, baseline: float) -> None:
    axes.text(MARGIN, baseline, module.name, size=_NAME, weight="bold", color=INK)
    axes.text(_heading_left(module), baseline, heading(module), size=_TEXT, color=MUTED)


def _draw_overview(axes: Axes, grid: _Grid, modules: list[ModuleLayout], y: float) -> float:
    """Draw the ranks of every module and stage as a bar along all ranks; returns where the bars end."""
    for module in modules:
        _draw_label(axes, grid, module.name, y + _BAR / 2, "bold")
        axes.add_artist(Rectangle((grid.left, y), grid.width, _BAR, color=tint(FAINT, 0.35), linewidth=0))
        for stage in range(module.pp):
            ranks = module.stage_ranks(stage)
            width = grid.width * len(ranks) / grid.world_size
            x = grid.left + grid.width * ranks[0] / grid.world_size
            color = tint(BLUE if module.name == LANGUAGE else ORANGE, between(0.7, 0.35, stage, module.pp))
            axes.add_artist(Rectangle((x + 0.01, y), width - 0.02, _BAR, color=color, linewidth=0))
            label = f"ranks {span(ranks)}" + (f", pp {stage}" if module.pp > 1 else "")
            if text_width(label, _CELL) < width:
                center = (x + width / 2, y + _BAR / 2)
                axes.text(*center, label, size=_CELL, color=INK, ha="center", va="center")
        y += _BAR + _GAP
    return y


def _draw_label(axes: Axes, grid: _Grid, label: str, y: float, weight: str = "normal") -> None:
    axes.text(grid.left - 0.15, y, label, size=_CELL, color=MUTED, weight=weight, ha="right", va="center")


def _draw_box(axes: Axes, grid: _Grid, x: float, y: float, height: float, color: Color) -> Artist:
    width = grid.cell_width - _GAP
    return axes.add_artist(Rectangle((x + _GAP / 2, y), width, height, color=color, linewidth=0))


def _draw_rank(axes: Axes, grid: _Grid, x: float, y: float, rank: int, color: str) -> None:
    label, size = (f"rank {rank}", _CELL) if grid.detailed else (str(rank), _SMALL)
    center = (x + grid.cell_width / 2, y + (0.15 if grid.detailed else 0.11))
    axes.text(*center, label, size=size, weight="bold", color=color, ha="center", va="center")


def _draw_coordinates(axes: Axes, grid: _Grid, x: float, y: float, coordinates: dict[str, int]) -> None:
    for line, (name, value) in enumerate(coordinates.items()):
        center = (x + grid.cell_width / 2, y + (line + 0.5) * _LINE)
        axes.text(*center, f"{name} {value}", size=_CELL, color=INK, ha="center", va="center")


def _draw_bridge(
    axes: Axes, grid: _Grid, encoder: ModuleLayout, language: ModuleLayout, finest: int, y: float
) -> float:
    """Draw the lanes of an encoder's last stage, of the language model's first, and what feeds what."""
    bottom = y + _BAR + _BRIDGE
    for module, stage, bar_y in ((encoder, encoder.pp - 1, y), (language, 0, bottom)):
        _draw_label(axes, grid, lanes_label(module, stage), bar_y + _BAR / 2)
        _draw_lanes(axes, grid, module, stage, finest, bar_y)
    _draw_label(axes, grid, fan(encoder, language), (y + bottom + _BAR) / 2, "bold")
    finer = max(encoder, language, key=lambda module: module.dp)
    for encoder_lane, language_lane in chain.from_iterable(product(*feed) for feed in feeds(encoder, language)):
        start_x, start_width = grid.lane_span(encoder, encoder_lane, encoder.pp - 1)
        end_x, end_width = grid.lane_span(language, language_lane, 0)
        start, end = (start_x + start_width / 2, y + _BAR), (end_x + end_width / 2, bottom)
        bend = (start[1] + end[1]) / 2
        curve = Path(
            [start, (start[0], bend), (end[0], bend), end],
            [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
        )
        color = lane_hue(finer, encoder_lane if finer is encoder else language_lane, finest)
        width, gid = 2 if finer.dp <= 32 else 0.7, f"{encoder.name} {encoder_lane} feeds {language_lane}"
        axes.add_artist(PathPatch(curve, fill=False, edgecolor=color, linewidth=width, gid=gid))
    return bottom + _BAR


def _draw_lanes(axes: Axes, grid: _Grid, module: ModuleLayout, stage: int, finest: int, y: float) -> None:
    spans = [grid.lane_span(module, lane, stage) for lane in range(module.dp)]
    room = spans[0][1] - 0.1
    longest = str(module.dp - 1)
    prefix = next((prefix for prefix in ("lane ", "") if text_width(prefix + longest, _CELL) < room), None)
    for lane, (x, width) in enumerate(spans):
        gap = min(_GAP, width / 5)
        color, gid = tint(lane_hue(module, lane, finest), 0.7), f"{module.name} lane {lane}"
        axes.add_artist(Rectangle((x + gap / 2, y), width - gap, _BAR, color=color, linewidth=0, gid=gid))
        if prefix is not None:
            center = (x + width / 2, y + _BAR / 2)
            axes.text(*center, f"{prefix}{lane}", size=_CELL, color=INK, ha="center", va="center")


def _expert_color(module: ModuleLayout, at: dict[str, int]) -> Color:
    return tint(MUTED, between(0.14, 0.42, at["ep"] * module.etp + at["etp"], module.ep * module.etp))


def _draw_legend(axes: Axes, modules: list[ModuleLayout], y: float) -> float:
    """Explain the colours from ``y`` down; returns where the legend ends."""
    entries = [((tint(BLUE, 0.4), tint(ORANGE, 0.4)), "hue: data-parallel lane")]
    if any(module.tp * module.cp > 1 for module in modules):
        entries.append(((tint(BLUE, 0.28), tint(BLUE, 0.58)), "shade: shard of the lane"))
    if any(module.ep * module.etp > 1 for module in modules):
        entries.append(((tint(MUTED, 0.14), tint(MUTED, 0.42)), "grey: shard of the experts"))
    x, side = MARGIN, 0.14
    for colors, label in entries:
        for color in colors:
            axes.add_artist(Rectangle((x, y), side, side, color=color, linewidth=0))
            x += side
        axes.text(x + 0.08, y + side / 2, label, size=_CELL, color=MUTED, va="center")
        x += 0.08 + text_width(label, _CELL) + 0.3
    return y + side
