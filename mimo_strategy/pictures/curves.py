"""Curves of a run, from the table that Lightning's CSVLogger writes."""

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import cycle
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mimo_strategy.pictures.palette import BLUE, FAINT, GREEN, HUES, INK, MUTED, PALE, PURPLE, VERMILION

_LEARNING_RATE = "lr-"
"""How the columns of Lightning's LearningRateMonitor start."""


class Curve(NamedTuple):
    """The filled cells of one column, in the order of their steps."""

    steps: list[int]
    values: list[float]

    def smoothed(self) -> "Curve":
        """Every value averaged with its neighbours, over about a twentieth of the curve."""
        reach = len(self.values) // 40
        windows = [self.values[max(0, at - reach) : at + reach + 1] for at in range(len(self.values))]
        return Curve(self.steps, [sum(window) / len(window) for window in windows])


def draw_curves(metrics_csv: Path) -> Figure:
    """Draw loss, tokens per second, gradient norm and learning rate over the steps of a run.

    Args:
        metrics_csv: the ``metrics.csv`` of Lightning's CSVLogger. A panel whose columns are absent or empty
            is left out. The axis of the loss is logarithmic where the loss spans more than a decade.

    Raises:
        ValueError: if the table has nothing to draw.
    """
    curves = read_curves(metrics_csv)
    panels: dict[str, Callable[[Axes], None]] = {}
    if losses := {name: curves[name] for name in ("train_loss", "val_loss") if name in curves}:
        panels["loss"] = lambda axes: _draw_loss(axes, losses)
    if tokens := curves.get("tokens/s"):
        panels["tokens per second"] = lambda axes: _draw_tokens(axes, tokens)
    if norms := curves.get("grad_norm"):
        panels["gradient norm"] = lambda axes: _draw_noisy(axes, norms, PURPLE)
    if rates := {name: curve for name, curve in curves.items() if name.startswith(_LEARNING_RATE)}:
        panels["learning rate"] = lambda axes: _draw_rates(axes, rates)
    if not panels:
        raise ValueError(f"{metrics_csv} has no loss, tokens per second, gradient norm or learning rate")

    first, *others = panels
    figure = Figure(figsize=(9, 6 if others else 4), facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    rows = [[first] * len(others), others] if others else [[first]]
    for title, axes in figure.subplot_mosaic(rows, height_ratios=[3, 2][: len(rows)]).items():
        _style(axes, title)
        panels[title](axes)
    return figure


def read_curves(metrics_csv: Path) -> dict[str, Curve]:
    """The columns of a ``metrics.csv`` by name; empty cells and values that are not finite are left out."""
    cells: dict[str, dict[int, float]] = defaultdict(dict)
    with metrics_csv.open(newline="") as table:
        for row in csv.DictReader(table):
            step = int(row.pop("step"))
            for name, cell in row.items():
                if cell and isfinite(value := float(cell)):
                    cells[name][step] = value
    columns = {name: dict(sorted(column.items())) for name, column in cells.items()}
    return {name: Curve(list(column), list(column.values())) for name, column in columns.items()}


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=11, weight="bold", color=INK)
    axes.set_xlabel("step", color=MUTED)
    axes.tick_params(colors=MUTED, which="both", labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", steps=[1, 2, 5, 10], integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_noisy(axes: Axes, curve: Curve, color: str, label: str | None = None) -> None:
    axes.plot(*curve, color=color, alpha=0.3, linewidth=0.8)
    marker = "o" if len(curve.values) == 1 else ""
    axes.plot(*curve.smoothed(), color=color, linewidth=2, marker=marker, label=label)


def _draw_loss(axes: Axes, losses: Mapping[str, Curve]) -> None:
    if train := losses.get("train_loss"):
        _draw_noisy(axes, train, BLUE, "train")
    if val := losses.get("val_loss"):
        axes.plot(*val, color=VERMILION, marker="o", linestyle=":", linewidth=1.2, label="validation")
    values = [value for curve in losses.values() for value in curve.values]
    if min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, labelcolor=INK)


def _draw_tokens(axes: Axes, tokens: Curve) -> None:
    _draw_noisy(axes, tokens, GREEN)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylim(bottom=0)


def _draw_rates(axes: Axes, rates: Mapping[str, Curve]) -> None:
    # every second module dashed, so that equal rates stay visible on top of one another
    for (name, rate), color, dashes in zip(rates.items(), cycle(HUES), cycle(("-", "--"))):
        axes.plot(
            *rate,
            color=color,
            linestyle=dashes,
            linewidth=2,
            label=name.rpartition("/")[2].removeprefix(_LEARNING_RATE),
        )
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    if len(rates) > 1:
        axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper right", handlelength=1.5)
