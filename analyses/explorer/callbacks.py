"""The callbacks of the page on which texts are asked: lens, margins, attention and patches."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dash import Dash, Patch, ctx, html, no_update

from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.circuit import WIRES as CIRCUIT_WIRES
from loopscope.analyses.explorer.circuit import CircuitPart, choose_edge
from loopscope.analyses.explorer.features import WIRES as FEATURE_WIRES
from loopscope.analyses.explorer.features import FeaturePart
from loopscope.analyses.explorer.model import (
    SWEEP_BUDGET,
    PatchGrid,
    heads_of,
    lens_table,
    loops_of,
    margins,
    patch_cell,
    patch_grid,
)
from loopscope.analyses.explorer.page import BUSY, page
from loopscope.analyses.explorer.questions import (
    Query,
    ask,
    ask_beside,
    contrast,
)
from loopscope.analyses.explorer.sentences import map_caption, said, top_table, verdict
from loopscope.analyses.explorer.view import (
    Figure,
    attention_figure,
    cell_mark,
    lens_figure,
    margin_figure,
    patch_figure,
)
from loopscope.analyses.explorer.wiring import Wire, connect, new_app
from loopscope.interp.drawing.labels import spoken, tick

STALE = "stale"
REACH = 3  # the slider goes to so many times the trained number of iterations
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Explorer:
    """The page's callbacks for one checkpoint.

    Attributes:
        subject: The checkpoint.
        trained: Its number of iterations, with which others are compared.
        start: The number of iterations that the page starts with.
        lock: Held around every computation, because hooks live on the model.
    """

    subject: Subject
    trained: int
    start: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def most(self) -> int:
        """The most iterations that the page shows."""
        return max(REACH * self.trained, self.start)

    def suggest(
        self, next_a: int | None, hops: int, next_b: int | None, a_text: str | None
    ) -> tuple[Any, Any]:
        """Texts for A and B: another question of the chosen hops with a B for it, or another B for
        the present A.
        """
        if ctx.triggered_id == "next-b":
            return no_update, contrast(self.subject, a_text or "", next_b or 0)
        group = self.subject.questions[hops]
        chosen = group[(next_a or 0) % len(group)].text
        return chosen, contrast(self.subject, chosen)

    def check(
        self, a_text: str | None, b_text: str | None, asked: str | None
    ) -> tuple[Any, Any, str, Any, str, str, str]:
        """A and the pair where they can be asked; a sentence for what is wrong with A, and with B;
        no old problem; and how the parts about A and about the pair look: grey while they show an
        older text.
        """
        with self.lock:
            try:
                a = ask(self.subject, a_text or "", self.trained)
            except ValueError as error:
                return no_update, no_update, f"A: {error}.", no_update, "", STALE, STALE
            shown = no_update if a.text == asked else a.text
            try:
                b = ask_beside(self.subject, b_text or "", a, self.trained)
            except ValueError as error:
                return shown, no_update, "", f"B: {error}.", "", "", STALE
        return shown, {"a": a.text, "b": b.text}, "", "", "", "", ""

    def reads(self, text: str, read: int | None) -> tuple[Any, Any]:
        """The columns at which the answer of A may be read, and the chosen one where A has it."""
        with self.lock:
            query = ask(self.subject, text, self.trained)
        options = [{"value": i, "label": name} for i, name in enumerate(query.columns)]
        kept = read is None or read < len(options)
        return options, no_update if kept else None

    def limit(self, n_loops: int | None, loop: int | None) -> tuple[int, int]:
        """The last loop whose attention can be shown, and the loop that is shown."""
        last = self.loops(n_loops) - 1
        return last, min(loop or 0, last)

    def show_lens(
        self, text: str, n_loops: int | None, rows: str, read: int | None = None
    ) -> tuple[Figure, str]:
        """The lens of A, and how long it took."""

        def work(loops: int) -> Figure:
            query = ask(self.subject, text, self.trained, read)
            return lens_figure(
                lens_table(self.subject.model, query, loops), query, rows == "blocks"
            )

        return self.timed("lens", n_loops, work)

    def show_margin(
        self, text: str, n_loops: int | None, read: int | None = None
    ) -> tuple[Figure, str, Any, str]:
        """The margin over iterations, what it says, the top tokens after each, and how long it
        took.
        """

        def work(loops: int) -> tuple[Figure, str, Any]:
            query = ask(self.subject, text, self.trained, read)
            record = margins(self.subject.model, query, self.most)
            return (
                margin_figure(record, loops, self.trained),
                verdict(query, record, loops, self.trained),
                top_table(query, record, loops),
            )

        found, took = self.timed("margin", n_loops, work)
        return *found, took

    def show_attention(
        self, text: str, n_loops: int | None, view: str, loop: int | None, block: int, head: int
    ) -> tuple[Figure, bool, bool, str]:
        """Attention patterns, which pickers do not matter, and how long it took."""

        def work(loops: int) -> Figure:
            query, model = ask(self.subject, text, self.trained), self.subject.model
            if view == "heads":
                return attention_figure(
                    heads_of(model, query, loops, min(loop or 0, loops - 1), block), query
                )
            return attention_figure(loops_of(model, query, loops, block, head), query)

        figure, took = self.timed("attention", n_loops, work)
        return figure, view != "heads", view == "heads", took

    def show_map(
        self,
        pair: dict[str, str] | None,
        n_loops: int | None,
        extent: str,
        read: int | None,
        block: str | None = None,
        position: int | None = None,
    ) -> tuple[Any, ...]:
        """The patching map, what it is of, the choices of a cell, and how long it took; nothing
        before there is a pair.
        """
        if pair is None:
            return *(no_update,) * 7, ""

        def work(loops: int) -> tuple[PatchGrid, Query, Query, Figure, dict[str, str]]:
            a, b = self.pair({**pair, "read": read})
            grid = patch_grid(
                self.subject.model, a, b, loops, SWEEP_BUDGET if extent == "quick" else math.inf
            )
            return grid, a, b, patch_figure(grid, a, b), self._labels(loops)

        (grid, a, b, figure, labels), took = self.timed("patching map", n_loops, work)
        loops = self.loops(n_loops)
        shown = {**pair, "read": read, "n_loops": loops, "blocks": list(grid.blocks)}
        blocks = [{"value": name, "label": label} for name, label in labels.items()]
        positions = [{"value": i, "label": name} for i, name in enumerate(a.columns)]
        kept = (
            block if block in labels else None,
            position if position is not None and position < len(positions) else None,
        )
        return figure, shown, map_caption(grid, a, b, loops), blocks, positions, *kept, took

    def show_cell(
        self, block: str | None, position: int | None, shown: dict[str, Any]
    ) -> tuple[Any, Any, str]:
        """The answers before and after one patch, the frame around its cell, and how long it
        took.
        """
        frame = Patch()
        if block is None or position is None:
            frame["layout"]["shapes"] = []
            return (
                html.P(
                    "Click a cell of the map, or choose one here, to see the answer before and"
                    " after that patch."
                ),
                frame,
                "",
            )

        def work(loops: int) -> Any:
            a, b = self.pair(shown)
            label = f"{spoken(block)} at {a.columns[position]}"
            return said(*patch_cell(self.subject.model, a, b, loops, block, position), a, label)

        table, took = self.timed("patch", shown["n_loops"], work)
        frame["layout"]["shapes"] = cell_mark(shown["blocks"], block, position)
        return table, frame, took

    def _labels(self, n_loops: int) -> dict[str, str]:
        """The short name of each visit, by its full name."""
        return {visit.name: tick(visit.name) for visit in self.subject.model.schedule(n_loops)}

    def loops(self, n_loops: int | None) -> int:
        """The number of iterations that is meant, between 1 and the most."""
        return min(max(int(n_loops or self.start), 1), self.most)

    def pair(self, pair: dict[str, Any]) -> tuple[Query, Query]:
        """The questions A and B, read at the column of the pair where it has one."""
        read = pair.get("read")
        a = ask(self.subject, pair["a"], self.trained, read)
        return a, ask_beside(self.subject, pair["b"], a, self.trained, read)

    def timed(
        self, what: str, n_loops: int | None, work: Callable[[int], _Result]
    ) -> tuple[_Result, str]:
        """The result of a computation under the lock, and how long it took.

        Args:
            what: Its name.
            n_loops: Iterations that are asked for.
            work: The computation, of the iterations that are meant.
        """
        with self.lock:
            start = time.perf_counter()
            result = work(self.loops(n_loops))
        return result, f"{what} {1000 * (time.perf_counter() - start):.0f} ms"


def choose(click: dict[str, Any] | None, shown: dict[str, Any]) -> tuple[Any, Any, None]:
    """The block and position that were clicked; the click is forgotten, so that the same cell can
    be clicked again.
    """
    if not click:
        return no_update, no_update, None
    point = click["points"][0]
    return (
        shown["blocks"][[tick(block) for block in shown["blocks"]].index(point["y"])],
        int(point["x"].partition(" ")[0]),
        None,
    )


WIRES = (
    Wire("suggest", "a.value b.value", "next-a.n_clicks hops.value next-b.n_clicks", "a.value",
         at_once=False),
    Wire("check", "asked.data pair.data a-wrong.children b-wrong.children problem.children"
         " of-a.className of-pair.className", "a.value b.value", "asked.data"),
    Wire("reads", "read.options read.value", "asked.data", "read.value"),
    Wire("limit", "loop.max loop.value", "loops.value", "loop.value"),
    Wire("show_lens", "lens.figure lens-took.children",
         "asked.data loops.value rows.value read.value", busy="lens"),
    Wire("show_margin", "margin.figure verdict.children tops.children margin-took.children",
         "asked.data loops.drag_value read.value", busy="margin"),
    Wire("show_attention", "attention.figure loop.disabled head.disabled attention-took.children",
         "asked.data loops.value view.value loop.value layer.value head.value", busy="attention"),
    Wire("show_map", "map.figure shown.data map-caption.children block.options position.options"
         " block.value position.value map-took.children",
         "pair.data loops.value extent.value read.value", "block.value position.value", busy="map"),
    Wire("choose", "block.value! position.value! map.clickData", "map.clickData", "shown.data",
         at_once=False),
    Wire("show_cell", "said.children map.figure! cell-took.children",
         "block.value position.value shown.data", busy="cell", at_once=False),
)  # fmt: skip


def make_app(
    explorer: Explorer, texts: tuple[str, str], features: FeaturePart | None = None
) -> Dash:
    """The page of an explorer, with the texts A and B to start with, and with the features of a
    dictionary where there is one.
    """
    more = [] if features is None else [features.section()]
    layout = page(explorer.subject, explorer.trained, explorer.start, explorer.most, texts, more)
    app = new_app(explorer.subject.name, layout)
    wires = WIRES if explorer.subject.questions else WIRES[1:]
    methods = {wire.method: getattr(explorer, wire.method, choose) for wire in wires}
    connect(app, wires, methods, BUSY)
    part = CircuitPart(explorer)
    methods = {wire.method: getattr(part, wire.method, choose_edge) for wire in CIRCUIT_WIRES}
    connect(app, CIRCUIT_WIRES, methods, BUSY)
    if features is not None:
        connect(app, FEATURE_WIRES, {"show_feature": features.show_feature}, BUSY)
    return app
