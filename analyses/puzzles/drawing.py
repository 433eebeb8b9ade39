"""The parts of the figures of puzzles: a row of boards above a row of panels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.interp.drawing.look import CATEGORIES, FAINT, GRID, INK, MARK

RIGHT = CATEGORIES[0]
BOARD_SPAN = 4  # columns of the grid below one board


def grid_of(boards: Sequence[str], panels: Sequence[str]) -> tuple[go.Figure, list[dict[str, int]]]:
    """An empty figure with a row of boards above panels, two side by side, each with a legend
    below.

    Args:
        boards, panels: Their titles.

    Returns:
        The figure, and the row and the column of each panel in it; board i begins at column
        BOARD_SPAN * i + 1 of the first row.
    """
    count, down = BOARD_SPAN * len(boards), -(-len(panels) // 2)
    wide = count // 2
    specs: list[list[dict[str, int] | None]] = [[None] * count for _ in range(1 + down)]
    for i in range(len(boards)):
        specs[0][BOARD_SPAN * i] = {"colspan": BOARD_SPAN}
    places = [{"row": 2 + i // 2, "col": 1 + i % 2 * wide} for i in range(len(panels))]
    for at in places:
        specs[at["row"] - 1][at["col"] - 1] = {"colspan": wide - 2}
    plot = make_subplots(
        rows=1 + down, cols=count, specs=specs, subplot_titles=(*boards, *panels),
        row_heights=[0.5, *[1] * down], vertical_spacing=0.17, horizontal_spacing=0.002,
    )  # fmt: skip
    plot.update_annotations(font_size=13)
    for i, at in enumerate(places):
        panel = plot.get_subplot(**at)
        corner = {"x": panel.xaxis.domain[0], "y": panel.yaxis.domain[0] - 0.07, "yanchor": "top"}
        plot.update_layout({_legend(i + 1): {"orientation": "v", **corner, "font": {"size": 11}}})
    return plot, places


def _legend(panel: int) -> str:
    return f"legend{panel if panel > 1 else ''}"


def draw_line(
    plot: go.Figure,
    panel: int,
    name: str,
    color: str,
    values: Sequence[float],
    axis: tuple[str, int] = ("cycles", 1),
    /,
    **place: int,
) -> None:
    """A named line of one panel; a value that is not a number is left out.

    Args:
        panel: The panel's place from 1, whose legend names the line.
        axis: The axis' word, and the first value's place on it.
    """
    unit, start = axis
    plot.add_scatter(
        x=list(range(start, start + len(values))),
        y=[None if math.isnan(value) else value for value in values],
        mode="lines+markers",
        name=name,
        legend=_legend(panel),
        line={"color": color, "width": 2},
        hovertemplate=f"{name}<br>{unit} %{{x}}<br>%{{y:.3f}}<extra></extra>",
        **place,
    )


def draw_board(plot: go.Figure, board: str, question: str, answer: str, **place: int) -> None:
    """One board: clues grey, right cells blue, wrong ones orange."""
    side = math.isqrt(len(board))
    looks = [_look(*each) for each in zip(board, question, answer, strict=True)]
    colors, fills = map(list, zip(*looks, strict=True))
    plot.add_scatter(
        x=[i % side for i in range(len(board))],
        y=[i // side for i in range(len(board))],
        mode="markers+text",
        text=["" if cell == "." else cell for cell in board],
        textfont={"color": colors, "size": 13},
        marker={
            "symbol": "square",
            "size": 20,
            "color": fills,
            "line": {"color": FAINT, "width": 1},
        },
        showlegend=False,
        hovertemplate="row %{y}, column %{x}: %{text}<extra></extra>",
        **place,
    )
    ends = [-0.6, side - 0.4]
    plot.update_xaxes(visible=False, range=ends, **place)
    plot.update_yaxes(visible=False, range=ends[::-1], **place)


def _look(cell: str, clue: str, right: str) -> tuple[str, str]:
    """The colours of a cell's text and of its ground."""
    if clue != ".":
        return INK, GRID
    if cell == ".":
        return RIGHT, "#ffffff"
    return (RIGHT, "#e9f3fb") if cell == right else (MARK, "#fef7f3")
