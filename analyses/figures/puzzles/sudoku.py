"""Which cells are filled when, and do more cycles or more beginnings help? Boards over cycles, a
map of depth and breadth, the motion of the state, and the halting head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.records import Record
from loopscope.analyses.puzzles.solver import (
    Cycles,
    Solver,
    SolverConfig,
    first_states,
    open_solver,
    run_cycles,
)
from loopscope.interp.drawing.look import ACCURACY_SCALE, FAINT, GRID, INK, MARK, styled
from loopscope.tasks.puzzles.boards import BLANK_ID, sudoku_text

_BINS = 5
_RIGHT = "#0b4f8a"


@dataclass(frozen=True, kw_only=True)
class SudokuConfig(SolverConfig):
    """Boards over cycles, accuracy by cycles and restarts, and the halting head's calibration."""

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
        ratings: Int[Tensor, " puzzle"], the guesses that each puzzle needs.
        blanks: Int[Tensor, " puzzle"], its blank cells.
        n_cycles: Cycles of one supervision step.
        question, answer: The puzzle that is shown.
        boards: That puzzle after each cycle.
    """

    exact: Bool[Tensor, "restart cycle puzzle"]
    halting: Float[Tensor, "restart cycle puzzle"]
    moved: Float[Tensor, "cycle puzzle"]
    ratings: Int[Tensor, " puzzle"]
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

    def summary(self) -> pd.DataFrame:
        """One row per number of blank cells: puzzles, the guesses that they need, and the share
        solved after the first cycle and at the end.
        """
        first, last = self.exact[0, 0], self.exact[0, -1]
        rows = []
        for blanks in sorted(set(self.blanks.tolist())):
            of = self.blanks == blanks
            means = [float(x[of].float().mean()) for x in (self.ratings, first, last)]
            rows.append((blanks, int(of.sum()), *means))
        names = ["blanks", "puzzles", "mean guesses", "solved after one cycle", "solved at the end"]
        return pd.DataFrame(rows, columns=names)

    def calibration(self) -> pd.DataFrame:
        """confidence (mean of the halting probability in a bin), solved (share), count; over all
        supervision steps of the runs from the checkpoint's own states.
        """
        ends = slice(self.n_cycles - 1, None, self.n_cycles)
        confidence = self.halting[0, ends].sigmoid().flatten()
        exact = self.exact[0, ends].flatten()
        bins = (confidence * _BINS).long().clamp(max=_BINS - 1)
        rows = [
            (float(confidence[bins == i].mean()), float(exact[bins == i].float().mean()), int(n))
            for i, n in enumerate(torch.bincount(bins, minlength=_BINS).tolist())
            if n
        ]
        return pd.DataFrame(rows, columns=["confidence", "solved", "count"])


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
        ratings=torch.tensor([puzzle.rating for puzzle in solver.puzzles]),
        blanks=(solver.tokens[:, solver.cells] == BLANK_ID).sum(1),
        n_cycles=solver.model.cfg.n_cycles,
        question=shown.question,
        answer=shown.answer,
        boards=tuple(map(sudoku_text, boards)),
    )


def figure(record: SudokuRecord) -> go.Figure:
    """Above the boards of one puzzle; below the map, the motion and the calibration."""
    shown = [record.question, *record.boards]
    part = max(4, len(shown))
    columns = 3 * part
    below: list[dict[str, int] | None] = [None] * columns
    for i in range(3):
        below[i * part] = {"colspan": part - 2}
    above: list[dict[str, int] | None] = [None] * columns
    for i in range(len(shown)):
        above[3 * i] = {"colspan": 3}
    specs = [above, below]
    titles = [
        "puzzle",
        *(f"after {i} cycle{'s' * (i > 1)}" for i in range(1, len(record.boards) + 1)),
    ]
    lower = ("share solved by any restart", "motion of the high state", "halting head")
    plot = make_subplots(
        rows=2, cols=columns, specs=specs, subplot_titles=(*titles, *lower),
        row_heights=[0.34, 0.66], vertical_spacing=0.16, horizontal_spacing=0.004,
    )  # fmt: skip
    for i, board in enumerate(shown):
        _draw_board(plot, board, record, row=1, col=3 * i + 1)
    _draw_map(plot, record, row=2, col=1)
    _draw_motion(plot, record, row=2, col=part + 1)
    _draw_calibration(plot, record, row=2, col=2 * part + 1)
    plot.update_layout(legend={"orientation": "h", "y": -0.14, "x": 0.5, "xanchor": "center"})
    return styled(plot, 620).update_layout(margin_b=90)


def _draw_board(plot: go.Figure, board: str, record: SudokuRecord, **place: int) -> None:
    """One board: clues grey, right cells blue, wrong ones red."""
    side = math.isqrt(len(board))
    colors = [
        INK if clue != "." else _RIGHT if cell == right else MARK
        for cell, clue, right in zip(board, record.question, record.answer, strict=True)
    ]
    fills = [
        GRID
        if clue != "."
        else "#ffffff"
        if cell == "."
        else "#dcebf7"
        if cell == right
        else "#fbe1d3"
        for cell, clue, right in zip(board, record.question, record.answer, strict=True)
    ]
    plot.add_scatter(
        x=[i % side for i in range(len(board))],
        y=[i // side for i in range(len(board))],
        mode="markers+text",
        text=["" if cell == "." else cell for cell in board],
        textfont={"color": colors, "size": 13},
        marker={
            "symbol": "square",
            "size": 24,
            "color": fills,
            "line": {"color": FAINT, "width": 1},
        },
        showlegend=False,
        hovertemplate="row %{y}, column %{x}: %{text}<extra></extra>",
        **place,
    )
    ends = [-0.6, side - 0.4]
    plot.update_xaxes(visible=False, range=ends, **place)
    plot.update_yaxes(visible=False, range=ends[::-1], **place)


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


def _draw_motion(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    """The mean motion of the boards that are right after a cycle and of those that are not."""
    for name, color, kept in (
        ("solved", _RIGHT, record.exact[0]),
        ("not solved", MARK, ~record.exact[0]),
    ):
        means = [float(m[k].mean()) for m, k in zip(record.moved, kept, strict=True)]
        plot.add_scatter(
            x=list(range(1, len(means) + 1)),
            y=[None if math.isnan(mean) else mean for mean in means],
            mode="lines+markers",
            name=name,
            line={"color": color, "width": 2},
            hovertemplate=f"{name}<br>%{{x}} cycles<br>%{{y:.3f}}<extra></extra>",
            **place,
        )
    plot.update_xaxes(title="cycles", **place)
    plot.update_yaxes(title="share of its norm", rangemode="tozero", **place)


def _draw_calibration(plot: go.Figure, record: SudokuRecord, **place: int) -> None:
    """The share of solved boards by the probability that the halting head gives."""
    table = record.calibration()
    plot.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", line={"color": FAINT, "dash": "dot"},
        showlegend=False, hoverinfo="skip", **place,
    )  # fmt: skip
    plot.add_scatter(
        x=table["confidence"].tolist(),
        y=table["solved"].tolist(),
        text=table["count"].tolist(),
        mode="lines+markers",
        line={"color": INK, "width": 2},
        showlegend=False,
        hovertemplate="halting %{x:.2f}<br>solved %{y:.2f}<br>%{text} boards<extra></extra>",
        **place,
    )
    plot.update_xaxes(title="halting probability", range=[-0.02, 1.02], **place)
    plot.update_yaxes(title="share solved", range=[-0.02, 1.05], **place)


EXAMPLE = 'plots.sudoku("mini/sudoku/trm", puzzles=9, restarts=2, n_loops=2)'
