"""Scores of a puzzle solver: the cells and the boards that are right, and its halting logit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.common.ranking import top_token
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import Puzzle
from loopscope.tasks.puzzles.grades import grade
from loopscope.tasks.puzzles.sudoku import Sudoku
from loopscope.training.puzzles.data import as_tokens
from loopscope.training.puzzles.supervision import with_prefix


@dataclass(frozen=True)
class PuzzleScores:
    """The right cells and boards after each supervision step.

    Attributes:
        cells: Float[Tensor, "loop puzzle"], the share of right cells.
        exact: Bool[Tensor, "loop puzzle"], whether every cell is right.
        halting: Float[Tensor, "loop puzzle"], the halting logit.
    """

    cells: Float[Tensor, "loop puzzle"]
    exact: Bool[Tensor, "loop puzzle"]
    halting: Float[Tensor, "loop puzzle"]


@torch.no_grad()
def score(model: PuzzleSolver, puzzles: Sequence[Puzzle], n_loops: int) -> PuzzleScores:
    """The scores of one run of `n_loops` supervision steps on some puzzles."""
    questions, answers = (torch.from_numpy(x).to(model.device) for x in as_tokens(puzzles))
    state = model.begin(with_prefix(model, questions), n_loops=n_loops)
    right, halting = [], []
    for end in model.iteration_ends(n_loops):
        state = model.advance(state, end)
        right.append(top_token(model.readout(state)[:, model.cfg.n_prefix :]) == answers)
        halting.append(model.halt(state.resid[:, 0])[:, 0].float())
    found = torch.stack(right)
    return PuzzleScores(found.float().mean(-1), found.all(-1), torch.stack(halting))


def by_grade(
    exact: Bool[Tensor, " puzzle"], puzzles: Sequence[Puzzle]
) -> dict[str, dict[str, int | float]]:
    """For each grade, the easiest first, the number of Sudoku puzzles and the share solved."""
    rules = Sudoku.of_side(math.isqrt(len(puzzles[0].answer)))
    grades = [grade(rules, puzzle.question) for puzzle in puzzles]
    found: dict[str, dict[str, int | float]] = {}
    for each in sorted(set(grades)):
        of = exact[torch.tensor([one == each for one in grades], device=exact.device)]
        found[str(each)] = {"puzzles": len(of), "exact": round(float(of.float().mean()), 4)}
    return found


def examined(
    model: PuzzleSolver, puzzles: Sequence[Puzzle], n_loops: int
) -> dict[str, list[float] | dict[str, dict[str, int | float]]]:
    """The scores that a card holds: the share of puzzles solved after each supervision step, and
    after the last one by grade.
    """
    exact = score(model, puzzles, n_loops).exact
    shares = [round(share, 4) for share in exact.float().mean(1).tolist()]
    return {"exact": shares, "exact_by_grade": by_grade(exact[-1], puzzles)}
