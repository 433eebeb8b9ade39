"""Where everything stands on the explorer's page, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from dash import dcc, html
from dash.development.base_component import Component

from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.controls import (
    button,
    control,
    counted,
    graph,
    heading,
    radio,
    section,
    slider,
    status,
    typed,
)
from loopscope.analyses.explorer.model import blocks_per_loop
from loopscope.analyses.explorer.questions import MAX_TOKENS, hint
from loopscope.interp.drawing.labels import AXIS

EDGES = 100  # of the circuit at first
BUSY = {
    "lens": "the lens",
    "margin": "the margins",
    "attention": "the attention patterns",
    "map": "the patching map",
    "cell": "the patch",
    "circuit": "the scores of the edges",
    "kept": "the circuit alone",
    "edge": "the patch of the edge",
    "feature": "the feature",
}


def page(
    subject: Subject,
    trained: int,
    start: int,
    most: int,
    texts: tuple[str, str],
    more: Sequence[Component] = (),
) -> Component:
    """The whole page.

    Args:
        texts: Texts A and B to start with.
        trained: Iterations of the checkpoint.
        start: Iterations to start with.
        most: The end of the slider.
        more: Further sections.
    """
    cfg = subject.model.cfg
    facts = (
        f"{cfg.family.replace('_', '-')}, {cfg.n_layers} blocks, {cfg.n_heads} heads, width"
        f" {cfg.d_model}, {trained} iterations"
    )
    loops = slider("loops", start, most, (1, *range(trained, most + 1, trained)))
    stores = [dcc.Store(id=name) for name in ("asked", "pair", "shown", "scored")]
    sections = [
        _ask_section(subject, loops, texts[0]),
        _lens_section(),
        _attention_section(subject, start),
    ]
    of_pair = html.Div([_patch_section(subject, texts[1]), _circuit_section()], id="of-pair")
    return html.Div(
        [
            heading(subject, "A looped transformer", facts),
            html.Main([*stores, html.Div(sections, id="of-a"), of_pair, *more]),
            status(BUSY),
        ]
    )


def _ask_section(subject: Subject, loops: Component, text: str) -> Component:
    word = "Question" if subject.questions else "Text"
    asked = [typed("a", f"{word} A", text), *_choices(subject)]
    read = dcc.Dropdown([], None, id="read", searchable=False, placeholder="as the checkpoint says")
    known = f"Tokens: {hint(subject)}; at" if subject.questions else "At"
    note = f"{known} most {MAX_TOKENS} tokens. Press Enter, or leave the field."
    left = [
        html.Div(asked, className="controls"),
        html.P(note, className="hint"),
        html.P(id="a-wrong", className="wrong", role="alert"),
        html.Div([control("read", "Answer read at", read)], className="controls"),
        control("loops", "Number of iterations", loops),
        html.P(id="verdict", className="found"),
    ]
    title = f"{word}, and its margin over iterations"
    sides = [html.Div(left), graph("margin", 290)]
    return section(
        "question", title, [html.Div(sides, className="two"), html.Div(id="tops", className="said")]
    )


def _choices(subject: Subject) -> list[Component]:
    """The controls that choose among the checkpoint's questions; none without questions."""
    if not subject.questions:
        return []
    hops = dcc.Dropdown(
        list(subject.questions), subject.example().hops, id="hops", clearable=False,
        searchable=False,
    )  # fmt: skip
    return [control("hops", "Hops", hops), button("next-a", "Another question")]


def _lens_section() -> Component:
    choices = {"blocks": "after every block", "iterations": "after every iteration"}
    text = (
        "What the model would answer at every position, read through its own final norm and head;"
        " colour is the probability of the top token. Hover for the top five."
    )
    return section(
        "lens-section",
        "Logit lens",
        [html.P(text), radio("rows", "Rows", choices), graph("lens", 500)],
    )


def _attention_section(subject: Subject, start: int) -> Component:
    views = {"heads": "all heads of one loop", "loops": "all loops of one head"}
    pickers = [
        radio("view", "Show", views),
        control("loop", "Loop", slider("loop", 0, start - 1, least=0), wide=True),
        control("layer", "Block", counted("layer", blocks_per_loop(subject.model))),
        control("head", "Head", counted("head", subject.model.cfg.n_heads)),
    ]
    text = (
        "Each row is a position that looks, each column one that is looked at; a row sums to one."
    )
    return section(
        "attention-section",
        "Attention patterns",
        [html.P(text), html.Div(pickers, className="controls"), graph("attention", 400)],
    )


def _patch_section(subject: Subject, text: str) -> Component:
    word = "Question" if subject.questions else "Text"
    asked = html.Div(
        [
            typed("b", f"{word} B, with as many tokens as A", text),
            *([button("next-b", "Another B")] if subject.questions else []),
        ],
        className="controls",
    )
    names = {"block": f"After block ({AXIS})", "position": "At position"}
    pickers = [
        control(key, name, dcc.Dropdown([], None, id=key, searchable=False))
        for key, name in names.items()
    ]
    extent = {"quick": "as many loops as are quick", "all": "every loop"}
    cell = html.Div(
        [html.Div(pickers, className="controls"), html.Div(id="said", className="said")]
    )
    parts = [
        asked,
        html.P(id="b-wrong", className="wrong", role="alert"),
        radio("extent", "Map", extent),
        html.P(id="map-caption"),
        html.Div([graph("map", 500), cell], className="two map"),
    ]
    return section("patch-section", "Patching B into A", parts)


def _circuit_section() -> Component:
    """The circuit between A and B, which is computed when it is opened."""
    text = (
        "A line is what one component writes, as one later component reads it; blue keeps A's"
        " answer, orange works against it. Click a line to give that reader alone what the writer"
        " adds in B."
    )
    edge = dcc.Input(
        id="edge", type="text", value="", debounce=True, spellCheck=False, autoComplete="off",
        list="drawn-edges", placeholder="writer → reader",
    )  # fmt: skip
    number = dcc.Input(id="edges", type="number", value=EDGES, min=1, step=1, debounce=True)
    pickers = [
        control("edges", "Edges of the circuit", number),
        html.Div(
            [html.Label("Edge: click, choose or type it", htmlFor="edge"), edge],
            className="control wide typed edge",
        ),
    ]
    parts = [
        html.Summary("Score every edge, and draw a circuit of the first ones"),
        html.P(text),
        html.Div(pickers, className="controls"),
        html.Datalist(id="drawn-edges"),
        html.P(id="circuit-wrong", className="wrong", role="alert"),
        html.P(id="edge-wrong", className="wrong", role="alert"),
        html.Div(
            [
                html.P(id="circuit-said"),
                html.P(id="kept-said"),
                graph("circuit", 400),
            ],
            id="of-circuit",
        ),
        html.Div(html.Div(id="edge-said", className="said", role="status"), id="of-edge"),
    ]
    opened = html.Details(parts, id="circuit-open", open=False)
    return section("circuit-section", "The circuit that tells A from B", [opened])
