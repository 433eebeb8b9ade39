"""The figures, sentences and tables of the explorer's page, each made of a record of `model.py`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import plotly.graph_objects as go
from dash import html
from dash.development.base_component import Component

from loopscope.analyses.common.labels import AXIS, label, spoken, tick
from loopscope.analyses.common.look import ACCURACY_SCALE, FAINT, INK, styled
from loopscope.analyses.explorer.model import (
    SITE,
    Answers,
    LensTable,
    MarginCurve,
    PatchGrid,
    Patterns,
)
from loopscope.analyses.explorer.questions import Query

CHANGE_SCALE = [
    [0.0, "#b2182b"],
    [0.25, "#ef8a62"],
    [0.5, "#f7f7f7"],
    [0.75, "#67a9cf"],
    [1.0, "#2166ac"],
]
ACCENT, WARM = "#0b4f8a", "#c2570c"
PER_ROW = 4  # attention patterns side by side
OVERTHINKING = 0.5  # logits below the best margin


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
    return {
        "title": {"text": title},
        "thickness": 12,
        "outlinewidth": 0,
        "lenmode": "pixels",
        "len": 180,
        "y": 1,
        "yanchor": "top",
    }


def lens_figure(table: LensTable, query: Query, every_block: bool = True) -> Figure:
    """Rows are visits, columns are positions; text is the top token and colour its
    probability.
    """
    rows = range(len(table.blocks)) if every_block else table.closing
    cells = {
        "type": "heatmap",
        "x": _columns(query),
        "y": [tick(table.blocks[row]) for row in rows],
        "z": [table.prob[row, :, 0].tolist() for row in rows],
        "zmin": 0,
        "zmax": 1,
        "colorscale": ACCURACY_SCALE,
        "xgap": 1,
        "ygap": 1,
        "text": [[label(cell[0]) for cell in table.top[row]] for row in rows],
        "texttemplate": "%{text}",
        "textfont": {"size": 11},
        "customdata": [
            [_top_tokens(table, query, row, column) for column in range(len(query.tokens))]
            for row in rows
        ],
        "hovertemplate": "%{customdata}<extra></extra>",
        "colorbar": _bar("probability"),
    }
    read = {
        "x": query.readout,
        "y": 1,
        "yref": "paper",
        "yanchor": "bottom",
        "showarrow": False,
        "text": "answer read here",
    }
    axes: dict[str, Figure] = {
        "xaxis": {
            "title": {"text": "position and its token"},
            "type": "category",
            "tickangle": -30,
        },
        "yaxis": {"title": {"text": AXIS}, "type": "category"},
    }
    margin = {"l": 70, "r": 30, "t": 30, "b": 90}
    return drawn(
        [cells],
        150 + 22 * max(6, len(rows)),
        axes,
        margin=margin,
        annotations=[{**read, "font": {"size": 11, "color": ACCENT}}],
    )


def _top_tokens(table: LensTable, query: Query, row: int, column: int) -> str:
    cell = zip(table.top[row][column], table.prob[row, column].tolist(), strict=True)
    lines = [
        f"{table.blocks[row]}.{SITE}",
        f"after {spoken(table.blocks[row])}, at {query.columns[column]}",
        *(f"{prob:.3f}  {token}" for token, prob in cell),
    ]
    return "<br>".join(map(label, lines))


def margin_figure(record: MarginCurve, chosen: int, trained: int) -> Figure:
    """Margin against iterations; the curve is pale beyond the chosen number, and the best number
    has a star.
    """
    loops = list(range(1, len(record.margin) + 1))
    sizes = record.margin.tolist()
    says = [
        f"says {label(token)}, p = {prob:.3f}"
        for token, prob in zip(record.top, record.prob.tolist(), strict=True)
    ]
    hover = "%{x} iterations: margin %{y:.2f} logits<br>%{customdata}<extra></extra>"
    curve = {"type": "scatter", "mode": "lines+markers", "hovertemplate": hover}
    star = {"symbol": "star", "size": 15, "color": WARM, "line": {"color": "white", "width": 1}}
    traces = [
        {
            **curve,
            "x": loops,
            "y": sizes,
            "customdata": says,
            "line": {"color": FAINT, "width": 1.5},
            "marker": {"size": 5},
        },
        {
            **curve,
            "x": loops[:chosen],
            "y": sizes[:chosen],
            "customdata": says,
            "line": {"color": ACCENT, "width": 2.5},
            "marker": {"size": 6},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": [record.best],
            "y": [sizes[record.best - 1]],
            "hoverinfo": "skip",
            "marker": star,
        },
    ]
    notes = [
        (record.best, sizes[record.best - 1], "y", -24, f"best: {record.best}"),
        (chosen, 1.0, "paper", 0, f"shown: {chosen}"),
    ]
    lines = [(chosen, "solid", INK)]
    if trained != chosen:
        notes.append((trained, 0.0, "paper", 0, f"trained: {trained}"))
        lines.append((trained, "dot", INK))
    common = {
        "showarrow": False,
        "xanchor": "left",
        "yanchor": "bottom",
        "xshift": 3,
        "font": {"size": 11},
    }
    shape = {"type": "line", "y0": 0, "y1": 1, "yref": "paper"}
    axes: dict[str, Figure] = {
        "xaxis": {
            "title": {"text": "iterations"},
            "range": [0.5, len(loops) + 0.5],
            "tickformat": "d",
        },
        "yaxis": {
            "title": {"text": "margin (logits)"},
            "zeroline": True,
            "zerolinecolor": FAINT,
            "showgrid": True,
        },
    }
    return drawn(
        traces,
        300,
        axes,
        showlegend=False,
        margin={"l": 62, "r": 20, "t": 30, "b": 48},
        annotations=[
            {**common, "x": x, "y": y, "yref": ref, "yshift": shift, "text": text}
            for x, y, ref, shift, text in notes
        ],
        shapes=[
            {**shape, "x0": x, "x1": x, "line": {"dash": dash, "color": color, "width": 1}}
            for x, dash, color in lines
        ],
    )


def attention_figure(panels: Patterns, query: Query) -> Figure:
    """Small multiples on one colour scale: rows are the positions that look, columns those that are
    looked at.
    """
    names, count = _columns(query), len(panels.titles)
    across = min(PER_ROW, count)
    down = -(-count // across)
    panel, gap = 17 * max(9, len(names)), 40
    height = down * (panel + gap) + 90
    traces, titles = [], []
    axes: dict[str, Figure] = {}
    for i, (title, pattern) in enumerate(zip(panels.titles, panels.pattern.tolist(), strict=True)):
        row, column, key = i // across, i % across, str(i + 1) if i else ""
        left, top = column / across, 1 - row * (panel + gap) / (height - 130)
        box = [left, left + 0.94 / across], [max(0.0, top - panel / (height - 130)), top]
        lowest = i + across >= count
        axes[f"xaxis{key}"] = _panel_axis(
            box[0], f"y{key}", "to position (key)" if lowest else "", lowest, tickangle=-60
        )
        axes[f"yaxis{key}"] = _panel_axis(
            box[1],
            f"x{key}",
            "" if column else "from position (query)",
            not column,
            autorange="reversed",
        )
        hover = f"{title}<br>from %{{y}}<br>to %{{x}}<br>weight %{{z:.3f}}<extra></extra>"
        cells = {
            "type": "heatmap",
            "x": names,
            "y": names,
            "z": pattern,
            "coloraxis": "coloraxis",
            "xgap": 0.5,
            "ygap": 0.5,
        }
        traces.append({**cells, "xaxis": f"x{key}", "yaxis": f"y{key}", "hovertemplate": hover})
        place = {
            "x": sum(box[0]) / 2,
            "y": top,
            "xref": "paper",
            "yref": "paper",
            "yanchor": "bottom",
            "showarrow": False,
        }
        titles.append({**place, "text": title})
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
    """Rows are visits, columns are positions; colour is the change of the margin of
    A's answer.
    """
    names = [
        f"{i} {x}" if x == y else f"{i} {x} / {y}"
        for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True))
    ]
    reach = max(float(grid.change.abs().max()), 1e-6) if grid.blocks else 1.0
    hover = (
        "B's %{customdata[0]}<br>at %{x}<br>margin %{customdata[1]:.2f}, a change of %{z:.2f}"
        " logits<extra></extra>"
    )
    cells = {
        "type": "heatmap",
        "x": list(map(label, names)),
        "y": list(map(tick, grid.blocks)),
        "z": grid.change.tolist(),
        "zmin": -reach,
        "zmax": reach,
        "colorscale": CHANGE_SCALE,
        "xgap": 1,
        "ygap": 1,
        "texttemplate": "%{z:.1f}",
        "textfont": {"size": 11},
        "customdata": [
            [(f"{block}.{SITE}", size) for size in row]
            for block, row in zip(grid.blocks, grid.margin.tolist(), strict=True)
        ],
        "hovertemplate": hover,
        "colorbar": _bar("change of<br>margin<br>(logits)"),
    }
    axes: dict[str, Figure] = {
        "xaxis": {
            "title": {"text": "position and its token (A / B)"},
            "type": "category",
            "tickangle": -30,
        },
        "yaxis": {"title": {"text": AXIS}, "type": "category"},
    }
    none = {
        "text": "This map would take long: choose every iteration, or one cell.",
        "x": 0.5,
        "y": 0.5,
        "xref": "paper",
        "yref": "paper",
    }
    notes = [] if grid.blocks else [{**none, "showarrow": False}]
    margin = {"l": 70, "r": 30, "t": 20, "b": 100}
    return drawn(
        [cells], 150 + 22 * max(6, len(grid.blocks)), axes, margin=margin, annotations=notes
    )


def cell_mark(blocks: list[str], block: str, position: int) -> list[Figure]:
    """The shape that frames one cell of the patching map; none where the map has no row for it."""
    if block not in blocks:
        return []
    row = blocks.index(block)
    frame = {"x0": position - 0.5, "x1": position + 0.5, "y0": row - 0.5, "y1": row + 0.5}
    return [{"type": "rect", **frame, "line": {"color": INK, "width": 3}}]


# Sentences


def verdict(query: Query, record: MarginCurve, chosen: int, trained: int) -> str:
    """The margins in sentences."""
    source = "the true answer, which the checkpoint's graph or questions tell"
    if not query.known:
        source = (
            f"the model's own top token after {_iterations(trained)}, because the true answer of"
            " this question is not known"
        )
    here, best, says = (
        float(record.margin[chosen - 1]),
        float(record.margin[record.best - 1]),
        record.top[chosen - 1],
    )
    sentence = (
        f"The answer is taken to be {query.answer}: {source}. After {_iterations(chosen)} the model"
        " says "
    )
    sentence += (
        f"{'this' if says == query.answer else says} (p = {float(record.prob[chosen - 1]):.3f});"
        f" the margin is {here:.2f} logits. "
    )
    if record.best == chosen:
        return sentence + "No other number of iterations on this page gives a larger one."
    sentence += f"It is largest after {_iterations(record.best)}, at {best:.2f}."
    worse = chosen > record.best and best - here > OVERTHINKING
    return (
        sentence
        + f" The iterations since then took {best - here:.2f} logits away: overthinking." * worse
    )


def map_caption(grid: PatchGrid, a: Query, b: Query, n_loops: int) -> str:
    """The caption of a patching map."""
    sentence = (
        f"A {a.text} has the margin {grid.margin_a:.2f} after {_iterations(n_loops)}; in B {b.text}"
        " the same answer "
    )
    sentence += f"{a.answer} has {grid.margin_b:.2f}. Each cell puts one residual of B into A."
    if grid.stride > 1:
        sentence += (
            f" To be quick, it shows only loop 0 and every {grid.stride} loops from it;"
            " any cell can be chosen."
        )
    return sentence


def _iterations(count: int) -> str:
    return f"{count} iteration" + "s" * (count != 1)


def said(before: Answers, after: Answers, query: Query, place: str) -> Component:
    """The answers of A before and after one patch, side by side."""
    head = html.Tr([html.Th(text) for text in ("rank", "before", "p", "after", "p")])
    rows = []
    for i, (old, new) in enumerate(zip(before.top, after.top, strict=True)):
        cells = [html.Td(f"{i}")]
        for token, prob in (old, new):
            cells += [
                html.Td(token, className="asked" if token == query.answer else ""),
                html.Td(f"{prob:.3f}"),
            ]
        rows.append(html.Tr(cells))
    sizes = [
        html.Td("margin"),
        *(html.Td(f"{run.margin:.2f} logits", colSpan=2) for run in (before, after)),
    ]
    sentence = (
        f"B's residual after {place} put into A: the margin of {query.answer} goes from"
        f" {before.margin:.2f} to {after.margin:.2f} logits."
    )
    return html.Div(
        [
            html.P(sentence, className="found"),
            html.Table([html.Thead(head), html.Tbody([*rows, html.Tr(sizes)])]),
        ]
    )
