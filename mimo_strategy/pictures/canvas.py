"""A page to draw on in inches, and the width of text on it."""

from functools import cache

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

MARGIN = 0.3

_HINTING = 1.06
"""How much wider text may become when its letters are fitted to coarse pixels."""


def page(width: float) -> tuple[Figure, Axes]:
    """A white figure ``width`` inches wide, its axes in inches from the upper left; :func:`crop` ends it."""
    figure = Figure(facecolor="white")
    figure.set_figwidth(width)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    return figure, axes


def crop(axes: Axes, height: float) -> None:
    """End the page below ``height`` inches."""
    figure = axes.get_figure()
    figure.set_figheight(height)
    # aspect: showing an image sets it to the image's own
    axes.set(xlim=(0, figure.get_figwidth()), ylim=(height, 0), aspect="auto")


@cache
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width in inches of one line of ``text`` at ``size`` points."""
    font = FontProperties(size=size, weight=weight)
    points, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return _HINTING * points / 72
