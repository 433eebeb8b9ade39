"""The figures of the explorer's page, each made of a record of `model.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.explorer.model import (
    SITE,
    LensTable,
    MarginCurve,
    PatchGrid,
    Patterns,
)
from loopscope.analyses.explorer.questions import Query
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.drawing.circuit_places import axes, curve, spots
from loopscope.interp.drawing.circuits import MOST, add_unrolled, strongest
from loopscope.interp.drawing.labels import AXIS, label, spoken, tick, visible
from loopscope.interp.drawing.look import (
    ACCURACY_SCALE,
    CELL_TEXT,
    FAINT,
    INK,
    MARK,
    SIGNED_SCALE,
    color_bar,
    styled,
)

ACCENT, WARM = "#0b4f8a", MARK
_MARK = {"fillcolor": "rgba(0, 0, 0, 0)", "opacity": 1}
"""A shape of which only the line is seen, whatever the template's shapes are."""
PER_ROW = 4  # attention patterns side by side


Figure = dict[str, Any]


@cache
def _theme() -> tuple[Figure, Figure]:
    """Layout and axis of the project's figures, as plain data: what `styled` gives, which takes too
    long for each answer.
    """
    layout = styled(go.Figure(layout={"xaxis": {}}), 100).to_plotly_json()["layout"]
    axis = layout.pop("xaxis")
    return layout, axis


def drawn(traces: list[Figure], height: int, axes: Mapping[str, Figure], **layout: Any) -> Figure:
    """A figure as plain data, in the project's look.

    Args:
        traces: Plotly traces.
        height: In pixels.
        axes: Settings of each axis, such as "xaxis" or "yaxis3".
        layout: What else the layout says.
    """
    look, axis = _theme()
    return {
        "data": traces,
        "layout": {
            **look,
            "height": height,
            **layout,
            **{name: {**axis, **own} for name, own in axes.items()},
        },
    }


def _columns(query: Query) -> list[str]:
    return [label(name) for name in query.columns]


def _bar(title: str) -> Figure:
    return color_bar(title, lenmode="pixels", len=180, y=1, yanchor="top")


def _cells(**own: Any) -> Figure:
    """A heat map with gaps and small texts."""
    return {"type": "heatmap", "xgap": 1, "ygap": 1, "textfont": CELL_TEXT, **own}


def _rows_of_visits(title: str) -> dict[str, Figure]:
    """The axes of a map whose rows are visits and whose columns are positions."""
    return {
        "xaxis": {"title": {"text": title}, "type": "category", "tickangle": -30},
        "yaxis": {"title": {"text": AXIS}, "type": "category"},
    }


def lens_figure(table: LensTable, query: Query, every_block: bool = True) -> Figure:
    """Rows are visits, columns are positions; text is the top token and colour its probability."""
    rows = range(len(table.blocks)) if every_block else table.closing
    columns = range(len(query.tokens))
    cells = _cells(
        x=_columns(query),
        y=[tick(table.blocks[row]) for row in rows],
        z=[table.prob[row, :, 0].tolist() for row in rows],
        zmin=0,
        zmax=1,
        colorscale=ACCURACY_SCALE,
        text=[[label(visible(cell[0])) for cell in table.top[row]] for row in rows],
        texttemplate="%{text}",
        customdata=[[_top_tokens(table, query, row, column) for column in columns] for row in rows],
        hovertemplate="%{customdata}<extra></extra>",
        colorbar=_bar("probability"),
    )
    place = {"x": query.readout, "y": 1, "yref": "paper", "yanchor": "bottom"}
    font = {"size": 11, "color": ACCENT}
    read = {"text": "answer read here", "showarrow": False, "font": font, **place}
    return drawn(
        [cells],
        150 + 22 * max(6, len(rows)),
        _rows_of_visits("position and its token"),
        margin={"l": 70, "r": 30, "t": 30, "b": 90},
        annotations=[read],
    )


def _top_tokens(table: LensTable, query: Query, row: int, column: int) -> str:
    cell = zip(table.top[row][column], table.prob[row, column].tolist(), strict=True)
    lines = [
        f"{table.blocks[row]}.{SITE}",
        f"after {spoken(table.blocks[row])}, at {query.columns[column]}",
        *(f"{prob:.3f}  {visible(token)}" for token, prob in cell),
    ]
    return "<br>".join(map(label, lines))


def margin_figure(record: MarginCurve, chosen: int, trained: int) -> Figure:
    """Margin against iterations; the curve is pale beyond the chosen number, and the best number
    has a star.
    """
    count = len(record.margin)
    iterations = {"title": {"text": "iterations"}, "range": [0.5, count + 0.5], "tickformat": "d"}
    logits = {"title": {"text": "margin (logits)"}, "zeroline": True, "zerolinecolor": FAINT}
    best = float(record.margin[record.best - 1])
    notes = [
        (record.best, best, "y", -24, f"best: {record.best}"),
        (chosen, 1.0, "paper", 0, f"shown: {chosen}"),
    ]
    lines = [(chosen, "solid")]
    if trained != chosen:
        notes.append((trained, 0.0, "paper", 0, f"trained: {trained}"))
        lines.append((trained, "dot"))
    return drawn(
        _margin_traces(record, chosen),
        300,
        {"xaxis": iterations, "yaxis": {**logits, "showgrid": True}},
        showlegend=False,
        margin={"l": 62, "r": 20, "t": 30, "b": 48},
        annotations=[_margin_note(*each, inward=each[0] > count / 2) for each in notes],
        shapes=[_margin_line(*each) for each in lines],
    )


def _margin_traces(record: MarginCurve, chosen: int) -> list[Figure]:
    """The whole curve in pale, its part up to the chosen number, and a star at the best one."""
    loops, sizes = list(range(1, len(record.margin) + 1)), record.margin.tolist()
    says = [f"says {label(visible(row[0][0]))}, p = {row[0][1]:.3f}" for row in record.top]
    hover = "%{x} iterations: margin %{y:.2f} logits<br>%{customdata}<extra></extra>"
    curve = {"type": "scatter", "mode": "lines+markers", "hovertemplate": hover, "customdata": says}
    pale = {"line": {"color": FAINT, "width": 1.5}, "marker": {"size": 5}}
    strong = {"line": {"color": ACCENT, "width": 2.5}, "marker": {"size": 6}}
    star = {"symbol": "star", "size": 15, "color": WARM, "line": {"color": "white", "width": 1}}
    best = {"x": [record.best], "y": [sizes[record.best - 1]], "marker": star}
    return [
        {**curve, **pale, "x": loops, "y": sizes},
        {**curve, **strong, "x": loops[:chosen], "y": sizes[:chosen]},
        {"type": "scatter", "mode": "markers", "hoverinfo": "skip", **best},
    ]


def _margin_note(x: int, y: float, yref: str, shift: int, text: str, inward: bool) -> Figure:
    """A note beside a number of iterations; `inward` puts it on the left, away from the border."""
    side, aside = ("right", -3) if inward else ("left", 3)
    place = {"x": x, "y": y, "yref": yref, "yshift": shift, "xshift": aside}
    look = {"showarrow": False, "xanchor": side, "yanchor": "bottom", "font": {"size": 11}}
    return {"text": text, **place, **look}


def _margin_line(x: int, dash: str) -> Figure:
    line = {"dash": dash, "color": INK, "width": 1}
    return {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line}


def attention_figure(panels: Patterns, query: Query) -> Figure:
    """Small multiples on one colour scale: rows are the positions that look, columns those that are
    looked at.
    """
    names, count = _columns(query), len(panels.titles)
    across = min(PER_ROW, count)
    panel, gap = 17 * max(9, len(names)), 40
    height = -(-count // across) * (panel + gap) + 90
    traces, titles = [], []
    axes: dict[str, Figure] = {}
    for i, (title, pattern) in enumerate(zip(panels.titles, panels.pattern.tolist(), strict=True)):
        row, column, key = i // across, i % across, str(i + 1) if i else ""
        left, top = column / across, 1 - row * (panel + gap) / (height - 130)
        wide, high = [left, left + 0.94 / across], [max(0.0, top - panel / (height - 130)), top]
        lowest = i + across >= count
        to, by = "to position (key)" * lowest, "from position (query)" * (not column)
        axes[f"xaxis{key}"] = _panel_axis(wide, f"y{key}", to, lowest, tickangle=-60)
        axes[f"yaxis{key}"] = _panel_axis(high, f"x{key}", by, not column, autorange="reversed")
        hover = f"{title}<br>from %{{y}}<br>to %{{x}}<br>weight %{{z:.3f}}<extra></extra>"
        look = {"type": "heatmap", "coloraxis": "coloraxis", "xgap": 0.5, "ygap": 0.5}
        ends = {"xaxis": f"x{key}", "yaxis": f"y{key}", "hovertemplate": hover}
        traces.append({**look, **ends, "x": names, "y": names, "z": pattern})
        place = {"x": sum(wide) / 2, "y": top, "xref": "paper", "yref": "paper"}
        titles.append({**place, "yanchor": "bottom", "showarrow": False, "text": title})
    scale = {"colorscale": ACCURACY_SCALE, "cmin": 0, "cmax": 1, "colorbar": _bar("weight")}
    return drawn(
        traces,
        height,
        axes,
        annotations=titles,
        coloraxis=scale,
        margin={"l": 86, "r": 30, "t": 34, "b": 96},
    )


def _panel_axis(domain: list[float], anchor: str, title: str, labelled: bool, **own: Any) -> Figure:
    text = {
        "title": {"text": title, "font": {"size": 12}},
        "tickfont": {"size": 10},
        "showticklabels": labelled,
    }
    return {"domain": domain, "anchor": anchor, "type": "category", **text, **own}


def patch_figure(grid: PatchGrid, a: Query, b: Query) -> Figure:
    """Rows are visits, columns are positions; colour is the change of the margin of A's answer."""
    both = map(visible, a.tokens), map(visible, b.tokens)
    pairs = enumerate(zip(*both, strict=True))
    names = [f"{i} {x}" if x == y else f"{i} {x} / {y}" for i, (x, y) in pairs]
    reach = max(float(grid.change.abs().max()), 1e-6) if grid.blocks else 1.0
    rows = zip(grid.blocks, grid.margin.tolist(), strict=True)
    cells = _cells(
        x=list(map(label, names)),
        y=list(map(tick, grid.blocks)),
        z=grid.change.tolist(),
        zmin=-reach,
        zmax=reach,
        colorscale=SIGNED_SCALE,
        texttemplate="%{z:.1f}",
        customdata=[[(f"{block}.{SITE}", size) for size in row] for block, row in rows],
        hovertemplate="B's %{customdata[0]}<br>at %{x}<br>margin %{customdata[1]:.2f}, a change of"
        " %{z:.2f} logits<extra></extra>",
        colorbar=_bar("change of<br>margin<br>(logits)"),
    )
    none = {"text": "This map would take long: choose every iteration, or one cell."}
    place = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper", "showarrow": False}
    return drawn(
        [cells],
        150 + 22 * max(6, len(grid.blocks)),
        _rows_of_visits("position and its token (A / B)"),
        margin={"l": 70, "r": 30, "t": 20, "b": 100},
        annotations=[] if grid.blocks else [{**none, **place}],
    )


def cell_mark(blocks: list[str], block: str, position: int) -> list[Figure]:
    """The shape that frames one cell of the patching map; none where the map has no row for it."""
    if block not in blocks:
        return []
    row = blocks.index(block)
    frame = {"x0": position - 0.5, "x1": position + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    return [{"type": "rect", **frame, **_MARK, "line": {"color": INK, "width": 3}}]


def circuit_figure(drawn: Circuit, query: Query) -> Figure:
    """The edges of a circuit, each with its name on hover."""
    plot = make_subplots(1, 1)
    add_unrolled(plot, drawn, 1, 1, query.tokens, named=True)
    rows = len(axes(drawn, query.tokens).rows)
    styled(plot, 150 + (30 if drawn.positions else 60) * max(8 if drawn.positions else 4, rows))
    plot.update_layout(hovermode="closest", hoverdistance=30, margin={"t": 20})
    figure: Figure = plot.to_plotly_json()
    return figure


def edge_mark(circuit: Circuit, edge: Edge) -> list[Figure]:
    """The shape that marks one edge in the picture of a circuit; none where the picture has no line
    for it.
    """
    number = next((i for i in strongest(circuit, MOST) if circuit.edges[i] == edge), None)
    if number is None:
        return []
    points = curve(circuit, spots(circuit), number)
    path = "M" + " L".join(f"{x:.4f},{y:.4f}" for x, y in points)
    return [{"type": "path", "path": path, **_MARK, "line": {"color": INK, "width": 5}}]
