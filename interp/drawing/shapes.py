"""One drawing function for each shape of record: maps of cells, curves, paths on a plane, bars.

Each takes plain numbers and words and returns a figure; a record's `plot` says what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.interp.drawing.labels import label, visible
from loopscope.interp.drawing.look import (
    ACCURACY_SCALE,
    CATEGORIES,
    CELL_TEXT,
    FAINT,
    INK,
    ORDER,
    SIGNED_SCALE,
    color_bar,
    shades,
    styled,
    titled,
)

Table = Sequence[Sequence[float | int]]
Name = str | float | int
Words = Sequence[Sequence[str]]
_WRITTEN = 32  # columns up to which a map's numbers are written into its cells
MOST = 12  # curves drawn one by one; of more, the quartiles are drawn
_SEPARATE = 8  # curves up to which each has a colour of its own


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
            x=list(map(_named, self.columns)),
            y=list(map(_named, self.rows)),
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


def _named(name: Name) -> Name:
    """A name on an axis letter by letter; a number as it is."""
    return label(name) if isinstance(name, str) else name


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
class Curve:
    """One curve.

    Attributes:
        name: Its name in the legend; curves of one name have one colour and one entry.
        x, y: Its points; NaN leaves a gap.
        star: The index of a point to mark; None marks none.
        dashed: Whether the line is dashed.
    """

    name: str
    x: Sequence[Name]
    y: Sequence[float | int]
    star: int | None = None
    dashed: bool = False


@dataclass(frozen=True)
class CurvePanel:
    """Curves in one panel.

    Attributes:
        title: The title of the panel.
        curves: The curves.
        x_title: The title of the horizontal axis.
        log: Whether the vertical axis is logarithmic.
        span: The least and the largest value of the vertical axis; None fits the values.
    """

    title: str
    curves: Sequence[Curve]
    x_title: str = "iterations"
    log: bool = False
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Palette:
    """The colours of named curves: a few that all can tell apart, or one scale for many."""

    names: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> str:
        place = self.names.index(name)
        if len(self.names) <= _SEPARATE:
            return CATEGORIES[place]
        return shades(ORDER, len(self.names))[place]


def curves(panels: Sequence[CurvePanel], title: str = "") -> go.Figure:
    """Curves over visits, iterations or steps, one panel per statistic, two side by side."""
    cols = min(2, len(panels))
    rows = -(-len(panels) // cols)
    plot = make_subplots(
        rows=rows,
        cols=cols,
        horizontal_spacing=0.12,
        vertical_spacing=0.3 / rows,
        subplot_titles=[label(each.title) for each in panels],
    )
    named = dict.fromkeys(curve.name for each in panels for curve in each.curves)
    palette, shown = _Palette(tuple(named)), set[str]()
    for i, panel in enumerate(panels):
        place = {"row": i // cols + 1, "col": i % cols + 1}
        for curve in panel.curves:
            trace = _line(curve, palette[curve.name])
            plot.add_trace(trace.update(showlegend=curve.name not in shown), **place)
            shown.add(curve.name)
        plot.update_xaxes(title=panel.x_title, **place)
        plot.update_yaxes(showgrid=True, type="log" if panel.log else None, **place)
        if panel.span is not None:
            plot.update_yaxes(range=list(panel.span), **place)
    plot.update_annotations(font_size=13)
    plot.update_layout(showlegend=len(named) > 1)
    return titled(styled(plot, 130 + 260 * rows), title)


def spread(
    x: Sequence[float | str], values: Tensor, names: Sequence[str], starred: Sequence[int] = ()
) -> list[Curve]:
    """A curve for each row of values, or the quartiles over the rows where these are many."""
    values = values.detach().double().cpu()
    if len(values) <= MOST:
        stars: Sequence[int | None] = starred or [None] * len(values)
        rows = zip(names, values.tolist(), stars, strict=True)
        return [Curve(name, x, row, star) for name, row, star in rows]
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64, device="cpu")
    low, middle, high = torch.nanquantile(values, shares, dim=0).tolist()
    edges = [Curve("quartiles", x, row, dashed=True) for row in (low, high)]
    return [*edges, Curve(f"median of {len(values)}", x, middle)]


def _line(curve: Curve, color: str) -> go.Scatter:
    sizes = [12 if i == curve.star else 5 for i in range(len(curve.x))]
    symbols = ["star" if i == curve.star else "circle" for i in range(len(curve.x))]
    name = label(curve.name)
    return go.Scatter(
        x=list(map(_named, curve.x)),
        y=list(curve.y),
        mode="lines+markers",
        name=name,
        legendgroup=name,
        line={"color": color, "width": 2, "dash": "dot" if curve.dashed else "solid"},
        marker={"size": sizes, "symbol": symbols},
        hovertemplate=f"{name}<br>%{{x}}<br>%{{y:.3g}}<extra></extra>",
    )


def plane(
    paths: Sequence[Curve], axes: tuple[str, str], title: str = "", circle: bool = False
) -> go.Figure:
    """Paths on a plane, or points around the unit circle.

    Args:
        paths: A path with a star at one point, or the points of one example with a star at one.
        axes: The titles of the two axes.
        circle: Whether the points stand alone and the unit circle is drawn.
    """
    palette = _Palette(tuple(dict.fromkeys(path.name for path in paths)))
    plot = go.Figure([_line(path, palette[path.name]) for path in paths])
    if circle:
        plot.update_traces(mode="markers")
        line = {"color": FAINT, "width": 1}
        plot.add_shape(type="circle", x0=-1, x1=1, y0=-1, y1=1, line=line, layer="below")
        plot.update_shapes(fillcolor="rgba(0,0,0,0)")
        plot.update_yaxes(scaleanchor="x")
    plot.update_xaxes(title=axes[0], showgrid=True, zeroline=False)
    plot.update_yaxes(title=axes[1], showgrid=True, zeroline=False)
    plot.update_layout(showlegend=len(paths) > 1)
    return titled(styled(plot, 480), title)


def bars(groups: Sequence[Curve], y_title: str, x_title: str, title: str = "") -> go.Figure:
    """Bars side by side, one colour per group."""
    palette = _Palette(tuple(group.name for group in groups))
    plot = go.Figure()
    for group in groups:
        plot.add_bar(
            x=list(map(_named, group.x)),
            y=list(group.y),
            name=label(group.name),
            marker_color=palette[group.name],
        )
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.update_xaxes(title=x_title, type="category")
    plot.update_yaxes(title=y_title, showgrid=True)
    plot.update_layout(showlegend=len(groups) > 1)
    return titled(styled(plot, 420), title)
