"""The callbacks of the page of boards."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dash import Dash, no_update

from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.boards.model import (
    BoardRun,
    Table,
    effect,
    judged,
    patched,
    run_board,
)
from loopscope.analyses.explorer.boards.page import BUSY, NO_PATCH, cell_key, page
from loopscope.analyses.explorer.boards.sentences import patch_sentence, relation_table
from loopscope.analyses.explorer.boards.view import (
    boards_figure,
    effect_figure,
    halting_figure,
    relation_means,
)
from loopscope.analyses.explorer.controls import blank
from loopscope.analyses.explorer.view import Figure
from loopscope.analyses.explorer.wiring import Wire, connect, new_app
from loopscope.tasks.puzzles.boards import SUDOKU_BLANKS

REACH = 3  # the slider goes to so many times the trained number of iterations
STALE, STALE_MAP = "stale", "two map stale"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class BoardExplorer:
    """The page's callbacks for one solver.

    Attributes:
        table: The solver and its puzzles.
        trained: Its number of iterations.
        start: The number of iterations that the page starts with.
        first: The board to begin with; None for the first puzzle.
        lock: Held around every computation, because hooks live on the model.
    """

    table: Table
    trained: int
    start: int
    first: str | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def most(self) -> int:
        """The most iterations that the page shows."""
        return max(REACH * self.trained, self.start)

    def fill(self, puzzle: int, resets: int | None) -> tuple[str, ...]:
        """The value of each field when a puzzle is chosen, or its changes are undone."""
        board = self.table.puzzles[puzzle].question
        if self.first is not None and puzzle == 0 and not resets:
            board = self.first
        return tuple("" if clue in SUDOKU_BLANKS else clue for clue in board)

    def check(self, puzzle: int, *cells: str | None) -> tuple[Any, ...]:
        """The board where it can be asked, what its clues allow, what is wrong with it, how the
        answers look (grey while they show an older board), and how each field looks.
        """
        board = "".join((cell or "").strip() or "." for cell in cells)
        unchanged = self.table.puzzles[puzzle].question
        looks = [
            "changed" if clue != old else "" if clue in SUDOKU_BLANKS else "clue"
            for clue, old in zip(board, unchanged, strict=False)
        ]
        looks += [""] * (len(cells) - len(looks))
        try:
            finding = judged(self.table.rules, board).sentence
        except ValueError as error:
            return no_update, "", f"{error}.", STALE, STALE_MAP, *looks
        return {"puzzle": puzzle, "board": board}, finding, "", "", "two map", *looks

    def limit(self, n_loops: int | None, loop: int | None) -> tuple[Any, Any]:
        """The loops after which a cell can be patched, and the chosen one where it is there."""
        loops = self._loops(n_loops)
        options = [{"value": i, "label": f"loop {i}"} for i in range(loops)]
        return options, loop if loop is not None and loop < loops else None

    def show_boards(self, asked: dict[str, Any], n_loops: int | None) -> tuple[Figure, Figure, str]:
        """The boards, the halting head beside them, and how long they took."""
        board, rules = asked["board"], self.table.rules

        def work() -> tuple[Figure, Figure]:
            run = run_board(self.table.model, board, self._loops(n_loops))
            answer = judged(rules, board).answer
            return boards_figure(rules, board, answer, run), halting_figure(run, board, answer)

        figures, took = self._timed("boards", work)
        return *figures, took

    def choose(self, click: dict[str, Any] | None) -> tuple[Any, Any, None]:
        """The loop and the cell that were clicked; the click is forgotten, so that the same cell
        can be clicked again.
        """
        if not click:
            return no_update, no_update, None
        loop, cell = map(int, str(click["points"][0]["customdata"]).split())
        return loop, cell, None

    def show_patch(
        self, loop: int | None, cell: int | None, asked: dict[str, Any], n_loops: int | None
    ) -> tuple[Any, str, Any, str]:
        """The boards after a patch, a sentence, the effect by relation, and how long it took."""
        board = asked["board"]
        unchanged = self.table.puzzles[asked["puzzle"]].question
        if loop is None or cell is None or loop >= self._loops(n_loops):
            return blank(NO_PATCH), "", None, ""
        if board == unchanged:
            same = "The board is the unchanged puzzle, so that a patch does nothing: change a clue."
            return blank(NO_PATCH), same, None, ""

        def work() -> tuple[BoardRun, BoardRun]:
            own, other = (
                run_board(self.table.model, each, self._loops(n_loops))
                for each in (board, unchanged)
            )
            return own, patched(self.table.model, board, own, other, loop, cell)

        (own, after), took = self._timed("patch", work)
        moved = effect(own, after)
        said = patch_sentence(self.table.rules, own, after, loop, cell)
        rows = relation_means(self.table.rules, moved, cell)
        figure = effect_figure(self.table.rules, after, moved, loop, cell)
        return figure, said, relation_table(rows, loop), took

    def _loops(self, n_loops: int | None) -> int:
        return min(max(int(n_loops or self.start), 1), self.most)

    def _timed(self, what: str, work: Callable[[], _Result]) -> tuple[_Result, str]:
        with self.lock:
            start = time.perf_counter()
            result = work()
        return result, f"{what} {1000 * (time.perf_counter() - start):.0f} ms"


def wires_of(n_cells: int) -> tuple[Wire, ...]:
    """The page's callbacks; the fields of the cells are one control each."""
    cells = [cell_key(cell) for cell in range(n_cells)]
    values = " ".join(f"{cell}.value" for cell in cells)
    looks = " ".join(f"{cell}.className" for cell in cells)
    return (
        Wire("fill", values, "puzzle.value reset.n_clicks"),
        Wire("check", "asked.data finding.children wrong.children of-boards.className"
             f" of-patch.className {looks}", f"puzzle.value {values}"),
        Wire("limit", "loop.options loop.value", "loops.value", "loop.value"),
        Wire("show_boards", "boards.figure halting.figure boards-took.children",
             "asked.data loops.drag_value", busy="boards", at_once=False),
        Wire("choose", "loop.value! cell.value! boards.clickData", "boards.clickData",
             at_once=False),
        Wire("show_patch", "effects.figure patched.children related.children patch-took.children",
             "loop.value cell.value asked.data loops.value", busy="patch", at_once=False),
    )  # fmt: skip


def make_board_app(
    subject: Subject, table: Table, trained: int, start: int, board: str | None
) -> Dash:
    """The page of a solver.

    Args:
        trained: Iterations of the checkpoint.
        start: Iterations to start with.
        board: The board to begin with; None for the first puzzle.

    Raises:
        ValueError: A board of another size or with other digits.
    """
    if board is not None:
        table.rules.masks(board)  # refused here, before a page that cannot be used
    explorer = BoardExplorer(table, trained, start, board)
    app = new_app(subject.name, page(subject, table, trained, start, explorer.most))
    wires = wires_of(table.rules.side**2)
    connect(app, wires, {wire.method: getattr(explorer, wire.method) for wire in wires}, BUSY)
    return app
