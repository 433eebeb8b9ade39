"""The part of the explorer's page about the circuit between A and B: edges are drawn by score, and
a click on one patches it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dash import Patch, dcc, html, no_update
from dash.development.base_component import Component

from loopscope.analyses.explorer.edges import ScoredEdges, patch_edge, score_edges
from loopscope.analyses.explorer.questions import Query
from loopscope.analyses.explorer.sentences import (
    answer_table,
    circuit_caption,
    edge_said,
    kept_said,
)
from loopscope.analyses.explorer.view import Figure, circuit_figure, edge_mark
from loopscope.analyses.explorer.wiring import Wire
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.drawing.circuits import MOST, strongest

if TYPE_CHECKING:
    from loopscope.analyses.explorer.callbacks import Explorer

REMEMBERED = 4
"""Pairs of questions whose scores are kept."""
WIRES = (
    Wire("show_circuit", "circuit.figure scored.data circuit-wrong.children circuit-said.children"
         " drawn-edges.children of-circuit.className circuit-took.children",
         "circuit-open.open pair.data loops.value edges.value read.value", "edge.value scored.data",
         busy="circuit"),
    Wire("choose_edge", "edge.value circuit.clickData", "circuit.clickData", at_once=False),
    Wire("show_kept", "kept-said.children kept-took.children", "scored.data edges.value",
         busy="kept", at_once=False),
    Wire("show_edge", "edge-said.children edge-wrong.children of-edge.className circuit.figure!"
         " edge-took.children", "edge.value scored.data", "edges.value", busy="edge",
         at_once=False),
)  # fmt: skip


@dataclass(frozen=True)
class CircuitPart:
    """The circuit between the questions A and B of an explorer.

    Attributes:
        explorer: Whose lock is held around every computation.
        known: The scores of the last pairs.
    """

    explorer: Explorer
    known: dict[tuple[str, str, int, int], ScoredEdges] = field(default_factory=dict)

    def scored(self, a: Query, b: Query, n_loops: int) -> ScoredEdges:
        """The scores between two questions, which are computed once."""
        key = a.text, b.text, a.readout, n_loops
        if key not in self.known:
            found = score_edges(self.explorer.subject.model, a, b, n_loops)
            while len(self.known) >= REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[key] = found
        return self.known[key]

    def show_circuit(
        self,
        opened: bool | None,
        pair: dict[str, str] | None,
        n_loops: int | None,
        count: int | None,
        read: int | None = None,
        edge: str | None = None,
        before: dict[str, Any] | None = None,
    ) -> tuple[Any, ...]:
        """The picture, what it is of where that was something else `before`, no refusal, a
        sentence, the edges to choose from, how the part looks, and how long it took; of a circuit
        that cannot be had the sentence that says why. Nothing is computed while the part is closed.
        """
        if not opened or pair is None:
            return *(no_update,) * 6, ""
        asked = {**pair, "read": read, "n_loops": self.explorer.loops(n_loops)}

        def work(loops: int) -> tuple[Figure, str, list[html.Option]]:
            a, b = self.explorer.pair(asked)
            scored = self.scored(a, b, loops)
            circuit = scored.first(count)
            figure = circuit_figure(circuit, a)
            figure["layout"]["shapes"] = edge_mark(circuit, edge or "")
            options = [
                html.Option(value=circuit.edges[i].said, label=f"{circuit.scores[i]:.3g}")
                for i in reversed(strongest(circuit, MOST))
            ]
            return figure, circuit_caption(circuit), options

        try:
            (figure, said, options), took = self.explorer.timed("circuit", n_loops, work)
        except ValueError as error:
            return no_update, None, f"{error}.", no_update, no_update, "stale", ""
        return figure, no_update if asked == before else asked, "", said, options, "", took

    def show_kept(self, asked: dict[str, Any] | None, count: int | None) -> tuple[Any, str]:
        """A sentence about a run with the circuit's edges alone, and how long it took."""
        if asked is None or count is None:
            return no_update, ""

        def work(loops: int) -> str:
            a, b = self.explorer.pair(asked)
            circuit = self.scored(a, b, loops).first(count)
            model = self.explorer.subject.model
            return kept_said(evaluate_circuit(model, a.batch, b.batch, circuit, a.metric))

        try:
            return self.explorer.timed("circuit alone", asked["n_loops"], work)
        except ValueError as error:
            return f"{error}.", ""

    def show_edge(
        self, text: str | None, asked: dict[str, Any] | None, count: int | None
    ) -> tuple[Any, ...]:
        """The exact effect of one edge, no refusal, how it looks, its mark in the picture, and how
        long it took; for a text that names no edge the sentence that says so.
        """
        if asked is None:
            return *(no_update,) * 4, ""
        if not (text or "").strip():
            return "", "", "", marked([]), ""

        def work(loops: int) -> tuple[Component, list[Figure]]:
            a, b = self.explorer.pair(asked)
            scored = self.scored(a, b, loops)
            one = scored.one(str(text))
            before, after = patch_edge(self.explorer.subject.model, a, b, one)
            name = one.edges[0].said
            copied = dcc.Clipboard(content=name, title="copy")
            parts = [
                html.P([html.Code(name), copied], className="named"),
                html.P(edge_said(one, before, after, a), className="found"),
                answer_table(before, after, a),
            ]
            return html.Div(parts), edge_mark(scored.first(count), name)

        try:
            (said, mark), took = self.explorer.timed("edge", asked["n_loops"], work)
        except ValueError as error:
            return no_update, f"{error}.", "stale", marked([]), ""
        return said, "", "", marked(mark), took


def marked(shapes: list[Figure]) -> Patch:
    """The change of a figure to these shapes."""
    change = Patch()
    change["layout"]["shapes"] = shapes
    return change


def choose_edge(click: dict[str, Any] | None) -> tuple[Any, None]:
    """The name of the edge that was clicked, and no click; a click on a node names none."""
    named = click["points"][0].get("customdata") if click else None
    return named[0] if isinstance(named, list) else no_update, None
