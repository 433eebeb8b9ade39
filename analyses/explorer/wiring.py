"""How a page of the explorer is made: the server's page, and callbacks that are written as a
table.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dash import Dash, Input, Output, State, set_props
from dash.development.base_component import Component

from loopscope.analyses.explorer.requests import guard
from loopscope.analyses.report.dark import figures_script

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Wire:
    """One callback of the page; its ends are written "control.property".

    Attributes:
        method: The name of what computes the outputs.
        outputs: Where the results go; with a "!" where another wire writes there too.
        inputs: Whose change calls the method; their values are its arguments.
        states: Further arguments.
        busy: The key of what the status line says meanwhile; empty for nothing.
        at_once: Whether the method is called when the page opens.
    """

    method: str
    outputs: str
    inputs: str
    states: str = ""
    busy: str = ""
    at_once: bool = True


def new_app(name: str, layout: Component) -> Dash:
    """A page for this machine alone.

    Args:
        name: Of the checkpoint.
        layout: The page.
    """
    app = Dash(
        __name__, assets_folder=str(_HERE / "assets"), serve_locally=True, update_title="",
        title=f"loopscope: {name}", index_string=_index(), on_error=_report,
    )  # fmt: skip
    app.layout = layout
    guard(app.server)
    return app


def connect(
    app: Dash,
    wires: Sequence[Wire],
    methods: Mapping[str, Callable[..., Any]],
    busy: Mapping[str, str],
) -> None:
    """Tie the controls of a page to what computes their values.

    Args:
        methods: By the name that the wires give them.
        busy: What the status line says is being computed, by key.
    """
    for wire in wires:
        said = f"computing {busy.get(wire.busy)} …"
        running = [(Output(f"{wire.busy}-busy", "children"), said, "")] if wire.busy else None
        ends = [
            *(_output(end) for end in wire.outputs.split()),
            *(Input(*_end(end)) for end in wire.inputs.split()),
            *(State(*_end(end)) for end in wire.states.split()),
        ]
        call = methods[wire.method]
        app.callback(*ends, running=running, prevent_initial_call=not wire.at_once)(call)


def _index() -> str:
    style = (_HERE.parent / "report" / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head>{%metas%}<title>{%title%}</title><link rel="icon"'
        ' href="data:,">'
        f"<style>{style}</style><script>{figures_script()}</script>{{%css%}}</head><body>{{%app_entry%}}{{%config%}}{{%scripts%}}{{%renderer%}}</body></html>"
    )


def _report(error: Exception) -> None:
    """An error that no check foresaw: one line in the terminal, a sentence on the page."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    line = " ".join(f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})".split())
    print(f"could not be computed: {line}", file=sys.stderr, flush=True)
    set_props("problem", {"children": f"This could not be computed: {error}"})


def _output(end: str) -> Output:
    return Output(*_end(end.removesuffix("!")), allow_duplicate=end.endswith("!"))


def _end(end: str) -> tuple[str, str]:
    """The control and its property in "control.property"."""
    control, _, name = end.partition(".")
    return control, name
