"""The picture of a circuit: its edges between visits, and the iterations in which the components of
the shared blocks act.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.interp.drawing.circuit_places import EMBED, Spot, axes, curve, moves, spots
from loopscope.interp.drawing.labels import label, spoken
from loopscope.interp.drawing.look import ACCURACY_SCALE, CATEGORIES, FAINT, INK, styled, titled

if TYPE_CHECKING:
    from loopscope.interp.circuits.names import End
    from loopscope.interp.circuits.record import Circuit

MOST = 150
"""Edges that are drawn; of more, those of largest absolute score."""
TOWARDS, AWAY = CATEGORIES[0], CATEGORIES[1]
_WIDTHS = (0.6, 1.2, 2.2, 4.0)


def circuit(record: Circuit, title: str) -> go.Figure:
    """The edges between visits, and beside them the folded view."""
    plot = make_subplots(1, 2, column_widths=[0.72, 0.28], horizontal_spacing=0.13)
    add_unrolled(plot, record, 1, 1)
    add_folded(plot, record, 1, 2)
    return titled(styled(plot, 460).update_layout(showlegend=False), title)


def add_unrolled(
    plot: go.Figure,
    record: Circuit,
    row: int,
    col: int,
    tokens: Sequence[str] = (),
    named: bool = False,
) -> None:
    """Columns are visits, rows are components; in a circuit by position columns are positions, rows
    are visits, and dotted lines are what heads move between positions. Blue edges move the metric
    towards the clean run, orange ones away from it.

    Args:
        tokens: Names of the positions, where they are known.
        named: Whether the lines say on hover which edge they are; its name is then the first entry
            of their points' `customdata`.
    """
    at, place = spots(record), {"row": row, "col": col}
    drawn = [record.edges[number] for number in strongest(record, MOST)]
    shown = record.in_order(record.end(name).node for edge in drawn for name in edge)
    nodes = {node: at[node] for node in shown}
    _add_moves(plot, record, nodes, place)
    for line in _lines(record, at):
        hover = _hover(record, line) if named else {"hoverinfo": "skip"}
        plot.add_scatter(
            x=line.x, y=line.y, mode="lines", line={"color": line.color, "width": line.width},
            opacity=0.75, showlegend=False, **hover, **place,
        )  # fmt: skip
    _add_nodes(plot, record, nodes, place)
    found = axes(record, tokens)
    for update, title, ticks in (
        (plot.update_xaxes, found.column, found.columns),
        (plot.update_yaxes, found.row, found.rows),
    ):
        ends = [min(ticks, default=0.0) - 0.6, max(ticks, default=0.0) + 0.6]
        texts = {"tickvals": list(ticks), "ticktext": [*map(label, ticks.values())], "range": ends}
        update(title=title, **texts, **place)


def _add_nodes(
    plot: go.Figure, record: Circuit, at: Mapping[str, Spot], place: Mapping[str, int]
) -> None:
    """A disc for each node, the larger the more score leaves it."""
    sums = _sums(record)
    most, small = max(sums.values(), default=0.0) or 1.0, 3 if record.positions else 6
    plot.add_scatter(
        x=[spot.x for spot in at.values()],
        y=[spot.y for spot in at.values()],
        mode="markers",
        marker={
            "size": [small + 14 * math.sqrt(sums[node] / most) for node in at],
            "color": INK,
            "line": {"color": "white", "width": 1},
            "opacity": 1,
        },
        customdata=[
            f"{node}<br>{_said(record.end(node))}<br>score {sums[node]:.3g}" for node in at
        ],
        hovertemplate="%{customdata}<extra></extra>",
        showlegend=False,
        **place,
    )


def _add_moves(
    plot: go.Figure, record: Circuit, at: Mapping[str, Spot], place: Mapping[str, int]
) -> None:
    """Dotted lines for what heads move between positions, where both ends are drawn."""
    pairs = [(at[start], at[end]) for start, end in moves(record) if {start, end} <= set(at)]
    if pairs:
        plot.add_scatter(
            x=[x for start, end in pairs for x in (start.x, end.x, None)],
            y=[y for start, end in pairs for y in (start.y, end.y, None)],
            mode="lines", line={"color": FAINT, "width": 1, "dash": "dot"}, hoverinfo="skip",
            showlegend=False, name="moved by a head", **place,
        )  # fmt: skip


def add_folded(plot: go.Figure, record: Circuit, row: int, col: int) -> None:
    """One row for each component of the shared blocks, one column for each iteration: the share of
    the circuit's score that its edges carry out of it there.
    """
    table = folded_scores(record)
    outside = -1 in table.columns
    plot.add_heatmap(
        x=list(table.columns),
        y=list(table.index),
        z=table.to_numpy().tolist(),
        zmin=0,
        colorscale=ACCURACY_SCALE,
        xgap=1,
        ygap=1,
        showscale=False,
        hovertemplate="%{y}<br>loop %{x}<br>share of the score %{z:.3f}<extra></extra>",
        row=row,
        col=col,
    )
    step = 1 + record.n_loops // 12
    shown = [-1] * outside + list(range(0, record.n_loops, step))
    plot.update_xaxes(
        title="loop", tickvals=shown, ticktext=["outside" if x < 0 else str(x) for x in shown],
        row=row, col=col,
    )  # fmt: skip
    plot.update_yaxes(type="category", row=row, col=col)


def folded_scores(record: Circuit) -> pd.DataFrame:
    """The share of the absolute scores that leave each component of the shared blocks in each
    iteration (-1 for what lies outside the loop), components by loops; empty cells are missing.
    """
    frame = record.unrolled()
    frame = frame[frame["writer_component"] != EMBED]
    frame = frame.assign(
        component=[record.folded_name(node) for node in frame["writer"]],
        loop=frame["writer_loop"].fillna(-1).astype(int),
        size=frame["score"].abs() / (frame["score"].abs().sum() or 1.0),
    )
    table = frame.pivot_table(index="component", columns="loop", values="size", aggfunc="sum")
    loops = ([-1] if -1 in table.columns else []) + list(range(record.n_loops))
    return table.reindex(columns=loops)


def strongest(record: Circuit, most: int) -> list[int]:
    """The numbers of the edges of largest absolute score, smallest first."""
    order = sorted(range(len(record)), key=lambda number: abs(record.scores[number]))
    return order[-most:]


def _sums(record: Circuit) -> dict[str, float]:
    """The absolute scores that leave each node; for one that nothing leaves those that enter it."""
    out, into = dict.fromkeys(record.nodes, 0.0), dict.fromkeys(record.nodes, 0.0)
    for edge, score in zip(record.edges, record.scores, strict=True):
        out[edge.writer] += abs(score)
        into[record.end(edge.reader).node] += abs(score)
    return {node: out[node] or into[node] for node in out}


class _Line(NamedTuple):
    """Curved lines of one colour and width together, with gaps between them.

    Attributes:
        x, y: The places of their points.
        edges: The number of each point's edge.
    """

    color: str
    width: float
    x: list[float | None]
    y: list[float | None]
    edges: list[int | None]


def _lines(record: Circuit, at: Mapping[str, Spot]) -> Iterator[_Line]:
    """The lines of the strongest edges, thin ones first."""
    drawn = strongest(record, MOST)
    most = max((abs(record.scores[number]) for number in drawn), default=0.0) or 1.0
    lines: dict[tuple[float, str], _Line] = {}
    for number in drawn:
        score = record.scores[number]
        level = min(len(_WIDTHS) - 1, int(len(_WIDTHS) * math.sqrt(abs(score) / most)))
        width, color = _WIDTHS[level], TOWARDS if score >= 0 else AWAY
        line = lines.setdefault((width, color), _Line(color, width, [], [], []))
        for x, y in curve(record, at, number):
            line.x.append(x)
            line.y.append(y)
            line.edges.append(number)
        for part in (line.x, line.y, line.edges):
            part.append(None)
    for _, line in sorted(lines.items()):
        yield line


def _hover(record: Circuit, line: _Line) -> dict[str, Any]:
    """The name and the score of the edge at each point."""
    named = [
        None if number is None else (record.edges[number].text, record.scores[number])
        for number in line.edges
    ]
    said = "%{customdata[0]}<br>score %{customdata[1]:.3g}<extra></extra>"
    return {"customdata": named, "hovertemplate": said}


def _said(end: End) -> str:
    """A node in a sentence."""
    at = "" if end.position is None else f", position {end.position}"
    return (f"{spoken(end.visit)}, {end.component}" if end.visit else end.component) + at
