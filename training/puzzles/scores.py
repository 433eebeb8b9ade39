"""Scores of a puzzle solver: the cells and the boards that are right, and its halting logit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.common.ranking import top_token
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import Puzzle
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


def by_rating(exact: Bool[Tensor, " puzzle"], puzzles: Sequence[Puzzle]) -> dict[str, float]:
    """The share of puzzles of each rating that are solved."""
    ratings = torch.tensor([puzzle.rating for puzzle in puzzles])
    return {
        str(rating): round(float(exact[ratings == rating].float().mean()), 4)
        for rating in sorted(set(ratings.tolist()))
    }
