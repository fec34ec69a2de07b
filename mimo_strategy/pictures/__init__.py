"""Pictures of a run: its layout, its curves and its captions. Matplotlib is imported only here.

Functions that draw take data and return a :class:`matplotlib.figure.Figure`; no display is needed.
"""

from mimo_strategy.pictures.captions import CaptionedImage, draw_captions, load_image, save_image
from mimo_strategy.pictures.curves import draw_curves
from mimo_strategy.pictures.layout_map import draw_layout

__all__ = ["CaptionedImage", "draw_captions", "draw_curves", "draw_layout", "load_image", "save_image"]
