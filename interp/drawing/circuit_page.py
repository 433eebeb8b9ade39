"""A circuit as a page to act on: a threshold, the unrolled and the folded view, names to copy."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopscope.interp.drawing.circuits import EMBED, FINAL, components, spots
from loopscope.interp.drawing.labels import tick

if TYPE_CHECKING:
    from loopscope.interp.circuits.record import Circuit

_FOLDER = Path(__file__).parent
_STYLE, _SCRIPT = (
    (_FOLDER / name).read_text(encoding="utf-8") for name in ("circuit_page.css", "circuit_page.js")
)


def circuit_page(circuit: Circuit, title: str, lead: str = "") -> str:
    """One HTML page that fetches nothing.

    Args:
        circuit: The circuit.
        title: The heading, such as the checkpoint's name.
        lead: What is said below it.
    """
    data = json.dumps(_data(circuit), separators=(",", ":")).replace("<", "\\u003c")
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


def _data(circuit: Circuit) -> dict[str, Any]:
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
        column = {EMBED: -1.0, FINAL: float(len(blocks))}.get(node)
        if visit is not None:
            column = blocks.index(visit.block) + (spot.x - int(spot.x))
        nodes.append(
            {
                "name": node,
                "folded": circuit.folded_name(node),
                "loop": None if visit is None else visit.loop,
                "unrolled_at": [spot.x, spot.y],
                "folded_at": [column, spot.y if visit is not None else middle],
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
    ticks = {"unrolled": [tick(place.name) for place in circuit.schedule], "folded": blocks}
    return {"nodes": nodes, "edges": edges, "rows": rows, "ticks": ticks}
