"""The figures of the page of boards, each made of a record of `model.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.explorer.boards.model import BoardRun, changed_clues, spot, wrong_cells
from loopscope.analyses.explorer.view import ACCENT, WARM, Figure, drawn
from loopscope.interp.drawing.look import ACCURACY_SCALE, CELL_TEXT, INK, SOFT
from loopscope.tasks.puzzles.boards import SUDOKU_BLANKS
from loopscope.tasks.puzzles.sudoku import Sudoku

ACROSS, HEIGHT, GAP = 4, 150, 42  # boards of a row; pixels of a board, and between two rows
_BORDER = SOFT
_CLUE = 2.0  # the colour of a clue, well beyond that of the surest right cell
_FILLED_SCALE = [
    [0, "#e0662f"],
    [1 / 3, "#f7f7f7"],
    [2 / 3, "#3d8ccb"],
    [0.75, "#3d8ccb"],
    [0.75, "#dfe3e8"],
    [1, "#dfe3e8"],
]


@dataclass(frozen=True)
class _Shown:
    """Boards to draw.

    Attributes:
        boards: As text.
        colors, hovers: Of each board's cells.
        first: The loop after which the first board stands.
    """

    boards: Sequence[str]
    colors: Sequence[Sequence[float]]
    hovers: Sequence[Sequence[str]]
    first: int


def boards_figure(rules: Sudoku, question: str, answer: str | None, run: BoardRun) -> Figure:
    """One board for each iteration: clues grey, right cells blue, wrong ones orange; a weak
    colour is not sure.

    Args:
        answer: The one solution; None where it is not known, so that wrong cells are those that
            break the rules.
    """
    colors, hovers = [], []
    for board, sure in zip(run.boards, run.confidence.tolist(), strict=True):
        wrong = wrong_cells(rules, question, board, answer)
        clues = [clue not in SUDOKU_BLANKS for clue in question]
        wrong |= changed_clues(question, board)
        colors.append(
            [
                -prob if cell in wrong else _CLUE if clues[cell] else prob
                for cell, prob in enumerate(sure)
            ]
        )
        hovers.append(
            [
                f"{spot(rules, cell)}<br>{_kind(clues[cell], cell in wrong, answer)}: says"
                f" {board[cell]}, p = {prob:.3f}"
                for cell, prob in enumerate(sure)
            ]
        )
    shown = _Shown(run.boards, colors, hovers, 0)
    return _grid(rules, shown, _FILLED_SCALE, (-1.0, _CLUE))


def _kind(is_clue: bool, is_wrong: bool, answer: str | None) -> str:
    if is_clue:
        return "changes the clue" if is_wrong else "clue"
    if answer is None:
        return "breaks a rule" if is_wrong else "filled"
    return "wrong" if is_wrong else "right"


def effect_figure(
    rules: Sudoku, run: BoardRun, effect: Float[Tensor, "loop cell"], loop: int, cell: int
) -> Figure:
    """One board for each iteration after a patch: the digits are those with the patch, and the
    colour is how far the cell's digits moved.
    """
    hovers = [
        [
            f"{spot(rules, other)}<br>{_relation(rules, cell, other)}<br>says {board[other]}, KL"
            f" {size:.3f} nats"
            for other, size in enumerate(sizes)
        ]
        for board, sizes in zip(run.boards, effect.tolist(), strict=True)
    ]
    most = max(float(effect.max()), 1e-6)
    shown = _Shown(run.boards, effect.tolist(), hovers, loop)
    return _grid(rules, shown, ACCURACY_SCALE, (0.0, most), marked=cell)


def _relation(rules: Sudoku, cell: int, other: int) -> str:
    relation = rules.relation(cell, other)
    other_words = {"self": "the patched cell", "none": "no row, column or box in common"}
    return other_words.get(relation, f"same {relation} as the patched cell")


def relation_means(
    rules: Sudoku, effect: Float[Tensor, "loop cell"], cell: int
) -> dict[str, list[float]]:
    """The mean effect of a patch on the cells of each relation, after each iteration."""
    named = [_relation(rules, cell, other) for other in range(rules.side**2)]
    return {
        name: effect[:, [each == name for each in named]].mean(1).tolist()
        for name in dict.fromkeys(named[cell:] + named)
    }


def _grid(
    rules: Sudoku,
    shown: _Shown,
    scale: list[list[Any]],
    ends: tuple[float, float],
    marked: int | None = None,
) -> Figure:
    """Boards side by side on one colour scale; a cell's data are its loop and its number."""
    side, down = rules.side, -(-len(shown.boards) // ACROSS)
    tall = down * (HEIGHT + GAP)
    axes: dict[str, Figure] = {}
    traces, titles = [], []
    for i, board in enumerate(shown.boards):
        key, loop = _key(i), shown.first + i
        left, top = i % ACROSS / ACROSS, 1 - i // ACROSS * (HEIGHT + GAP) / tall
        wide, high = [left, left + 0.92 / ACROSS], [top - HEIGHT / tall, top]
        axes[f"xaxis{key}"] = {"domain": wide, "anchor": f"y{key}", **_hidden(side)}
        square = {"scaleanchor": f"x{key}", "autorange": "reversed"}
        axes[f"yaxis{key}"] = {"domain": high, "anchor": f"x{key}", **_hidden(side), **square}
        values = {
            "z": shown.colors[i],
            "text": ["" if digit in SUDOKU_BLANKS else digit for digit in board],
            "hovertext": shown.hovers[i],
            "customdata": [f"{loop} {cell}" for cell in range(side**2)],
        }
        traces.append({
            "type": "heatmap", "xaxis": f"x{key}", "yaxis": f"y{key}", "xgap": 1, "ygap": 1,
            "colorscale": scale, "zmin": ends[0], "zmax": ends[1], "showscale": False,
            "texttemplate": "%{text}", "textfont": {**CELL_TEXT, "size": 18 - side},
            "hovertemplate": f"after loop {loop}, %{{hovertext}}<extra></extra>",
            **{name: _rows(each, side) for name, each in values.items()},
        })  # fmt: skip
        place = {"x": 0.5, "y": 1, "xref": f"x{key} domain", "yref": f"y{key} domain"}
        titles.append({**place, "text": f"loop {loop}", "yanchor": "bottom", "showarrow": False})
    lines = [line for i in range(len(traces)) for line in _lines(rules, _key(i))]
    frames = [] if marked is None else [_frame(marked, side)]
    return drawn(
        traces, tall + 40, axes, annotations=titles, shapes=[*lines, *frames],
        margin={"l": 6, "r": 6, "t": 26, "b": 6},
    )  # fmt: skip


def _key(board: int) -> str:
    """The end of the name of a board's axes."""
    return str(board + 1) if board else ""


def _rows(values: Sequence[Any], side: int) -> list[Sequence[Any]]:
    return [values[start : start + side] for start in range(0, side**2, side)]


def _hidden(side: int) -> Figure:
    """An axis without marks, on which a cell has the length 1."""
    return {"visible": False, "range": [-0.5, side - 0.5], "constrain": "domain"}


def _lines(rules: Sudoku, key: str) -> list[Figure]:
    """The borders of a board and of its boxes."""
    side, ends = (
        rules.side,
        {"x0": -0.5, "y0": -0.5, "x1": rules.side - 0.5, "y1": rules.side - 0.5},
    )
    down = [{**ends, "x0": x - 0.5, "x1": x - 0.5} for x in range(0, side + 1, rules.box_columns)]
    across = [{**ends, "y0": y - 0.5, "y1": y - 0.5} for y in range(0, side + 1, rules.box_rows)]
    look = {"type": "line", "xref": f"x{key}", "yref": f"y{key}", "opacity": 1}
    return [{**look, **each, "line": {"color": _BORDER, "width": 1.5}} for each in (*down, *across)]


def _frame(cell: int, side: int) -> Figure:
    """The frame around a cell of the first board."""
    x, y = cell % side, cell // side
    corners = {"x0": x - 0.5, "x1": x + 0.5, "y0": y - 0.5, "y1": y + 0.5}
    look = {"fillcolor": "rgba(0,0,0,0)", "opacity": 1, "line": {"color": INK, "width": 3}}
    return {"type": "rect", "xref": "x", "yref": "y", **corners, **look}


def halting_figure(run: BoardRun, question: str, answer: str | None) -> Figure:
    """The halting probability after each iteration, and the share of blank cells that are right."""
    loops = list(range(len(run.boards)))
    curves = [("halting probability", WARM, run.halting.tolist())]
    blanks = [cell for cell, clue in enumerate(question) if clue in SUDOKU_BLANKS]
    if answer is not None and blanks:
        right = [sum(board[i] == answer[i] for i in blanks) / len(blanks) for board in run.boards]
        curves.append(("right blank cells", ACCENT, right))
    traces = [
        {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": loops, "y": values,
            "line": {"color": color, "width": 2},
            "hovertemplate": f"after loop %{{x}}<br>{name} %{{y:.3f}}<extra></extra>",
        }
        for name, color, values in curves
    ]  # fmt: skip
    axes: dict[str, Figure] = {
        "xaxis": {"title": {"text": "loop"}, "tickformat": "d"},
        "yaxis": {
            "title": {"text": "probability, share"},
            "range": [-0.03, 1.05],
            "showgrid": True,
        },
    }
    legend = {"orientation": "h", "y": 1.2, "yanchor": "bottom"}
    return drawn(
        traces,
        240,
        axes,
        showlegend=True,
        legend=legend,
        margin={"l": 56, "r": 12, "t": 62, "b": 44},
    )
