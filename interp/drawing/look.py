"""How all figures look, in one place."""

from __future__ import annotations

import plotly.graph_objects as go

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
MARK = "#D55E00"
CATEGORIES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    INK,
    FAINT,
)  # Okabe and Ito's, told apart by all
ACCURACY_SCALE = [[0.0, "#f7f9fb"], [0.5, "#8fbfe0"], [1.0, "#0b4f8a"]]


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
