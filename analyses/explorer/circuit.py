"""The part of the explorer's page about the circuit between A and B: edges are drawn by score, and
a click on one patches it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dash import Patch, html, no_update
from dash.development.base_component import Component

from loopscope.analyses.explorer.controls import copy_button
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
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.record import Circuit
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


@dataclass
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
        """The circuit of the first edges. Nothing is computed while the part is closed.

        Args:
            opened: Whether the part is open.
            pair: The texts A and B; None before they can be asked.
            n_loops: Iterations.
            count: How many edges the circuit has.
            read: The column where the answer is read.
            edge: The chosen edge's name, which is marked.
            before: The question whose scores the page shows.

        Returns:
            figure: The picture.
            scored: The question whose scores are known; None where they cannot be had.
            wrong: A sentence that says why there is no such circuit; else empty.
            said: The caption.
            options: The edges to choose from.
            look: "stale" while the picture is an older one.
            took: How long it took.
        """
        if not opened or pair is None:
            return *(no_update,) * 6, ""
        asked = {**pair, "read": read, "n_loops": self.explorer.loops(n_loops)}
        known: Any = None

        def work(loops: int) -> tuple[Query, ScoredEdges]:
            a, b = self.explorer.pair(asked)
            return a, self.scored(a, b, loops)

        try:
            (a, scored), took = self.explorer.timed("circuit", n_loops, work)
            known = no_update if asked == before else asked
            circuit = scored.first(count)
        except ValueError as error:
            return no_update, known, f"{error}.", no_update, no_update, "stale", ""
        figure = circuit_figure(circuit, a)
        figure["layout"]["shapes"] = mark_of(circuit, edge)
        options = [
            html.Option(value=circuit.edges[i].text, label=f"{circuit.scores[i]:.3g}")
            for i in reversed(strongest(circuit, MOST))
        ]
        return figure, known, "", circuit_caption(circuit), options, "", took

    def show_kept(self, asked: dict[str, Any] | None, count: int | None) -> tuple[Any, str]:
        """A sentence about a run with the circuit's edges alone, and how long it took; the old one
        stays where there is no such circuit, of which `show_circuit` says why.
        """
        if asked is None:
            return no_update, ""

        def work(loops: int) -> Any:
            a, b = self.explorer.pair(asked)
            scored = self.scored(a, b, loops)
            if not scored.has(count):
                return no_update
            circuit, model = scored.first(count), self.explorer.subject.model
            return kept_said(evaluate_circuit(model, a.batch, b.batch, circuit, a.metric))

        try:
            said, took = self.explorer.timed("circuit alone", asked["n_loops"], work)
        except ValueError as error:
            return f"{error}.", ""
        return said, "" if said is no_update else took

    def show_edge(
        self, text: str | None, asked: dict[str, Any] | None, count: int | None
    ) -> tuple[Any, ...]:
        """The exact effect of one edge, no refusal, how it looks, its mark in the picture, and how
        long it took; for a text that names no edge the sentence that says so.

        Args:
            text: The edge's name.
            asked: The question whose scores are known; None while there is none.
            count: How many edges the picture's circuit has; where there is no such circuit the edge
                is patched and not marked.
        """
        if asked is None:
            return no_update, no_update, "stale", no_update, ""
        if not (text or "").strip():
            return "", "", "", marked([]), ""

        def work(loops: int) -> tuple[Component, list[Figure]]:
            a, b = self.explorer.pair(asked)
            scored = self.scored(a, b, loops)
            one = scored.one(str(text))
            before, after = patch_edge(self.explorer.subject.model, a, b, one)
            edge, shown = one.edges[0], scored.first(count) if scored.has(count) else None
            mark = edge_mark(shown, edge) if shown else []
            undrawn = shown if shown and not mark else None
            parts = [
                html.P([html.Code(edge.text), copy_button(edge.text)], className="named"),
                html.P(edge_said(one, before, after, a, undrawn), className="found"),
                answer_table(before, after, a),
            ]
            return html.Div(parts), mark

        try:
            (said, mark), took = self.explorer.timed("edge", asked["n_loops"], work)
        except ValueError as error:
            return no_update, f"{error}.", "stale", marked([]), ""
        return said, "", "", marked(mark), took


def mark_of(circuit: Circuit, text: str | None) -> list[Figure]:
    """The shape that marks the edge that a text names; none where it names none."""
    try:
        return edge_mark(circuit, Edge.from_text(text or ""))
    except ValueError:
        return []


def marked(shapes: list[Figure]) -> Patch:
    """The change of a figure to these shapes."""
    change = Patch()
    change["layout"]["shapes"] = shapes
    return change


def choose_edge(click: dict[str, Any] | None) -> tuple[Any, None]:
    """The name of the edge that was clicked, and no click; a click on a node names none."""
    named = click["points"][0].get("customdata") if click else None
    return named[0] if isinstance(named, list) else no_update, None
