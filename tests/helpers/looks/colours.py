"""How colours are seen: contrast, distance, with a colour vision deficiency, in the dark mode."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from plotly.colors import find_intermediate_color

from loopscope.interp.drawing.look import DARK

Rgb = tuple[float, float, float]
"""Red, green and blue from 0 to 1."""

NAMED = {"white": "#ffffff", "black": "#000000"}
SEEN_WITH = {
    "protanopia": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
"""What becomes of linear RGB, at severity 1.0: Machado, Oliveira and Fernandes (2009), "A
Physiologically-based Model for Simulation of Color Vision Deficiency", IEEE Transactions on
Visualization and Computer Graphics 15(6), with the table of matrices on the authors' page.
"""

_TO_XYZ = np.array([
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
])  # fmt: skip
_WHITE = _TO_XYZ.sum(1)  # of D65
_LUMA = np.array([0.213, 0.715, 0.072])
PAPER = "#ffffff"


def rgb(color: str) -> Rgb:
    """A colour as CSS writes it; the opacity of an rgba is left out."""
    text = NAMED.get(color, color)
    if text.startswith("#"):
        return (int(text[1:3], 16) / 255, int(text[3:5], 16) / 255, int(text[5:7], 16) / 255)
    red, green, blue = map(float, re.findall(r"[\d.]+", text)[:3])
    return (red / 255, green / 255, blue / 255)


def blend(color: Rgb, ground: Rgb, opacity: float) -> Rgb:
    """A colour that is not quite opaque, on its ground."""
    red, green, blue = (opacity * a + (1 - opacity) * b for a, b in zip(color, ground, strict=True))
    return (red, green, blue)


def linear(color: Rgb) -> npt.NDArray[np.float64]:
    """The light of a colour of sRGB."""
    values = np.array(color)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _written(light: npt.NDArray[np.float64]) -> Rgb:
    """The colour of sRGB that has this light, as near as a screen comes to it."""
    light = light.clip(0, 1)
    red, green, blue = np.where(
        light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055
    ).tolist()
    return (red, green, blue)


def luminance(color: Rgb) -> float:
    """Relative luminance as WCAG 2.2 defines it: 0 of black, 1 of white."""
    return float(linear(color) @ np.array([0.2126, 0.7152, 0.0722]))


def contrast(one: Rgb, other: Rgb) -> float:
    """The contrast ratio of WCAG 2.2, from 1 to 21."""
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def lab(color: Rgb) -> npt.NDArray[np.float64]:
    """CIE L*, a*, b* under D65."""
    ratio = _TO_XYZ @ linear(color) / _WHITE
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * 841 / 108 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: Rgb, other: Rgb) -> float:
    """CIE76: the distance in L*, a*, b*; about 2 is just seen side by side."""
    return float(np.linalg.norm(lab(one) - lab(other)))


def seen(color: Rgb, with_what: str) -> Rgb:
    """A colour as it looks with a deficiency of `SEEN_WITH`, or with none ("normal")."""
    if with_what == "normal":
        return color
    return _written(np.array(SEEN_WITH[with_what]) @ linear(color))


def in_the_dark(color: Rgb) -> Rgb:
    """A colour on a dark page where `DARK` does not say which: the lightness is turned round and
    the hue stays; `figures.js` does the same.
    """
    inverted = 0.9 - 0.8 * np.array(color)
    red, green, blue = (2 * (_LUMA @ inverted) - inverted).clip(0, 1).tolist()
    return (red, green, blue)


def shown(color: str, mode: str) -> Rgb:
    """A colour of a figure on a page in the mode "light" or "dark"."""
    if mode == "light":
        return rgb(color)
    return rgb(DARK[color]) if color in DARK else in_the_dark(rgb(color))


def along(scale: Sequence[Sequence[float | str]], share: float, mode: str = "light") -> Rgb:
    """The colour at a place of a scale, from 0 to 1, as plotly makes it: linear in sRGB between
    stops.
    """
    stops = [(float(at), shown(str(color), mode)) for at, color in scale]
    share = min(1.0, max(0.0, share))
    for (low, one), (high, other) in pairwise(stops):
        if low <= share <= high and high > low:
            found: Rgb = find_intermediate_color(one, other, (share - low) / (high - low))
            return found
    return stops[-1][1]
