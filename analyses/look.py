"""How the figures look, in one place."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

INK, FAINT, GRID = "#1f2933", "#9aa5b1", "#e4e7eb"
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
TRAINED_SCALE, BEYOND_SCALE = "Blues", "Oranges"
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


def hop_colors(hops: Sequence[int], trained: int | None) -> dict[int, str]:
    """Blues for hop counts seen in training, oranges for those beyond."""
    inside = [hop for hop in hops if trained is None or hop <= trained]
    beyond = [hop for hop in hops if hop not in inside]
    colors: dict[int, str] = {}
    for group, scale in ((inside, TRAINED_SCALE), (beyond, BEYOND_SCALE)):
        places = [0.35 + 0.6 * i / max(1, len(group) - 1) for i in range(len(group))]
        colors |= dict(zip(group, sample_colorscale(scale, places), strict=True)) if group else {}
    return colors


def hop_name(hops: int) -> str:
    """ "1 hop", "2 hops", ..."""
    return f"{hops} hop" + "s" * (hops != 1)
