"""The controls and the parts that the explorer's pages are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from loopscope.analyses.common.records import FIGURE_CONFIG
from loopscope.analyses.common.subject import Subject


def heading(subject: Subject, otherwise: str, facts: str) -> Component:
    """The head of a page: the checkpoint's name, its task and its sizes.

    Args:
        otherwise: The task in words, where the checkpoint's card has none.
    """
    task = str(subject.card.get("task", otherwise)).rstrip(".")
    lines = [
        html.P("loopscope explore", className="brand"),
        html.H1(subject.name),
        html.P(f"{task}; {facts}", className="lead"),
    ]
    return html.Header(lines)


def status(busy: Iterable[str]) -> Component:
    """The line at the foot of the page: what is being computed, and how long each part took.

    Args:
        busy: The keys of the parts.
    """
    parts: list[Component] = [html.Span(id="problem", className="problem")]
    for name in busy:
        parts += [html.Span(id=f"{name}-busy", className="busy"), html.Span(id=f"{name}-took")]
    return html.P(parts, className="status", id="status", role="status")


def section(key: str, title: str, parts: list[Component]) -> Component:
    """A part of the page under its title."""
    return html.Section([html.H2(title), *parts], id=key)


def control(key: str, name: str, control: Component, wide: bool = False) -> Component:
    """A control under its name, which is also what a screen reader says of it."""
    named: dict[str, Any] = {"role": "group", "aria-labelledby": f"{key}-name"}
    return html.Div(
        [html.Span(name, className="name", id=f"{key}-name"), control],
        className="control wide" if wide else "control",
        **named,
    )


def typed(key: str, name: str, text: str) -> Component:
    """A field for a text, under its name."""
    field = dcc.Input(
        id=key, value=text, type="text", debounce=True, spellCheck=False, autoComplete="off"
    )
    return html.Div([html.Label(name, htmlFor=key), field], className="control wide typed")


def radio(key: str, name: str, choices: dict[str, str]) -> Component:
    """Choices of which the first one is taken."""
    options = [{"value": value, "label": label} for value, label in choices.items()]
    return html.Fieldset(
        [html.Legend(name), dcc.RadioItems(options, next(iter(choices)), id=key, inline=True)],
        className="control",
    )


def slider(
    key: str, value: int, most: int, marks: tuple[int, ...] = (), least: int = 1
) -> Component:
    """A slider over whole numbers; the arrow keys move it too."""
    named = {loop: str(loop) for loop in marks} or None
    return dcc.Slider(
        least,
        most,
        1,
        value=value,
        marks=named,
        tooltip={"placement": "top"},
        allow_direct_input=False,
        id=key,
    )


def counted(key: str, count: int) -> Component:
    """A list of the numbers below `count`."""
    return dcc.Dropdown(
        [{"value": i, "label": f"{i}"} for i in range(count)],
        0,
        id=key,
        clearable=False,
        searchable=False,
    )


def button(key: str, text: str) -> Component:
    """A button."""
    return html.Button(text, id=key, className="do", type="button")


def copy_button(text: str) -> Component:
    """A button that copies a text; a script of the page does it, and says so on the button."""
    content: Any = {"data-copy": text}
    return html.Button("copy", className="do copy", type="button", **content)


def blank(height: int) -> dict[str, Any]:
    """An empty figure of a height in pixels."""
    hidden, white = {"visible": False}, {"paper_bgcolor": "white", "plot_bgcolor": "white"}
    return {"data": [], "layout": {"height": height, "xaxis": hidden, "yaxis": hidden, **white}}


def graph(key: str, height: int) -> Component:
    """The place of a figure that is still empty, as high as the figure will be."""
    config: Any = {
        **FIGURE_CONFIG,
        "responsive": False,
        "modeBarButtons": [["toImage"]],
        "displayModeBar": "hover",
    }
    return html.Div(dcc.Graph(id=key, figure=blank(height), config=config), className="figure")
