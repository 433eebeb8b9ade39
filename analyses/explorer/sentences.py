"""The sentences and the table of answers on the explorer's page."""

from __future__ import annotations

from dash import html
from dash.development.base_component import Component

from loopscope.analyses.explorer.model import Answers, MarginCurve, PatchGrid
from loopscope.analyses.explorer.questions import Query
from loopscope.interp.circuits.faithfulness import Faithfulness
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.drawing.circuits import MOST
from loopscope.interp.drawing.labels import visible

OVERTHINKING = 0.5  # logits below the best margin


def verdict(query: Query, record: MarginCurve, chosen: int, trained: int) -> str:
    """The margins in sentences."""
    source = "the true answer, which the checkpoint's graph or questions tell"
    if not query.known:
        source = (
            f"the model's own top token after {iterations(trained)}, because the true answer of"
            " this text is not known"
        )
    here, best, (says, prob) = (
        float(record.margin[chosen - 1]),
        float(record.margin[record.best - 1]),
        record.top[chosen - 1][0],
    )
    sentence = (
        f"The answer is taken to be {visible(query.answer)}: {source}."
        f" After {iterations(chosen)} the model says "
    )
    sentence += (
        f"{'this' if says == query.answer else visible(says)} (p = {prob:.3f});"
        f" the margin is {here:z.2f} logits. "
    )
    if record.best == chosen:
        return sentence + "No other number of iterations on this page gives a larger one."
    sentence += f"It is largest after {iterations(record.best)}, at {best:z.2f}."
    worse = chosen > record.best and best - here > OVERTHINKING
    return (
        sentence
        + f" The iterations since then took {best - here:z.2f} logits away: overthinking." * worse
    )


def top_table(query: Query, record: MarginCurve, chosen: int) -> Component:
    """The most likely tokens at the readout after each iteration up to the chosen number."""
    count = len(record.top[0])
    named = [f"rank {rank}" for rank in range(count)]
    head = html.Tr([html.Th(text) for text in ("iterations", *named)])
    rows = [
        html.Tr([
            html.Td(f"{r + 1}"),
            *(
                html.Td(
                    f"{visible(token)} {prob:.3f}",
                    className="asked" if token == query.answer else "",
                )
                for token, prob in record.top[r]
            ),
        ])
        for r in range(chosen)
    ]  # fmt: skip
    where = f"Top tokens at {query.columns[query.readout]} after each iteration"
    return html.Details(
        [html.Summary(where), html.Table([html.Thead(head), html.Tbody(rows)])], open=True
    )


def map_caption(grid: PatchGrid, a: Query, b: Query, n_loops: int) -> str:
    """The caption of a patching map."""
    sentence = (
        f"A {a.text} has the margin {grid.margin_a:z.2f} after {iterations(n_loops)}; in B"
        f" {b.text} the same answer "
    )
    sentence += (
        f"{visible(a.answer)} has {grid.margin_b:z.2f}. Each cell puts one residual of B into A."
    )
    if grid.stride > 1:
        sentence += (
            f" To be quick, it shows only loop 0 and every {grid.stride} loops from it;"
            " any cell can be chosen."
        )
    return sentence


def iterations(count: int) -> str:
    """A number of iterations, in words."""
    return f"{count} iteration" + "s" * (count != 1)


def said(before: Answers, after: Answers, query: Query, place: str) -> Component:
    """The answers of A before and after one patch of a residual, side by side."""
    sentence = (
        f"B's residual after {place} put into A: the margin of {visible(query.answer)} goes from"
        f" {before.margin:z.2f} to {after.margin:z.2f} logits."
    )
    return html.Div([html.P(sentence, className="found"), answer_table(before, after, query)])


def answer_table(before: Answers, after: Answers, query: Query) -> Component:
    """The most likely tokens and the margin before and after one patch, side by side."""
    head = html.Tr([html.Th(text) for text in ("rank", "before", "p", "after", "p")])
    rows = []
    for i, (old, new) in enumerate(zip(before.top, after.top, strict=True)):
        cells = [html.Td(f"{i}")]
        for token, prob in (old, new):
            cells += [
                html.Td(visible(token), className="asked" if token == query.answer else ""),
                html.Td(f"{prob:.3f}"),
            ]
        rows.append(html.Tr(cells))
    sizes = [
        html.Td("margin"),
        *(html.Td(f"{run.margin:z.2f} logits", colSpan=2) for run in (before, after)),
    ]
    return html.Table([html.Thead(head), html.Tbody([*rows, html.Tr(sizes)])])


def circuit_caption(circuit: Circuit) -> str:
    """The caption of a circuit of the first edges of the greedy order."""
    count, call = len(circuit), circuit.call
    first = "The first" if count == 1 else f"The first {count}"
    drawn = f" (the {MOST} strongest of them are drawn)" if count > MOST else ""
    where = "by position" if circuit.positions else "over all positions"
    moved = " A dotted line is what a head moves between positions." if circuit.positions else ""
    return (
        f"{first}{drawn} of {circuit.n_possible} edges {where}, taken greedily from the answer"
        f" backwards, by {call.method} in {call.settings['steps']} steps. A's margin is"
        f" {call.clean:z.2f} logits, in B {call.corrupted:z.2f}.{moved}"
    )


def kept_said(found: Faithfulness) -> str:
    """A run with some edges alone, in a sentence."""
    value, whole, replaced = (
        float(values.mean()) for values in (found.values, found.whole, found.replaced)
    )
    these, keep = ("this edge", "it keeps") if found.edges[0] == 1 else ("these edges", "they keep")
    return (
        f"With {these} alone, and all others as in B, the margin is {value:z.2f} logits:"
        f" {keep} {float(found.faithfulness[0]):z.2f} of the way from {replaced:z.2f} (no edge"
        f" kept) to {whole:z.2f} (every edge kept); all others together keep"
        f" {float(found.completeness[0]):z.2f}."
    )


def edge_said(
    edge: Circuit, before: Answers, after: Answers, query: Query, undrawn: Circuit | None = None
) -> str:
    """The estimated and the exact effect of one edge, in a sentence.

    Args:
        edge: A circuit of this one edge.
        undrawn: The circuit that is drawn, where its picture has no line for the edge.
    """
    fall = before.margin - after.margin
    says = [f"{visible(run.top[0][0])} (p = {run.top[0][1]:.3f})" for run in (before, after)]
    return (
        f"This reader is given what the writer adds in B: the margin of {visible(query.answer)}"
        f" goes from {before.margin:z.2f} to {after.margin:z.2f} logits. The exact effect of the"
        f" edge is {fall:z.3f} logits, its score estimates {edge.scores[0]:z.3f}. The model says"
        f" {says[0]} before and {says[1]} after.{_unseen(undrawn)}"
    )


def _unseen(circuit: Circuit | None) -> str:
    """That a picture has no line for an edge, in a sentence; empty where it has one."""
    if circuit is None:
        return ""
    count = len(circuit)
    edges = "edge" if count == 1 else f"{count} edges"
    return f" The picture of the first {edges} has no line for it."
