"""A circuit as a page to act on: a threshold, the unrolled and the folded view, names to copy."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.interp.drawing.circuit_places import EMBED, FINAL, axes, components, moves, spots

if TYPE_CHECKING:
    from loopscope.interp.circuits.record import Circuit

_FOLDER = Path(__file__).parent
_STYLE, _SCRIPT = (
    (_FOLDER / name).read_text(encoding="utf-8") for name in ("circuit_page.css", "circuit_page.js")
)


def circuit_page(circuit: Circuit, title: str, lead: str = "", tokens: Sequence[str] = ()) -> str:
    """One HTML page that fetches nothing.

    Args:
        circuit: The circuit.
        title: The heading, such as the checkpoint's name.
        lead: What is said below it.
        tokens: Names of the positions of a circuit by position, where they are known.
    """
    data = json.dumps(_data(circuit, tokens), separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>loopscope: circuit of {html.escape(title)}</title><link rel="icon" href="data:,">
<style>{_STYLE}</style></head>
<body><header><p class=brand>loopscope circuit</p><h1>{html.escape(title)}</h1>
<p class=lead>{html.escape(lead)}</p></header>
<main><div class=controls>
<div role=group aria-label="View"><button id=unrolled aria-pressed=true>unrolled</button><button
 id=folded aria-pressed=false>folded</button></div>
<label>threshold <input type=range id=threshold min=0 max=100 step=any></label>
<output id=shown for=threshold></output></div>
<div class=view><svg id=graph role=img aria-label="The circuit"></svg></div>
<p class=key><i class=towards></i>towards the clean run <i class=away></i>away from it
<span id=hint></span></p>
<div class=named><code id=name>Click a node or an edge for its names.</code><button id=copy
 disabled>copy</button></div><div id=tip hidden></div></main>
<script type="application/json" id=data>{data}</script><script>{_SCRIPT}</script></body></html>
"""


def _data(circuit: Circuit, tokens: Sequence[str]) -> dict[str, Any]:
    """Everything that the page draws: nodes with their places in both views, and edges by the
    numbers of their nodes, strongest first.
    """
    places, rows = spots(circuit), components(circuit)
    blocks = list(dict.fromkeys(place.block for place in circuit.schedule))
    schedule = {place.name: place for place in circuit.schedule}
    middle = (len(rows) - 1) / 2
    nodes = []
    for node, spot in places.items():
        end = circuit.end(node)
        visit = schedule.get(end.visit)
        column = {EMBED: -1.0, FINAL: float(len(blocks))}.get(end.component)
        if visit is not None:
            column = blocks.index(visit.block) + 0.3 * (end.component == "mlp")
        nodes.append(
            {
                "name": node,
                "folded": circuit.folded_name(node),
                "loop": None if visit is None else visit.loop,
                "unrolled_at": [spot.x, spot.y],
                "folded_at": [column, rows.index(end.component) if visit else middle],
            }
        )
    number = {node: index for index, node in enumerate(places)}
    order = sorted(range(len(circuit)), key=lambda index: -abs(circuit.scores[index]))
    edges = [
        [number[edge.writer], number[end.node], end.input, circuit.scores[index]]
        for index in order
        for edge in [circuit.edges[index]]
        for end in [circuit.end(edge.reader)]
    ]
    named = axes(circuit, tokens)
    columns = {float(at - 1): name for at, name in enumerate(["embed", *blocks, "final"])}
    views = {
        "unrolled": _view(
            named.columns, named.rows, *((132, 52) if circuit.positions else (76, 74))
        ),
        "folded": _view(columns, dict(enumerate(rows)), 198, 74),
    }
    moved = [[number[start], number[end]] for start, end in moves(circuit)]
    return {"nodes": nodes, "edges": edges, "moves": moved, "views": views}


def _view(
    columns: Mapping[float, str], rows: Mapping[float, str], width: int, height: int
) -> dict[str, Any]:
    """The ticks of a view, and its pixels per column and per row."""
    ticks = {"columns": list(columns.items()), "rows": list(rows.items())}
    return {**ticks, "width": width, "height": height}
