"""Named curves: over visits, iterations or steps, as paths on a plane, and as bars.

Each function takes plain numbers and words and returns a figure; a record's `plot` says what they
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.interp.drawing.labels import Name, label, on_axis
from loopscope.interp.drawing.look import CATEGORIES, FAINT, INK, ORDER, shades, styled, titled

MOST = 12  # curves drawn one by one; of more, the quartiles are drawn
_SEPARATE = 8  # curves up to which each has a colour of its own


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
        x=list(map(on_axis, curve.x)),
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


def arrows(
    points: Float[Tensor, "point 2"], near: float, color: str, name: str, hover: str
) -> go.Scatter:
    """A path on a plane as a line with arrow heads.

    Args:
        points: After 1, 2, ... iterations.
        near: The least distance from one arrow head to the next.
        name: In the legend.
        hover: What is shown of the path when it is pointed at, above the iterations and the place.
    """
    sizes, shown = [0.0] * len(points), points[0]
    for i, point in enumerate(points[1:], start=1):
        if float((point - shown).norm()) >= near:
            sizes[i], shown = 9.0, point
    return go.Scatter(
        x=points[:, 0].tolist(),
        y=points[:, 1].tolist(),
        mode="lines+markers",
        line={"color": color, "width": 1.6, "backoff": 0},
        marker={
            "symbol": "arrow",
            "angleref": "previous",
            "size": sizes,
            "color": color,
            "opacity": 1,
            "line": {"width": 0},
        },
        name=name,
        legendgroup=name,
        customdata=list(range(1, len(points) + 1)),
        hovertemplate=(
            f"{hover}<br>after %{{customdata}} iterations<br>(%{{x:.3g}},"
            " %{y:.3g})<extra></extra>"
        ),
    )


def bars(groups: Sequence[Curve], y_title: str, x_title: str, title: str = "") -> go.Figure:
    """Bars side by side, one colour per group."""
    palette = _Palette(tuple(group.name for group in groups))
    plot = go.Figure()
    for group in groups:
        plot.add_bar(
            x=list(map(on_axis, group.x)),
            y=list(group.y),
            name=label(group.name),
            marker_color=palette[group.name],
        )
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.update_xaxes(title=x_title, type="category")
    plot.update_yaxes(title=y_title, showgrid=True)
    plot.update_layout(showlegend=len(groups) > 1)
    return titled(styled(plot, 420), title)
