"""Does a solver stay where it should? Boards that are nearly solved, answers that are left again,
wrong boards at rest, and the way back after a disturbance (arXiv 2601.10679).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.records import Record
from loopscope.analyses.puzzles.solver import (
    Cycles,
    Solver,
    SolverConfig,
    open_solver,
    run_cycles,
    solver_of,
)
from loopscope.interp.drawing.look import CATEGORIES, styled
from loopscope.tasks.puzzles.boards import Puzzle

KINDS = ("nothing blank", "one blank", "as given", "disturbed at the end")


@dataclass(frozen=True, kw_only=True)
class FixedPointsConfig(SolverConfig):
    """Share of right boards over cycles, for four beginnings: the solved board, the solved
    board with one blank, the puzzle as given, and a run whose state is disturbed at the end.
    """

    puzzles: int = 100
    """Held-out puzzles to solve."""
    noise: float = 1.0
    """Standard deviation of the disturbance; the entries of a state have a mean square of 1."""
    rest: float = 0.05
    """A state is at rest where a cycle moves it by less than this share of its norm."""
    seed: int = 0
    """The seed of blanks and disturbances."""


@dataclass(frozen=True)
class BoardFates(Record):
    """The fate of boards of several kinds.

    Attributes:
        exact: Float[Tensor, "kind cycle"], the share of boards that are right after each cycle.
        left: Float[Tensor, " kind"], the share of boards that were right after some cycle and are
            wrong after the last one.
        spurious: Float[Tensor, " kind"], the share that is wrong and at rest after the last cycle.
    """

    exact: Float[Tensor, "kind cycle"]
    left: Float[Tensor, " kind"]
    spurious: Float[Tensor, " kind"]

    def frame(self) -> pd.DataFrame:
        """kind, cycles (run), exact (share of right boards)."""
        rows = [
            (kind, cycle + 1, share)
            for kind, shares in zip(KINDS, self.exact.tolist(), strict=True)
            for cycle, share in enumerate(shares)
        ]
        return pd.DataFrame(rows, columns=["kind", "cycles", "exact"])

    def summary(self) -> pd.DataFrame:
        """One row per kind of board."""
        return pd.DataFrame(
            {
                "board": KINDS,
                "right at the end": self.exact[:, -1].tolist(),
                "right before, wrong at the end": self.left.tolist(),
                "wrong and at rest": self.spurious.tolist(),
            }
        )


def run(config: FixedPointsConfig) -> BoardFates:
    """Run every kind of board.

    Raises:
        ValueError: No puzzle solver, or a noise or a bound of rest below 0.
    """
    if config.noise < 0 or config.rest < 0:
        raise ValueError(f"noise and rest must be at least 0, got {config.noise} and {config.rest}")
    solver = open_solver(config, config.puzzles)
    generator = torch.Generator().manual_seed(config.seed)
    runs = [
        run_cycles(solver_of(solver.model, puzzles), config.n_loops)
        for puzzles in (
            _filled(solver.puzzles),
            _with_one_blank(solver.puzzles, generator),
            solver.puzzles,
        )
    ]
    runs.append(_disturbed(solver, config, generator))
    return measure(solver, runs, config.rest)


def measure(solver: Solver, runs: Sequence[Cycles], rest: float) -> BoardFates:
    """The record of runs that were made already, one for each kind."""
    exact = torch.stack([(each.boards == solver.answers).all(-1) for each in runs])
    wrong = ~exact[:, -1]
    still = torch.stack([each.moved[-1] < rest for each in runs])
    return BoardFates(
        exact.float().mean(-1),
        (exact.any(1) & wrong).float().mean(-1),
        (wrong & still).float().mean(-1),
    )


def _filled(puzzles: Sequence[Puzzle]) -> list[Puzzle]:
    return [replace(puzzle, question=puzzle.answer) for puzzle in puzzles]


def _with_one_blank(puzzles: Sequence[Puzzle], generator: torch.Generator) -> list[Puzzle]:
    n_cells = len(puzzles[0].answer)
    blanks = torch.randint(n_cells, (len(puzzles),), generator=generator).tolist()
    return [
        replace(puzzle, question=f"{puzzle.answer[:blank]}.{puzzle.answer[blank + 1 :]}")
        for puzzle, blank in zip(puzzles, blanks, strict=True)
    ]


@torch.no_grad()
def _disturbed(solver: Solver, config: FixedPointsConfig, generator: torch.Generator) -> Cycles:
    """A second run that begins with the final states of a first one and noise."""
    model = solver.model
    state = model.advance(model.begin(solver.tokens, n_loops=config.n_loops))
    high, low = (
        part + config.noise * torch.randn(part.shape, generator=generator).to(part)
        for part in (state.resid, state.parts["low"])
    )
    return run_cycles(solver, config.n_loops, high, low)


def figure(record: BoardFates) -> go.Figure:
    """One line per kind of board."""
    plot = go.Figure()
    for i, (kind, shares) in enumerate(zip(KINDS, record.exact.tolist(), strict=True)):
        plot.add_scatter(
            x=list(range(1, len(shares) + 1)),
            y=shares,
            mode="lines+markers",
            name=kind,
            line={"color": CATEGORIES[i], "width": 2},
            hovertemplate=f"{kind}<br>%{{x}} cycles<br>right %{{y:.2f}}<extra></extra>",
        )
    plot.update_xaxes(title="cycles")
    plot.update_yaxes(title="share of right boards", range=[-0.02, 1.05], showgrid=True)
    return styled(plot, 420)


EXAMPLE = 'plots.fixed_points("mini/sudoku/trm", puzzles=5, n_loops=2)'
