"""Maps of cells: numbers in rows and columns, or of the tokens of texts, as colours.

A map takes plain numbers and words; a record's `plot` says what they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.interp.drawing.labels import Name, label, on_axis, visible
from loopscope.interp.drawing.look import (
    ACCURACY_SCALE,
    CELL_TEXT,
    SIGNED_SCALE,
    color_bar,
    styled,
    titled,
)

Table = Sequence[Sequence[float | int]]
Words = Sequence[Sequence[str]]
_WIDTH = 16  # tokens in a line of a map of tokens
_WRITTEN = 32  # columns up to which a map's numbers are written into its cells


@dataclass(frozen=True)
class CellMap:
    """A map of cells: one panel of a figure.

    Attributes:
        title: The title of the panel.
        columns, rows: The name of each column and each row, from left and from below.
        values: One row of numbers per row of the map; NaN leaves a cell empty.
        unit: The title of the colour bar.
        scale: "share" goes from 0 to 1, "signed" has 0 in the middle, "size" fits the values.
        texts: What is written into each cell; None writes the numbers.
        hover: What is shown of each cell besides its row, column and number.
        axes: The titles of the two axes, of the columns and of the rows.
    """

    title: str
    columns: Sequence[Name]
    rows: Sequence[Name]
    values: Table
    unit: str
    scale: Literal["share", "signed", "size"] = "share"
    texts: Words | None = None
    hover: Words | None = None
    axes: tuple[str, str] = ("", "")

    def trace(self, **own: Any) -> go.Heatmap:
        """The map as a trace; `own` are plotly's settings of it."""
        texts = self.texts if self.texts is not None else self._numbers()
        hover = "%{y}<br>%{x}<br>%{customdata}" if self.hover else "%{y}<br>%{x}"
        settings = {
            "colorbar": color_bar(self.bar_title()),
            **self._colors(),
            **own,
        }
        return go.Heatmap(
            x=list(map(on_axis, self.columns)),
            y=list(map(on_axis, self.rows)),
            z=[list(row) for row in self.values],
            xgap=1,
            ygap=1,
            text=[[label(visible(text)) for text in row] for row in texts],
            texttemplate="%{text}",
            textfont={**CELL_TEXT, **self._text_size()},
            customdata=[["<br>".join(map(label, cell.split("\n"))) for cell in row]
                        for row in self.hover or ()] or None,
            hoverongaps=False,
            hovertemplate=f"{hover}<br>{self._short_unit()} %{{z:.3g}}<extra></extra>",
            **settings,
        )  # fmt: skip

    def bar_title(self) -> str:
        """The unit over the colour bar; a line end in the unit is one on the figure."""
        return label(self.unit).replace("\n", "<br>")

    def _short_unit(self) -> str:
        """The first line of the unit."""
        return label(self.unit.splitlines()[0]) if self.unit else ""

    def _text_size(self) -> dict[str, int]:
        """The size of words, which fit into a map of 250 pixels; plotly fits numbers itself."""
        if self.texts is None:
            return {}
        longest = max((len(text) for row in self.texts for text in row), default=1)
        fits = int(250 / (0.62 * max(1, longest) * max(1, len(self.columns))))
        return {"size": max(7, min(12, fits))}

    def _numbers(self) -> Words:
        if len(self.columns) > _WRITTEN:
            return [[""] * len(self.columns) for _ in self.rows]
        return [[_written(value) for value in row] for row in self.values]

    def _colors(self) -> dict[str, Any]:
        if self.scale == "share":
            return {"zmin": 0, "zmax": 1, "colorscale": ACCURACY_SCALE}
        if self.scale == "size":
            return {"colorscale": ACCURACY_SCALE}
        return {"zmid": 0, "colorscale": SIGNED_SCALE, **_reach([self])}


def _written(value: float | int) -> str:
    """A number with two decimals; nothing where there is none."""
    return f"{value:z.2f}" if value == value else ""


def cell_maps(maps: Sequence[CellMap], title: str = "") -> go.Figure:
    """Maps of cells, at most two side by side; maps of one unit and scale share their colours."""
    cols = min(2, len(maps))
    rows = -(-len(maps) // cols)
    together = len({(each.unit, each.scale) for each in maps}) == 1
    plot = make_subplots(
        rows=rows,
        cols=cols,
        horizontal_spacing=0.12 if together else 0.24,
        vertical_spacing=0.3 / rows,
        subplot_titles=[label(each.title) for each in maps],
    )
    reach = _reach(maps) if together else {}
    for i, each in enumerate(maps):
        place = {"row": i // cols + 1, "col": i % cols + 1}
        corner = plot.get_subplot(**place)
        right, domain = corner.xaxis.domain[1], corner.yaxis.domain
        bar = {"x": 1.0 if together else right, "y": domain[1], "len": domain[1] - domain[0]}
        look = {"showscale": not together or i == cols - 1, **reach}
        plot.add_trace(
            each.trace(colorbar=color_bar(each.bar_title(), **bar, yanchor="top"), **look), **place
        )
        plot.update_xaxes(title=each.axes[0], type="category", tickangle=-30, **place)
        plot.update_yaxes(title=each.axes[1], type="category", **place)
    plot.update_annotations(font_size=13)
    bottom, height = _below(maps, rows)
    return titled(styled(plot, height).update_layout(margin_b=bottom), title)


def _below(maps: Sequence[CellMap], rows: int) -> tuple[int, int]:
    """The room for the names of columns, and the height of the whole, in pixels."""
    longest = max((len(str(name)) for each in maps for name in each.columns), default=0)
    bottom = 60 + min(110, 4 * longest)
    tallest = max(len(each.rows) for each in maps)
    return bottom, 58 + bottom + rows * (70 + 24 * max(5, tallest))


def _reach(maps: Sequence[CellMap]) -> dict[str, Any]:
    """The ends of a colour scale that some maps share."""
    values = [v for each in maps for row in each.values for v in row if v == v]
    if maps[0].scale == "share" or not values:
        return {}
    if maps[0].scale == "size":
        return {"zmin": min(values), "zmax": max(values)}
    most = max(map(abs, values)) or 1.0
    return {"zmin": -most, "zmax": most}


@dataclass(frozen=True)
class TokenMap:
    """Texts token by token, in lines, with a number for each token as its colour.

    Attributes:
        tokens: The tokens of each text.
        values: One number for each token, text after text.
    """

    tokens: Sequence[Sequence[str]]
    values: Sequence[float]

    def lines(self) -> list[tuple[int, int, int]]:
        """The lines, each text on lines of its own: the text, the position of the first token, and
        its place among all tokens.
        """
        lines, spot = [], 0
        for i, row in enumerate(self.tokens):
            lines += [(i, start, spot + start) for start in range(0, len(row), _WIDTH)]
            spot += len(row)
        return lines

    def add_to(self, plot: go.Figure, most: int, place: Mapping[str, int], **own: Any) -> None:
        """Draw the first lines, at most so many, in a panel.

        Args:
            place: The row and the column of the panel.
            own: Further settings of the map, in the words of plotly's heatmaps.
        """
        lines, width = self.lines()[:most], min(_WIDTH, max(map(len, self.tokens)))
        z, text, hover = [], [], []
        for i, start, spot in lines:
            shown = self.tokens[i][start : start + width]
            gaps = width - len(shown)
            places = [f"input {i}, position {start + j}" for j in range(len(shown))]
            z.append([*self.values[spot : spot + len(shown)], *[math.nan] * gaps])
            text.append([*map(label, shown), *[""] * gaps])
            hover.append([*places, *[""] * gaps])
        plot.add_heatmap(
            z=z,
            text=text,
            customdata=hover,
            texttemplate="%{text}",
            textfont=CELL_TEXT,
            xgap=2,
            ygap=2,
            hoverongaps=False,
            colorscale=ACCURACY_SCALE,
            **own,
            **place,
        )
        names = [f"input {i}" if start == 0 else "" for i, start, _ in lines]
        rows = list(range(len(lines)))
        plot.update_yaxes(autorange="reversed", tickvals=rows, ticktext=names, **place)
        plot.update_xaxes(visible=False, **place)
