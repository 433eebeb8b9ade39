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
            f"the model's own top token after {_iterations(trained)}, because the true answer of"
            " this text is not known"
        )
    here, best, (says, prob) = (
        float(record.margin[chosen - 1]),
        float(record.margin[record.best - 1]),
        record.top[chosen - 1][0],
    )
    sentence = (
        f"The answer is taken to be {visible(query.answer)}: {source}."
        f" After {_iterations(chosen)} the model says "
    )
    sentence += (
        f"{'this' if says == query.answer else visible(says)} (p = {prob:.3f});"
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
        f"A {a.text} has the margin {grid.margin_a:.2f} after {_iterations(n_loops)}; in B {b.text}"
        " the same answer "
    )
    sentence += (
        f"{visible(a.answer)} has {grid.margin_b:.2f}. Each cell puts one residual of B into A."
    )
    if grid.stride > 1:
        sentence += (
            f" To be quick, it shows only loop 0 and every {grid.stride} loops from it;"
            " any cell can be chosen."
        )
    return sentence


def _iterations(count: int) -> str:
    return f"{count} iteration" + "s" * (count != 1)


def said(before: Answers, after: Answers, query: Query, place: str) -> Component:
    """The answers of A before and after one patch of a residual, side by side."""
    sentence = (
        f"B's residual after {place} put into A: the margin of {visible(query.answer)} goes from"
        f" {before.margin:.2f} to {after.margin:.2f} logits."
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
        *(html.Td(f"{run.margin:.2f} logits", colSpan=2) for run in (before, after)),
    ]
    return html.Table([html.Thead(head), html.Tbody([*rows, html.Tr(sizes)])])


def circuit_caption(circuit: Circuit) -> str:
    """The caption of a circuit of some of the edges."""
    count, call = len(circuit), circuit.call
    where = "by position" if circuit.positions else "over all positions"
    drawn = f" ({MOST} of them are drawn)" if count > MOST else ""
    return (
        f"The {count} strongest{drawn} of {circuit.n_possible} edges {where}, taken from"
        f" the answer backwards, by {call.method} in {call.settings['steps']} steps. A's margin is"
        f" {call.clean:.2f} logits, in B {call.corrupted:.2f}."
    )


def kept_said(found: Faithfulness) -> str:
    """A run with some edges alone, in a sentence."""
    value, whole, replaced = (
        float(values.mean()) for values in (found.values, found.whole, found.replaced)
    )
    return (
        f"With these edges alone, and all others as in B, the margin is {value:.2f} logits:"
        f" they keep {float(found.faithfulness[0]):.2f} of the way from {replaced:.2f} (no edge"
        f" kept) to {whole:.2f} (every edge kept); all others together keep"
        f" {float(found.completeness[0]):.2f}."
    ).replace("-0.00", "0.00")


def edge_said(edge: Circuit, before: Answers, after: Answers, query: Query) -> str:
    """The estimated and the exact effect of one edge, in a sentence.

    Args:
        edge: A circuit of this one edge.
    """
    fall = before.margin - after.margin
    says = [f"{visible(run.top[0][0])} (p = {run.top[0][1]:.3f})" for run in (before, after)]
    return (
        f"This reader is given what the writer adds in B: the margin of {visible(query.answer)}"
        f" goes from {before.margin:.2f} to {after.margin:.2f} logits. The exact effect of the edge"
        f" is {fall:.3f} logits, its score estimates {edge.scores[0]:.3f}. The model says {says[0]}"
        f" before and {says[1]} after."
    )
