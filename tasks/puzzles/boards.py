"""A puzzle on a board, and how its cells are written as tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

PAD_ID, BLANK_ID = 0, 1  # padding never occurs on a board of full size
FIRST_DIGIT_ID = 2  # of the digit 1
SUDOKU_BLANKS = ".0"
MAZE_CHARACTERS = "# SGo"  # wall, free cell, start, goal, and a cell of the path


@dataclass(frozen=True)
class Puzzle:
    """A puzzle with its solution, row by row.

    Attributes:
        question: One character for each cell: "." or a digit of a Sudoku, "#", " ", "S" or "G" of a
            maze.
        answer: The solved board, in which each free cell of a maze's path is "o".
        rating: How hard the puzzle is; of ours, the guesses that a solver needs.
        source: Where the puzzle comes from.
    """

    question: str
    answer: str
    rating: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if len(self.question) != len(self.answer) or not self.question:
            raise ValueError(
                "a puzzle's question and answer must have one character for each cell, got"
                f" {len(self.question)} and {len(self.answer)}"
            )


def sudoku_tokens(boards: Sequence[str]) -> Int64[np.ndarray, "board cell"]:
    """Sudoku boards as token ids: 1 for a blank cell, and digit k as k + 1.

    Raises:
        ValueError: Boards of unequal size, or another character.
    """
    return _tokens(boards, {"0": 1, ".": 1, **{str(k): k + 1 for k in range(1, 10)}})


def maze_tokens(boards: Sequence[str]) -> Int64[np.ndarray, "board cell"]:
    """Mazes as token ids: "#" 1, " " 2, "S" 3, "G" 4 and "o" 5.

    Raises:
        ValueError: Boards of unequal size, or another character.
    """
    return _tokens(boards, {c: i + 1 for i, c in enumerate(MAZE_CHARACTERS)})


def sudoku_text(tokens: Sequence[int]) -> str:
    """A row of Sudoku tokens as a board; "?" is a token that no cell can hold."""
    return "".join(
        "." if t == BLANK_ID else str(t - 1) if BLANK_ID < t <= 10 else "?" for t in tokens
    )


def _tokens(boards: Sequence[str], ids: Mapping[str, int]) -> Int64[np.ndarray, "board cell"]:
    sizes = sorted({len(board) for board in boards})
    if len(sizes) != 1:
        raise ValueError(f"boards must all have one size, got {sizes} cells")
    unknown = sorted(set("".join(boards)) - set(ids))
    if unknown:
        raise ValueError(
            f"a board is written with the characters {''.join(ids)!r}, got {unknown[0]!r}"
        )
    return np.array([[ids[c] for c in board] for board in boards], dtype=np.int64)


def sudoku_words(side: int) -> tuple[str, ...]:
    """The words of Sudoku tokens in the order of their ids, as `Vocabulary` takes them."""
    return ("<pad>", "<.>", *(f"<{k}>" for k in range(1, side + 1)))


def sudoku_words_of(board: str, n_prefix: int = 0) -> str:
    """A Sudoku board in the words of `sudoku_words`, behind the columns of a prefix."""
    cells = ("<.>" if cell in SUDOKU_BLANKS else f"<{cell}>" for cell in board)
    return "<pad>" * n_prefix + "".join(cells)
