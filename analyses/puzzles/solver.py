"""The puzzle solver under study with its held-out puzzles, and what it says after every cycle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.interp.common.precision import widened
from loopscope.interp.common.ranking import top_token
from loopscope.models.core.state import checked_loops
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import Puzzle, sudoku_tokens
from loopscope.tasks.puzzles.files import read_csv
from loopscope.tasks.puzzles.grades import Grade, grade
from loopscope.tasks.puzzles.sudoku import Sudoku
from loopscope.training.puzzles.supervision import with_prefix


@dataclass(frozen=True, kw_only=True)
class SolverConfig(SourceConfig):
    """A puzzle solver and how long it runs."""

    checkpoint: Annotated[str, tyro.conf.Positional] = "mini/sudoku/trm"
    """A puzzle solver whose card.json holds Sudoku puzzles: a name, a file or a folder."""
    data: Path | None = None
    """Sudoku puzzles to solve instead: a CSV file with the columns source, question, answer and
    rating, as the data set Sudoku-Extreme has them.
    """
    n_loops: int | None = None
    """Supervision steps; by default what the checkpoint records."""


@dataclass(frozen=True)
class Solver:
    """A puzzle solver and the puzzles to solve.

    Attributes:
        model: In eval mode.
        puzzles: Held out in training.
        tokens: Int[Tensor, "puzzle pos"], the questions behind the prefix.
        answers: Int[Tensor, "puzzle cell"].
    """

    model: PuzzleSolver
    puzzles: tuple[Puzzle, ...]
    tokens: Int[Tensor, "puzzle pos"]
    answers: Int[Tensor, "puzzle cell"]

    @property
    def cells(self) -> slice:
        """The columns of the cells."""
        return slice(self.model.cfg.n_prefix, None)

    @property
    def rules(self) -> Sudoku:
        """The rules of the board."""
        return Sudoku.of_side(math.isqrt(self.answers.shape[1]))

    @property
    def grades(self) -> tuple[Grade, ...]:
        """How hard each puzzle is."""
        return tuple(grade(self.rules, puzzle.question) for puzzle in self.puzzles)


@dataclass(frozen=True)
class Cycles:
    """A run, read after every high cycle.

    Attributes:
        boards: Int[Tensor, "cycle puzzle cell"], the top token of each cell.
        halting: Float[Tensor, "cycle puzzle"], the halting logit.
        moved: Float[Tensor, "cycle puzzle"], the distance of the high state from that before the
            cycle, as a share of its norm.
    """

    boards: Int[Tensor, "cycle puzzle cell"]
    halting: Float[Tensor, "cycle puzzle"]
    moved: Float[Tensor, "cycle puzzle"]


def open_solver(config: SolverConfig, count: int) -> Solver:
    """The checkpoint that a config names, with its first `count` held-out Sudoku puzzles, or those
    of the config's CSV file.

    Raises:
        ValueError: It is no puzzle solver, there are no puzzles, or they are of another size.
    """
    subject = open_subject(replace(config, data=None), needs_questions=False)
    model, stored = subject.model, subject.card.get("held_out_puzzles") or ()
    puzzles = read_csv(config.data) if config.data else [Puzzle(**each) for each in stored]
    if not isinstance(model, PuzzleSolver) or not puzzles:
        raise ValueError(
            f"{config.checkpoint} must be a puzzle solver with held_out_puzzles in its card.json,"
            f" or with puzzles in --data, got a {model.cfg.family} model"
            f" {'with' if puzzles else 'without'} them; take mini/sudoku/trm"
        )
    if count < 1:
        raise ValueError(f"at least one puzzle is needed, got {count}")
    cells, known = len(puzzles[0].question), model.cfg.n_ctx
    if known is not None and cells != known - model.cfg.n_prefix:
        raise ValueError(
            f"{config.checkpoint} solves boards of {known - model.cfg.n_prefix} cells, got puzzles"
            f" of {cells}"
        )
    return solver_of(model, puzzles[:count])


def solver_of(model: PuzzleSolver, puzzles: Sequence[Puzzle]) -> Solver:
    """A model with some Sudoku puzzles."""
    questions, answers = (
        torch.from_numpy(sudoku_tokens(boards)).to(model.device)
        for boards in (
            [puzzle.question for puzzle in puzzles],
            [puzzle.answer for puzzle in puzzles],
        )
    )
    return Solver(model, tuple(puzzles), with_prefix(model, questions), answers)


@torch.no_grad()
def run_cycles(
    solver: Solver,
    n_loops: int | None,
    high: Float[Tensor, "puzzle pos d_model"] | None = None,
    low: Float[Tensor, "puzzle pos d_model"] | None = None,
) -> Cycles:
    """Run all puzzles at once and read after every cycle.

    Args:
        n_loops: Supervision steps; None means what the checkpoint records.
        high, low: States to begin with; None for the checkpoint's own.
    """
    model = solver.model
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    state = model.begin(solver.tokens, n_loops=n_loops, high=high, low=low)
    ends = [visit.index + 1 for visit in model.schedule(n_loops) if _ends_cycle(visit.name, model)]
    boards, halting, moved, before = [], [], [], state.resid
    for end in ends:
        state = model.advance(state, end)
        boards.append(top_token(model.readout(state)[:, solver.cells]))
        halting.append(widened(model.halt(state.resid[:, 0]))[:, 0])
        now = widened(state.resid).flatten(1)
        moved.append((now - widened(before).flatten(1)).norm(dim=1) / now.norm(dim=1))
        before = state.resid
    return Cycles(torch.stack(boards), torch.stack(halting), torch.stack(moved))


def first_states(solver: Solver, seed: int, restart: int) -> tuple[Tensor | None, Tensor | None]:
    """The high and the low state of a restart: one random vector for each position, the same for
    every puzzle; None for the checkpoint's own, with which restart 0 begins.
    """
    if restart == 0:
        return None, None
    generator = torch.Generator().manual_seed(1_000_003 * seed + restart)
    shape = (2, solver.tokens.shape[1], solver.model.cfg.d_model)
    high, low = torch.randn(shape, generator=generator).to(solver.model.embedding)
    rows = len(solver.tokens)
    return high.expand(rows, -1, -1), low.expand(rows, -1, -1)


def _ends_cycle(name: str, model: PuzzleSolver) -> bool:
    """Whether a visit is the last one of a high run."""
    return name.endswith(f".high.blocks.{len(model.stacks['high']) - 1}")
