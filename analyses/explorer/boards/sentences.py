"""The sentence and the table about a patch on the page of boards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dash import html
from dash.development.base_component import Component

from loopscope.analyses.explorer.boards.model import BoardRun, spot
from loopscope.tasks.puzzles.sudoku import Sudoku


def patch_sentence(rules: Sudoku, own: BoardRun, after: BoardRun, loop: int, cell: int) -> str:
    """The sentence about a patch and the last board.

    Args:
        own, after: The runs without and with it.
    """
    last = len(own.boards) - 1
    moved = [
        f"{spot(rules, i)} from {a} to {b}"
        for i, (a, b) in enumerate(zip(own.boards[-1], after.boards[-1], strict=True))
        if a != b
    ]
    said = f"After loop {loop} the states of {spot(rules, cell)} are those of the unchanged puzzle."
    if not moved:
        return f"{said} After loop {last} every cell says what it says without the patch."
    shown = "; ".join(moved[:4]) + (f"; and {len(moved) - 4} more" if len(moved) > 4 else "")
    return f"{said} After loop {last} the patch changes {shown}."


def relation_table(effects: Mapping[str, Sequence[float]], loop: int) -> Component:
    """The mean effect on the cells of each relation after the first iteration that follows a patch,
    and after the last one.

    Args:
        effects: After each iteration, from `loop` on, in nats.
        loop: The loop after which the patch is made.
    """
    count = len(next(iter(effects.values())))
    places = sorted({min(1, count - 1), count - 1})
    titles = ["mean KL (nats)", *(f"loop {loop + i}" for i in places)]
    head = html.Tr([html.Th(title) for title in titles])
    rows = [
        html.Tr([html.Td(name), *(html.Td(f"{max(sizes[i], 0.0):.3f}") for i in places)])
        for name, sizes in effects.items()
    ]
    return html.Table([html.Thead(head), html.Tbody(rows)])
