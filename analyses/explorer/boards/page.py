"""Where everything stands on the page of boards, before anything is computed."""

from __future__ import annotations

from dash import dcc, html
from dash.development.base_component import Component

from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.boards.model import Table, spot
from loopscope.analyses.explorer.controls import (
    button,
    control,
    graph,
    heading,
    section,
    slider,
    status,
)
from loopscope.tasks.puzzles.sudoku import Sudoku

NO_PATCH = 60  # pixels of the place of the patched boards before there are any
BUSY = {"boards": "the boards", "patch": "the patch"}


def cell_key(cell: int) -> str:
    """The name of the field of one cell."""
    return f"cell-{cell}"


def page(subject: Subject, table: Table, trained: int, start: int, most: int) -> Component:
    """The whole page.

    Args:
        trained: Iterations of the checkpoint.
        start: Iterations to start with.
        most: The end of the slider.
    """
    cfg, side = table.model.cfg, table.rules.side
    facts = (
        f"{cfg.family}, {side} x {side} cells, {cfg.n_layers} blocks, width {cfg.d_model},"
        f" {trained} iterations of {cfg.n_cycles} cycles"
    )
    loops = slider("loops", start, most, (1, *range(trained, most + 1, trained)))
    stores = [dcc.Store(id="asked")]
    sections = [_board_section(table, loops), _patch_section(table)]
    return html.Div(
        [heading(subject, "A puzzle solver", facts), html.Main([*stores, *sections]), status(BUSY)]
    )


def _board_section(table: Table, loops: Component) -> Component:
    count = len(table.puzzles)
    names = [{"value": i, "label": f"puzzle {i}"} for i in range(count)]
    puzzle = dcc.Dropdown(names, 0, id="puzzle", clearable=False, searchable=False)
    side = table.rules.side
    left = [
        html.Div(
            [control("puzzle", "Unchanged puzzle", puzzle), button("reset", "Undo all changes")],
            className="controls",
        ),
        _fields(table.rules),
        html.P(f"Click a cell and type a digit from 1 to {side}, or delete it.", className="hint"),
        html.P(id="finding", className="found", role="status"),
        html.P(id="wrong", className="wrong", role="alert"),
        control("loops", "Number of iterations", loops),
        graph("halting", 230),
    ]
    key = (
        "One board after each iteration, from one run. Clues are grey, right cells blue and wrong"
        " ones orange; a cell of weak colour is not sure. Hover for the probability."
    )
    right = html.Div([html.P(key), graph("boards", 440)], id="of-boards")
    return section(
        "board-section",
        "The board, and the answers after each iteration",
        [html.Div([html.Div(left), right], className="two board-and-answers")],
    )


def _fields(rules: Sudoku) -> Component:
    """One field for each cell, in a grid."""
    cells = []
    for cell in range(rules.side**2):
        row, column = divmod(cell, rules.side)
        edges = {
            "cell": True,
            "box-left": column and column % rules.box_columns == 0,
            "box-above": row and row % rules.box_rows == 0,
        }
        field = dcc.Input(
            id=cell_key(cell), type="text", value="", maxLength=1, autoComplete="off",
            inputMode="numeric",
        )  # fmt: skip
        label = html.Label(f"clue at {spot(rules, cell)}", htmlFor=cell_key(cell))
        cells.append(html.Div([label, field], className=" ".join(filter(edges.get, edges))))
    columns = {"gridTemplateColumns": f"repeat({rules.side}, 44px)"}
    return html.Div(cells, className="board", style=columns)


def _patch_section(table: Table) -> Component:
    cells = [
        {"value": cell, "label": spot(table.rules, cell)} for cell in range(table.rules.side**2)
    ]
    pickers = [
        control("loop", "After loop", dcc.Dropdown([], None, id="loop", searchable=False)),
        control("cell", "Cell", dcc.Dropdown(cells, None, id="cell", searchable=False)),
    ]
    text = (
        "Click a cell of a board above, or choose one here: after that iteration both states of the"
        " cell, high and low, are replaced by those of the unchanged puzzle's run. Each board shows"
        " the changed puzzle's answer with the patch; the stronger a cell's colour, the further its"
        " digits moved."
    )
    parts = [
        html.P(text),
        html.Div(pickers, className="controls"),
        html.P(id="patched", className="found"),
        html.Div([graph("effects", NO_PATCH), html.Div(id="related", className="said")],
                 className="two map", id="of-patch"),
    ]  # fmt: skip
    return section("patch-section", "Patching one cell from the unchanged puzzle", parts)
