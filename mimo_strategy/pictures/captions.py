"""Held-out images with the captions that a model gave them."""

from collections.abc import Iterable, Sequence
from itertools import batched
from math import ceil, sqrt
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread, imsave
from matplotlib.patches import Rectangle

from mimo_strategy.pictures.canvas import MARGIN, crop, page, text_width
from mimo_strategy.pictures.palette import GREEN, INK, MUTED, VERMILION

_SIDE, _GAP, _LINE, _INDENT = 1.6, 0.32, 0.17, 0.18
"""Square that an image fits into, space between samples, line of text, and room for the mark, in inches."""
_HEADER, _TEXT = 15, 9
"""Font sizes in points."""
_MOST_COLUMNS, _MOST_LINES = 6, 8


class CaptionedImage(NamedTuple):
    """One sample: ``image`` is ``[3, height, width]`` in [-1, 1] or [0, 1], ``truth`` may not be known."""

    image: torch.Tensor | np.ndarray
    prompt: str
    generated: str
    truth: str | None

    @property
    def is_right(self) -> bool | None:
        """Whether the generated caption is the true one, up to white space; ``None`` if that is not known."""
        return None if self.truth is None else self.generated.split() == self.truth.split()


class _Line(NamedTuple):
    text: str
    color: str
    indent: float = 0.0
    weight: str = "normal"


def draw_captions(samples: Sequence[CaptionedImage]) -> Figure:
    """Draw a grid of images, each with its prompt, the generated caption and, if that is wrong, the true one.

    The images of all samples are taken to be in [-1, 1] as soon as one value of one of them is negative.

    Raises:
        ValueError: if there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to draw")
    verdicts = [sample.is_right for sample in samples]
    header = f"{len(samples)} shown"
    if None not in verdicts:
        header = f"{sum(verdicts)} of {len(samples)} shown are right"
    columns = min(_MOST_COLUMNS, ceil(sqrt(1.5 * len(samples))))
    grid_width = columns * (_SIDE + _GAP) - _GAP
    figure, axes = page(max(grid_width, text_width(header, _HEADER, "bold")) + 2 * MARGIN)
    axes.text(MARGIN, MARGIN, header, size=_HEADER, weight="bold", color=INK, va="top")
    y = MARGIN + 0.5
    for row in batched(zip(samples, _pixels(sample.image for sample in samples), strict=True), columns):
        placed = [(MARGIN + column * (_SIDE + _GAP), *cell) for column, cell in enumerate(row)]
        y = max(_draw_image(axes, sample, image, x, y) for x, sample, image in placed) + 0.08
        y = max(_draw_caption(axes, sample, x, y) for x, sample, _ in placed) + _GAP
    crop(axes, y - _GAP + MARGIN)
    return figure


def save_image(image: torch.Tensor, path: str | Path) -> None:
    """Write an image ``[3, height, width]``, in [-1, 1] if one of its values is negative, otherwise in [0, 1]."""
    imsave(path, _pixels([image])[0])


def load_image(path: str | Path) -> torch.Tensor:
    """An image ``[3, height, width]`` in [0, 1], as :func:`save_image` wrote it."""
    return torch.from_numpy(imread(path)[..., :3].transpose(2, 0, 1).copy())


def _pixels(images: Iterable[torch.Tensor | np.ndarray]) -> list[np.ndarray]:
    images = [torch.as_tensor(image).detach().float().cpu().numpy() for image in images]
    if any((image < 0).any() for image in images):
        images = [(image + 1) / 2 for image in images]
    return [image.transpose(1, 2, 0).clip(0, 1) for image in images]


def _verdict_color(sample: CaptionedImage) -> str:
    return {True: GREEN, False: VERMILION, None: INK}[sample.is_right]


def _draw_image(axes: Axes, sample: CaptionedImage, image: np.ndarray, x: float, y: float) -> float:
    """Draw the image in its frame from ``(x, y)``; returns where it ends."""
    scale = _SIDE / max(image.shape[:2])
    height, width = image.shape[0] * scale, image.shape[1] * scale
    axes.imshow(image, extent=(x, x + width, y + height, y), interpolation="nearest")
    frame = Rectangle((x, y), width, height, fill=False, edgecolor=_verdict_color(sample), linewidth=2.5)
    axes.add_artist(frame)
    return y + height


def _draw_caption(axes: Axes, sample: CaptionedImage, x: float, y: float) -> float:
    """Draw the texts of a sample from ``(x, y)``; returns where they end."""
    color = _verdict_color(sample)
    mark = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}", None: ""}[sample.is_right]
    lines = [_Line(text, MUTED) for text in _wrapped(sample.prompt, _SIDE)]
    mark_y = y + (len(lines) + 0.5) * _LINE
    axes.text(x, mark_y, mark, size=_TEXT + 2, weight="bold", color=color, va="center")
    generated = _wrapped(sample.generated, _SIDE - _INDENT, "bold") or ["(nothing)"]
    lines += [_Line(text, color, _INDENT, "bold") for text in generated]
    if sample.is_right is False:
        lines += [_Line(text, INK, _INDENT) for text in _wrapped(f"truth: {sample.truth}", _SIDE - _INDENT)]
    for index, line in enumerate(lines):
        position = (x + line.indent, y + (index + 0.5) * _LINE)
        # parse_math: a caption may hold dollar signs
        axes.text(
            *position,
            line.text,
            size=_TEXT,
            weight=line.weight,
            color=line.color,
            va="center",
            parse_math=False,
        )
    return y + len(lines) * _LINE


def _wrapped(text: str, width: float, weight: str = "normal") -> list[str]:
    """Lines of ``text`` that fit into ``width`` inches; a text of too many lines ends in an ellipsis."""
    narrowest = text_width("i", _TEXT, weight)
    for letters in range(int(width / narrowest), 2, -1):
        lines = wrap(text, letters, max_lines=_MOST_LINES, placeholder="\N{HORIZONTAL ELLIPSIS}")
        if all(text_width(line, _TEXT, weight) <= width for line in lines):
            break
    return lines
