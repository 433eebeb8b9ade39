"""How hard a Sudoku puzzle is, by the reasoning that it needs: single candidates, single places, or
guesses, and in how many rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_

from loopscope.tasks.puzzles.sudoku import Sudoku

NAKED, HIDDEN, GUESSES = NEEDS = ("naked singles", "hidden singles", "guesses")


@dataclass(frozen=True, order=True)
class Grade:
    """The difficulty of a puzzle; an easier one is smaller.

    Attributes:
        level: 0 where naked singles fill the board (cells with one candidate), 1 where hidden
            singles are needed too (digits with one place in a row, a column or a box), 2 where both
            leave blank cells, so that digits must be guessed.
        rounds: Rounds that singles take, where each round fills all cells that the board before it
            decides. At level 2 the rounds until nothing is decided any more.
    """

    level: int
    rounds: int

    @property
    def needs(self) -> str:
        """The hardest reasoning that the puzzle needs: one of `NEEDS`."""
        return NEEDS[self.level]

    def __str__(self) -> str:
        return f"{self.needs}, {self.rounds} round{'s' * (self.rounds != 1)}"


def grade(rules: Sudoku, board: str) -> Grade:
    """The difficulty of a puzzle.

    Args:
        board: One character for each cell, "." or "0" where it is blank; of a puzzle that has a
            solution.

    Raises:
        ValueError: Another number of cells, or a digit that the board does not have.
    """
    rounds = 0
    for level in (0, 1):
        masks, rounds = _filled(rules, rules.masks(board), hidden=level == 1)
        if all(map(_is_filled, masks)):
            return Grade(level, rounds)
    return Grade(2, rounds)


def _filled(rules: Sudoku, masks: list[int], *, hidden: bool) -> tuple[list[int], int]:
    """The board after rounds of singles, and how many rounds filled a cell."""
    rounds = 0
    while found := _singles(rules, masks, hidden=hidden):
        masks = [found.get(cell, mask) for cell, mask in enumerate(masks)]
        rounds += 1
    return masks, rounds


def _singles(rules: Sudoku, masks: list[int], *, hidden: bool) -> dict[int, int]:
    """The digit, as a bit, of each blank cell that the filled cells decide."""
    left = {
        cell: mask & ~_union(masks[peer] for peer in rules.peers[cell] if _is_filled(masks[peer]))
        for cell, mask in enumerate(masks)
        if not _is_filled(mask)
    }
    found = {cell: mask for cell, mask in left.items() if _is_filled(mask)}
    return found | _hidden_singles(rules, left) if hidden else found


def _hidden_singles(rules: Sudoku, left: dict[int, int]) -> dict[int, int]:
    """The digit of each blank cell that alone can hold it in a row, a column or a box.

    Args:
        left: The candidates of the blank cells.
    """
    found = {}
    for house in rules.houses:
        blank = [cell for cell in house if cell in left]
        for cell in blank:
            only = left[cell] & ~_union(left[other] for other in blank if other != cell)
            if _is_filled(only):
                found[cell] = only
    return found


def _is_filled(mask: int) -> bool:
    return mask.bit_count() == 1


def _union(masks: Iterable[int]) -> int:
    return reduce(or_, masks, 0)
