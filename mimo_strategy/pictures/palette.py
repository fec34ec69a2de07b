"""Colours of the pictures: hues of Okabe and Ito, and Tol's olive, which colour-blind readers tell apart."""

from matplotlib.colors import to_rgb

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, OLIVE = HUES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999933",
)
INK, MUTED, PALE, FAINT = "#1F2328", "#59636E", "#AFB8C1", "#E4E8EC"

type Color = tuple[float, float, float]
"""Red, green and blue from 0 to 1."""


def tint(color: str, strength: float) -> Color:
    """Mix ``color`` with white; ``strength`` 1 is the colour itself, 0 is white."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue
