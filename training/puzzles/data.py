"""The puzzles of a recipe, and the random copies of them that an update is offered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64

from loopscope.tasks.puzzles.boards import FIRST_DIGIT_ID, Puzzle, sudoku_tokens
from loopscope.tasks.puzzles.sudoku import Sudoku, make_sudokus
from loopscope.training.puzzles.recipes import SudokuTask
from loopscope.training.puzzles.supervision import Examples


@dataclass(frozen=True, eq=False)
class Copies:
    """Training puzzles, of which every update is offered random symmetric copies.

    Attributes:
        questions, answers: Int64[np.ndarray, "puzzle cell"], token ids.
        rules: Of the board.
    """

    questions: Int64[np.ndarray, "puzzle cell"]
    answers: Int64[np.ndarray, "puzzle cell"]
    rules: Sudoku

    def draw(self, count: int, rng: np.random.Generator) -> Examples:
        """Random puzzles, each with its cells moved by a symmetry and its digits renamed."""
        rows = rng.integers(len(self.questions), size=count)
        moved = self.rules.symmetries[rng.integers(len(self.rules.symmetries), size=count)]
        digits = np.tile(np.arange(FIRST_DIGIT_ID, FIRST_DIGIT_ID + self.rules.side), (count, 1))
        kept = np.tile(np.arange(FIRST_DIGIT_ID), (count, 1))
        names = np.concatenate([kept, rng.permuted(digits, axis=1)], axis=1)

        def copied(boards: Int64[np.ndarray, "puzzle cell"]) -> torch.Tensor:
            cells = np.take_along_axis(boards[rows], moved, axis=1)
            return torch.from_numpy(np.take_along_axis(names, cells, axis=1))

        none = torch.zeros(count, dtype=torch.int64, device="cpu")
        return Examples(copied(self.questions), copied(self.answers), none)


def puzzles_of(task: SudokuTask, *, held_out: bool) -> list[Puzzle]:
    """The training puzzles of a task, or its held-out ones."""
    clues = range(task.clues[0], task.clues[1] + 1)
    count = task.held_out if held_out else task.puzzles
    rules = Sudoku.of_side(task.side)
    return make_sudokus(rules, count, task.seed, held_out=held_out, clues=clues)


def copies_of(task: SudokuTask) -> Copies:
    """The training puzzles of a task as tokens."""
    puzzles = puzzles_of(task, held_out=False)
    return Copies(*as_tokens(puzzles), Sudoku.of_side(task.side))


def as_tokens(
    puzzles: Sequence[Puzzle],
) -> tuple[Int64[np.ndarray, "puzzle cell"], Int64[np.ndarray, "puzzle cell"]]:
    """Questions and answers as token ids."""
    return (
        sudoku_tokens([puzzle.question for puzzle in puzzles]),
        sudoku_tokens([puzzle.answer for puzzle in puzzles]),
    )
