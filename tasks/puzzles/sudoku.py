"""Sudoku of any box size: its rules, a generator of puzzles with one solution, and the symmetries
that make two puzzles the same one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product

import numpy as np
from jaxtyping import Int64

from loopscope.tasks.puzzles.boards import SUDOKU_BLANKS, Puzzle
from loopscope.tasks.puzzles.search import Search, Solutions

_HELD_OUT_SHARE = 10  # one class of puzzles in so many is held out
_DRAWS = 2000  # without a new puzzle, after which no more are expected


@dataclass(frozen=True)
class Sudoku:
    """The rules of one size of board.

    Attributes:
        box_rows, box_columns: Cells of a box; the board has their product in each row and column.
    """

    box_rows: int
    box_columns: int

    def __post_init__(self) -> None:
        if not (2 <= self.box_rows <= self.box_columns and self.side <= 9):
            raise ValueError(
                "a box must have at least 2 rows, no fewer columns than rows and at most 9 cells,"
                f" got {self.box_rows} x {self.box_columns}"
            )

    @classmethod
    def of_side(cls, side: int) -> Sudoku:
        """The rules of a board of 4, 6 or 9 rows.

        Raises:
            ValueError: Another side.
        """
        boxes = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
        if side not in boxes:
            raise ValueError(f"a Sudoku has 4, 6 or 9 rows, got {side}")
        return cls(*boxes[side])

    @property
    def side(self) -> int:
        """Rows of the board, and digits."""
        return self.box_rows * self.box_columns

    @cached_property
    def units(self) -> Int64[np.ndarray, "kind cell"]:
        """The row, the column and the box of each cell."""
        cells = np.arange(self.side**2)
        row, column = cells // self.side, cells % self.side
        box = row // self.box_rows * self.box_rows + column // self.box_columns
        return np.stack([row, column, box])

    @cached_property
    def houses(self) -> tuple[tuple[int, ...], ...]:
        """The cells of every row, every column and every box."""
        return tuple(
            tuple(np.flatnonzero(kind == i).tolist())
            for kind in self.units
            for i in range(self.side)
        )

    @cached_property
    def peers(self) -> tuple[tuple[int, ...], ...]:
        """For each cell the other cells of its row, column and box."""
        same = (self.units[:, :, None] == self.units[:, None, :]).any(0)
        np.fill_diagonal(same, False)
        return tuple(tuple(np.flatnonzero(row).tolist()) for row in same)

    def relation(self, cell: int, other: int) -> str:
        """How two cells are related: "self", "box", "row", "column" or "none"; cells of one row and
        one box are of one "box".
        """
        if cell == other:
            return "self"
        row, column, box = self.units[:, cell] == self.units[:, other]
        return "box" if box else "row" if row else "column" if column else "none"

    def solve(self, board: str, most: int = 2, guesses: int | None = None) -> Solutions:
        """Search for solutions: a cell with one candidate is filled; where there is none, the cell
        with the fewest candidates is tried with each, the smallest first.

        Args:
            board: One character for each cell, "." or "0" where it is blank.
            most: Stop after so many solutions.
            guesses: Give up after so many; None never does.

        Raises:
            SearchLimit: The search took more guesses.
            ValueError: Another number of cells, a digit that the board does not have, or a `most`
                below 1.
        """
        if most < 1:
            raise ValueError(f"most must be at least 1 solution, got {most}")
        search = Search(self.side, self.peers, limit=guesses)
        found = []
        for solution in search.from_masks(self.masks(board)):
            found.append(solution)
            if len(found) == most:
                break
        return Solutions(tuple(found), search.guesses_at_first)

    def make(self, rng: np.random.Generator, clues: int | None = None) -> Puzzle:
        """A random puzzle with exactly one solution, rated by the guesses that it needs.

        Args:
            clues: Clues to leave, or more where fewer would allow a second solution; None takes
                away all that can be taken away.
        """
        answer = self._random_solution(rng)
        cells = list(answer)
        for cell in rng.permutation(len(cells)).tolist():
            if clues is not None and len(cells) - cells.count(".") <= clues:
                break
            digit, cells[cell] = cells[cell], "."
            if len(self.solve("".join(cells)).boards) > 1:
                cells[cell] = digit
        question = "".join(cells)
        return Puzzle(question, answer, self.solve(question, most=1).guesses, f"sudoku{self.side}")

    @cached_property
    def symmetries(self) -> Int64[np.ndarray, "symmetry cell"]:
        """The permutations of cells that keep the rules: the cell from which each one is taken.

        Rows change places inside their band, bands with each other, likewise columns; boards with
        square boxes are also transposed. Raises ValueError for boards of 9 rows, which have
        millions.
        """
        if self.side > 6:
            raise ValueError("the symmetries of a board of 9 rows are too many to be listed")
        rows, columns = (
            _orders(groups, size)
            for groups, size in (
                (self.box_columns, self.box_rows),
                (self.box_rows, self.box_columns),
            )
        )
        grid = np.arange(self.side**2).reshape(self.side, self.side)
        found = [grid[np.ix_(r, c)] for r, c in product(rows, columns)]
        if self.box_rows == self.box_columns:
            found += [board.T for board in found]
        return np.stack([board.ravel() for board in found])

    def canonical(self, board: str) -> bytes:
        """A board's class: the same for two boards exactly if symmetries and a renaming of digits
        make one of the other.
        """
        digits = np.array([0 if c in SUDOKU_BLANKS else int(c) for c in board])
        copies = digits[self.symmetries]
        filled = np.argsort(-np.where(copies > 0, 1, 0), axis=1, kind="stable")
        names = np.zeros((len(copies), self.side + 1), dtype=np.int64)
        rows = np.arange(len(copies))
        for k in range(int((digits > 0).sum())):  # name digits in the order of their first cell
            digit = copies[rows, filled[:, k]]
            new = names[rows, digit] == 0
            names[rows[new], digit[new]] = names[new].max(1) + 1
        renamed = np.take_along_axis(names, copies, axis=1).astype(np.uint8)
        return bytes(renamed[np.lexsort(renamed.T[::-1])[0]])

    def is_held_out(self, board: str) -> bool:
        """Whether a puzzle is one of the tenth, by class, that no training set may hold."""
        return zlib.crc32(self.canonical(board)) % _HELD_OUT_SHARE == 0

    def _random_solution(self, rng: np.random.Generator) -> str:
        search = Search(self.side, self.peers, rng)
        return next(search.from_masks([(1 << self.side) - 1] * self.side**2))

    def masks(self, board: str) -> list[int]:
        """The digits that each cell may hold, as bits: one for a clue, all for a blank."""
        known = {**dict.fromkeys(SUDOKU_BLANKS, (1 << self.side) - 1)}
        known |= {str(k + 1): 1 << k for k in range(self.side)}
        wrong = sorted(set(board) - set(known))
        if wrong or len(board) != self.side**2:
            raise ValueError(
                f"a board has {self.side**2} cells, each a digit from 1 to {self.side}, '.' or"
                f" '0', got {len(board)} cells{f' and {wrong[0]!r}' if wrong else ''}"
            )
        return [known[c] for c in board]


def make_sudokus(
    rules: Sudoku,
    count: int,
    seed: int,
    *,
    held_out: bool,
    clues: Sequence[int | None] = (None,),
) -> list[Puzzle]:
    """Distinct random puzzles of the held-out classes, or of the others.

    Args:
        seed: The same puzzles for the same seed; a longer list begins with the shorter one.
        clues: As in `Sudoku.make`, one of these drawn for each puzzle.

    Raises:
        ValueError: Fewer such puzzles than asked for, as it seems after many draws in vain.
    """
    rng = np.random.default_rng((seed, rules.side, int(held_out)))
    found: dict[str, Puzzle] = {}
    in_vain = 0
    while len(found) < count:
        puzzle = rules.make(rng, clues[int(rng.integers(len(clues)))])
        in_vain += 1
        if puzzle.question not in found and rules.is_held_out(puzzle.question) == held_out:
            found[puzzle.question], in_vain = puzzle, 0
        if in_vain == _DRAWS:
            raise ValueError(
                f"{count} distinct puzzles are asked for, but {_DRAWS} draws after the"
                f" {len(found)} found ones gave no new one; ask for fewer puzzles or fewer clues"
            )
    return list(found.values())


def _orders(groups: int, size: int) -> list[list[int]]:
    """The orders of lines that keep groups of lines together."""
    inside = list(permutations(range(size)))
    return [
        [
            group * size + line
            for group, within in zip(outer, chosen, strict=True)
            for line in within
        ]
        for outer in permutations(range(groups))
        for chosen in product(inside, repeat=groups)
    ]
