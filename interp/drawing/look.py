"""How all figures look, in one place: colours that can be read by everybody, on white and on dark.

A text keeps a contrast of at least 4.5 to its ground, a line one of at least 3; the tests compute
both for every figure, and what is left of the colours with a colour vision deficiency.
"""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

Scale = list[list[float | str]]
"""Stops of a colour scale, from 0 to 1, with the colour at each."""

INK, SOFT, FAINT, GRID = "#1f2933", "#52606d", "#7b8794", "#e4e7eb"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
MARK = "#c04f00"
CATEGORIES = (
    "#0072b2",
    MARK,
    "#20a469",
    "#b60ca2",
    "#5c4a08",
    "#438aff",
    INK,
    "#6d8593",
)  # told apart by all
ACCURACY_SCALE: Scale = [[0.0, "#f7f9fb"], [0.5, "#a3cbe9"], [1.0, "#3d8ccb"]]
WARM_SCALE: Scale = [[0.0, "#fbf8f4"], [0.5, "#f5bd8a"], [1.0, "#d96f1e"]]
GREY_SCALE: Scale = [[0.0, "#f7f9fb"], [1.0, "#7f8b97"]]
SIGNED_SCALE: Scale = [
    [0.0, "#3d8ccb"],
    [0.25, "#a3cbe9"],
    [0.5, "#f7f7f7"],
    [0.75, "#f5b595"],
    [1.0, "#e0662f"],
]
"""The scales of cells end before they are too dark for a text in `CELL_INK`."""
CELL_INK = "#101820"
CELL_TEXT = {"color": CELL_INK}  # without a size, a text becomes as small as its cell needs
BLUES: Scale = [[0.0, "#4f94cd"], [1.0, "#08254f"]]
ORANGES: Scale = [[0.0, "#d9730d"], [1.0, "#571f00"]]
ORDER: Scale = [[0.0, "#0d0887"], [0.35, "#7e03a8"], [0.7, "#b93289"], [1.0, "#e16462"]]
"""The scales of lines in an order, which begin or end before they are too pale on white."""

DARK = {
    CELL_INK: "#ffffff",
    "#f7f9fb": "#20252a",
    "#a3cbe9": "#245075",
    "#3d8ccb": "#2f78b8",
    "#fbf8f4": "#28231e",
    "#f5bd8a": "#7a4418",
    "#d96f1e": "#b85a14",
    "#7f8b97": "#6b7783",
    "#f7f7f7": "#262626",
    "#f5b595": "#7c3d22",
    "#e0662f": "#bd4f22",
}
"""The colours of cells and of their texts on a dark page; the page turns the lightness of the
others.
"""


def shades(scale: Scale, count: int) -> list[str]:
    """Colours along a scale for so many lines in an order, from its first to its last."""
    places = [i / max(1, count - 1) for i in range(count)]
    return list(map(str, sample_colorscale(scale, places))) if count else []


def deeper(color: str) -> str:
    """The colour of a text that belongs to a line of this colour: a text needs more contrast."""
    return str(sample_colorscale([[0.0, "#000000"], [1.0, color]], 0.78)[0])


def color_bar(title: str, **own: Any) -> dict[str, Any]:
    """A colour bar under its title, which a short line keeps off the highest number.

    Args:
        own: Further settings, in the words of plotly's colour bars.
    """
    gap = f"{title}<br><span style='font-size:6px'>\u00a0</span>" if title else ""
    return {"title": {"text": gap}, "thickness": 10, "outlinewidth": 0, **own}


def styled(figure: go.Figure, height: int) -> go.Figure:
    """A figure with the project's fonts, grid and margins."""
    figure.update_layout(
        template="simple_white",
        height=height,
        font={"family": FONT, "size": 13, "color": INK},
        margin={"l": 70, "r": 30, "t": 58, "b": 60},
        hoverlabel={"font": {"family": FONT, "size": 13}, "align": "left"},
        legend={"font": {"size": 12}, "tracegroupgap": 6},
    )
    figure.update_xaxes(gridcolor=GRID, linecolor=FAINT, tickcolor=FAINT)
    figure.update_yaxes(gridcolor=GRID, linecolor=FAINT, tickcolor=FAINT)
    return figure


def titled(figure: go.Figure, title: str) -> go.Figure:
    """A figure with a title of its own above all that it shows; an empty title changes nothing."""
    if not title:
        return figure
    lines = 18 * (1 + title.count("<br>"))
    top, height = (figure.layout.margin.t or 58) + lines, (figure.layout.height or 450) + lines
    figure.update_layout(
        title={
            "text": title,
            "font": {"size": 14},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": 1 - 14 / height,
            "yref": "container",
            "yanchor": "top",
        },
        margin_t=top,
        height=height,
    )
    return figure
