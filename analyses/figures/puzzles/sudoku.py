"""Which cells are filled when, and do more cycles or more beginnings help? Boards over cycles, a
map of depth and breadth, the puzzles of each grade, the motion of the state, and the halting head.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.analyses.common.records import Record
from loopscope.analyses.puzzles.drawing import (
    BOARD_SPAN,
    RIGHT,
    draw_board,
    draw_line,
    grid_of,
)
from loopscope.analyses.puzzles.solver import (
    Cycles,
    Solver,
    SolverConfig,
    first_states,
    open_solver,
    run_cycles,
)
from loopscope.interp.drawing.look import ACCURACY_SCALE, CATEGORIES, INK, MARK, styled
from loopscope.tasks.puzzles.boards import BLANK_ID, sudoku_text
from loopscope.tasks.puzzles.grades import Grade


@dataclass(frozen=True, kw_only=True)
class SudokuConfig(SolverConfig):
    """Boards over cycles, accuracy by cycles, restarts and grades, and the halting head's
    calibration.
    """

    puzzles: int = 100
    """Held-out puzzles to solve."""
    restarts: int = 6
    """Beginnings of each puzzle: the checkpoint's own states, and random ones of their size."""
    shown: int = 0
    """The puzzle whose boards are drawn."""
    boards: int = 6
    """Cycles that are drawn, from the first one on."""
    seed: int = 0
    """The seed of the random states."""


@dataclass(frozen=True)
class SudokuRecord(Record):
    """A solver's runs.

    Attributes:
        exact: Bool[Tensor, "restart cycle puzzle"], whether every cell is right; restart 0 begins
            with the checkpoint's own states.
        halting: Float[Tensor, "restart cycle puzzle"], the halting logit.
        moved: Float[Tensor, "cycle puzzle"], the distance that the high state moved in the cycle,
            as a share of its norm, from the checkpoint's own states.
        grades: The grade of each puzzle.
        blanks: Int[Tensor, " puzzle"], its blank cells.
        n_cycles: Cycles of one supervision step.
        question, answer: The puzzle that is shown.
        boards: That puzzle after each cycle.
    """

    exact: Bool[Tensor, "restart cycle puzzle"]
    halting: Float[Tensor, "restart cycle puzzle"]
    moved: Float[Tensor, "cycle puzzle"]
    grades: tuple[Grade, ...]
    blanks: Int[Tensor, " puzzle"]
    n_cycles: int
    question: str
    answer: str
    boards: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """cycles (run), restarts (made), any (share of puzzles that one of them solves), chosen
        (share that the one with the largest halting logit solves).
        """
        rows = []
        for made in range(1, len(self.exact) + 1):
            best = self.halting[:made].argmax(0, keepdim=True)
            chosen = self.exact[:made].gather(0, best)[0].float().mean(1).tolist()
            found = self.exact[:made].any(0).float().mean(1).tolist()
            rows += [(cycle + 1, made, found[cycle], chosen[cycle]) for cycle in range(len(found))]
        return pd.DataFrame(rows, columns=["cycles", "restarts", "any", "chosen"])

    def by_grade(self) -> dict[str, Bool[Tensor, " puzzle"]]:
        """The puzzles of each kind, the easiest first: by what they need, or where all need the
        same by their rounds too.
        """
        alike = len({grade.level for grade in self.grades}) == 1
        named = {grade: str(grade) if alike else grade.needs for grade in sorted(set(self.grades))}
        return {
            name: torch.tensor([named[grade] == name for grade in self.grades])
            for name in named.values()
        }

    def summary(self) -> pd.DataFrame:
        """One row per kind of `by_grade`: puzzles, their mean number of blank cells, and the share
        solved after the first cycle and at the end.
        """
        first, last = self.exact[0, 0], self.exact[0, -1]
        rows = []
        for grade, of in self.by_grade().items():
            means = [float(x[of].float().mean()) for x in (self.blanks, first, last)]
            rows.append((grade, int(of.sum()), *means))
        names = ["needs", "puzzles", "mean blanks", "solved after one cycle", "solved at the end"]
        return pd.DataFrame(rows, columns=names)

    def calibration(self) -> pd.DataFrame:
        """The halting head after each supervision step, in the runs from the checkpoint's own
        states.

        Returns:
            loop, halting (mean probability), solved (share of puzzles), error (mean square of the
            difference between the probability and whether the puzzle is solved), halted (share of
            puzzles whose probability is above a half), right (share of those that are solved; NaN
            where none is).
        """
        ends = slice(self.n_cycles - 1, None, self.n_cycles)
        halting, exact = self.halting[0, ends].sigmoid(), self.exact[0, ends].float()
        halts = halting > 0.5
        columns = {
            "halting": halting.mean(1),
            "solved": exact.mean(1),
            "error": (halting - exact).square().mean(1),
            "halted": halts.float().mean(1),
            "right": (exact * halts).sum(1) / halts.sum(1),
        }
        named = {name: values.tolist() for name, values in columns.items()}
        return pd.DataFrame({"loop": range(len(exact)), **named})


def run(config: SudokuConfig) -> SudokuRecord:
    """Solve the puzzles from every beginning.

    Raises:
        ValueError: No puzzle solver, or a puzzle to show that is not among those solved.
    """
    solver = open_solver(config, config.puzzles)
    if not 0 <= config.shown < len(solver.puzzles):
        raise ValueError(
            f"shown must be one of the {len(solver.puzzles)} puzzles, from 0, got {config.shown}"
        )
    if config.restarts < 1 or config.boards < 1:
        raise ValueError(
            f"restarts and boards must be at least 1, got {config.restarts} and {config.boards}"
        )
    runs = [
        run_cycles(solver, config.n_loops, *first_states(solver, config.seed, restart))
        for restart in range(config.restarts)
    ]
    return measure(solver, runs, config)


def measure(solver: Solver, runs: list[Cycles], config: SudokuConfig) -> SudokuRecord:
    """The record of runs that were made already; the first is from the checkpoint's own states."""
    shown = solver.puzzles[config.shown]
    boards = runs[0].boards[: config.boards, config.shown].tolist()
    return SudokuRecord(
        exact=torch.stack([(each.boards == solver.answers).all(-1) for each in runs]),
        halting=torch.stack([each.halting for each in runs]),
        moved=runs[0].moved,
        grades=solver.grades,
        blanks=(solver.tokens[:, solver.cells] == BLANK_ID).sum(1),
        n_cycles=solver.model.cfg.n_cycles,
        question=shown.question,
        answer=shown.answer,
        boards=tuple(map(sudoku_text, boards)),
    )


def figure(record: SudokuRecord) -> go.Figure:
    """Above the boards of one puzzle, at first and after each cycle; below the map, the motion, the
    grades and the halting head.
    """
    shown = [record.question, *record.boards]
    titles = ["puzzle", *(_cycles(i) for i in range(1, len(record.boards) + 1))]
    plot, places = grid_of(titles, [name for name, _ in PANELS])
    for i, board in enumerate(shown):
        draw_board(plot, board, record.question, record.answer, row=1, col=BOARD_SPAN * i + 1)
    for (_, draw), place in zip(PANELS, places, strict=True):
        draw(plot, record, **place)
    return styled(plot, 1050).update_layout(margin_b=170)


def _cycles(count: int) -> str:
    return f"{count} cycle{'s' * (count > 1)}"


def _draw_map(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    table = record.frame().pivot_table(index="restarts", columns="cycles", values="any")
    plot.add_heatmap(
        x=table.columns.tolist(),
        y=table.index.tolist(),
        z=table.to_numpy(),
        zmin=0,
        zmax=1,
        colorscale=ACCURACY_SCALE,
        showscale=False,
        hovertemplate="%{x} cycles, %{y} restarts<br>solved %{z:.2f}<extra></extra>",
        **place,
    )
    plot.update_xaxes(title="cycles", **place)
    plot.update_yaxes(title="restarts", dtick=1, **place)


def _draw_grades(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    """The share solved over cycles, by what the puzzles need."""
    for i, (name, of) in enumerate(record.by_grade().items()):
        label = f"{name} ({int(of.sum())})"
        solved = record.exact[0][:, of].float().mean(1).tolist()
        draw_line(plot, 3, label, CATEGORIES[i % len(CATEGORIES)], solved, **place)
    plot.update_xaxes(title="cycles", **place)
    plot.update_yaxes(title="share solved", range=[-0.02, 1.05], **place)


def _draw_motion(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    """The mean motion of the boards that are right after a cycle and of those that are not."""
    for name, color, kept in (
        ("solved", RIGHT, record.exact[0]),
        ("not solved", MARK, ~record.exact[0]),
    ):
        means = [float(m[k].mean()) for m, k in zip(record.moved, kept, strict=True)]
        draw_line(plot, 2, name, color, means, **place)
    plot.update_xaxes(title="cycles", **place)
    plot.update_yaxes(title="share of its norm", rangemode="tozero", **place)


def _draw_halting(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    """The halting probability beside the share solved, after each supervision step."""
    table = record.calibration()
    for name, color, column in (
        ("solved", RIGHT, "solved"),
        ("halting probability", MARK, "halting"),
        ("solved of those that halt", INK, "right"),
    ):
        draw_line(plot, 4, name, color, table[column].tolist(), ("loop", 0), **place)
    plot.update_xaxes(title="loop", **place)
    plot.update_yaxes(title="share, or probability", range=[-0.02, 1.05], **place)


PANELS = (
    ("share solved by any restart", _draw_map),
    ("motion of the high state", _draw_motion),
    ("share solved by grade", _draw_grades),
    ("halting head", _draw_halting),
)


EXAMPLE = 'plots.sudoku("mini/sudoku/trm", puzzles=9, restarts=2, n_loops=2)'
