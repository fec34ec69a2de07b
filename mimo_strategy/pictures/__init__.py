"""Pictures of a run: its layout, its curves and its captions. Matplotlib is imported only here.

Every function takes data and returns a :class:`matplotlib.figure.Figure`; no display is needed.
"""

from mimo_strategy.pictures.captions import CaptionedImage, draw_captions
from mimo_strategy.pictures.curves import draw_curves
from mimo_strategy.pictures.layout_map import draw_layout

__all__ = ["CaptionedImage", "draw_captions", "draw_curves", "draw_layout"]
