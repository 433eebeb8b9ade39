"""The computations of the page of boards: functions of a solver and a board, without a browser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.subject import Subject
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.precision import widened
from loopscope.models.core.state import State
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import (
    FIRST_DIGIT_ID,
    SUDOKU_BLANKS,
    Puzzle,
    sudoku_text,
    sudoku_tokens,
)
from loopscope.tasks.puzzles.grades import grade
from loopscope.tasks.puzzles.search import SearchLimit
from loopscope.tasks.puzzles.sudoku import Sudoku
from loopscope.training.puzzles.supervision import with_prefix

SIDES = (4, 6, 9)
PUZZLES = 30  # to choose from
GUESSES = 5000  # of the search for a board's solutions, about a second
MADE, CLUES = 3, {4: 6, 6: 14, 9: 30}  # puzzles where the checkpoint has none, and their clues


@dataclass(frozen=True)
class Table:
    """A Sudoku solver with puzzles to begin with.

    Attributes:
        model: In eval mode.
        rules: Of its board.
        puzzles: Held out in training, where the checkpoint's card has them; otherwise random ones.
    """

    model: PuzzleSolver
    rules: Sudoku
    puzzles: tuple[Puzzle, ...]


@dataclass(frozen=True)
class BoardRun:
    """The answers of a board after each of some iterations.

    Attributes:
        boards: The board after each, as text.
        confidence: Float[Tensor, "loop cell"], the probability of each cell's top token.
        log_probs: Float[Tensor, "loop cell digit"], of the digits alone.
        halting: Float[Tensor, " loop"], the halting probability.
        states: Float[Tensor, "loop level pos d_model"], the high and the low state.
    """

    boards: tuple[str, ...]
    confidence: Float[Tensor, "loop cell"]
    log_probs: Float[Tensor, "loop cell digit"]
    halting: Float[Tensor, " loop"]
    states: Float[Tensor, "loop level pos d_model"]


@dataclass(frozen=True)
class Judged:
    """The boards that the clues of a board allow.

    Attributes:
        sentence: The finding.
        answer: The one solution; None where there are none or several.
    """

    sentence: str
    answer: str | None


def table_of(subject: Subject) -> Table | None:
    """The Sudoku solver of a checkpoint; None where it is none."""
    model = subject.model
    if not isinstance(model, PuzzleSolver) or model.cfg.n_ctx is None:
        return None
    side = math.isqrt(model.cfg.n_ctx - model.cfg.n_prefix)
    fits = side**2 == model.cfg.n_ctx - model.cfg.n_prefix
    if side not in SIDES or not fits or model.cfg.d_vocab != FIRST_DIGIT_ID + side:
        return None
    rules = Sudoku.of_side(side)
    stored = subject.card.get("held_out_puzzles") or []
    puzzles = [Puzzle(**each) for each in stored[:PUZZLES]]
    return Table(model, rules, tuple(puzzles or _made(rules)))


def _made(rules: Sudoku) -> list[Puzzle]:
    rng = np.random.default_rng(0)
    return [rules.make(rng, CLUES[rules.side]) for _ in range(MADE)]


@lru_cache(maxsize=64)
def judged(rules: Sudoku, board: str) -> Judged:
    """How many solutions the clues of a board allow, and whether they contradict each other.

    Raises:
        ValueError: Another number of cells, or a digit that the board does not have.
    """
    rules.masks(board)
    clash = twice(rules, board)
    if clash:
        a, b = clash[0]
        return Judged(
            f"The clues contradict each other: {board[a]} stands twice in a {rules.relation(a, b)}"
            f" ({spot(rules, a)} and {spot(rules, b)}), so there is nothing right to compare with.",
            None,
        )
    try:
        found = rules.solve(board, guesses=GUESSES).boards
    except SearchLimit:
        return Judged(
            f"Not decided after {GUESSES} guesses whether a board has these clues, so no answer"
            " counts as wrong unless it breaks the rules.",
            None,
        )
    if len(found) == 1:
        return Judged(f"One solution, which needs {grade(rules, board)}.", found[0])
    if found:
        return Judged("The clues have several solutions, so no answer counts as wrong unless it"
                      " breaks the rules.", None)  # fmt: skip
    return Judged("No board has these clues, so there is nothing right to compare with.", None)


def twice(rules: Sudoku, board: str) -> list[tuple[int, int]]:
    """The pairs of cells of one row, column or box that hold the same digit."""
    return [
        (cell, peer)
        for cell, digit in enumerate(board)
        for peer in rules.peers[cell]
        if cell < peer and digit == board[peer] and digit.isdigit() and digit != "0"
    ]


def wrong_cells(rules: Sudoku, question: str, board: str, answer: str | None) -> set[int]:
    """The blank cells of a question that a board fills wrongly: against the one solution, or where
    that is not known against the rules.
    """
    wrong = (
        {cell for pair in twice(rules, board) for cell in pair}
        if answer is None
        else {cell for cell, digit in enumerate(board) if digit != answer[cell]}
    )
    return {cell for cell in wrong if question[cell] in SUDOKU_BLANKS}


def changed_clues(question: str, board: str) -> set[int]:
    """The clues of a question for which a board gives another digit."""
    clues = [(cell, clue) for cell, clue in enumerate(question) if clue not in SUDOKU_BLANKS]
    return {cell for cell, clue in clues if board[cell] != clue}


def spot(rules: Sudoku, cell: int) -> str:
    """A cell's place in words."""
    return f"row {cell // rules.side}, column {cell % rules.side}"


@torch.no_grad()
def run_board(model: PuzzleSolver, question: str, n_loops: int) -> BoardRun:
    """The answers of a board after each iteration, from one run.

    Raises:
        ValueError: Boards that `sudoku_tokens` refuses.
    """
    tokens = _tokens(model, question)
    state = model.begin(tokens, n_loops=n_loops)
    return _read(model, state, model.iteration_ends(n_loops))


@torch.no_grad()
def patched(
    model: PuzzleSolver, question: str, own: BoardRun, other: BoardRun, loop: int, cell: int
) -> BoardRun:
    """The answers of a board when after one loop both states of one cell are those of another run;
    the first of them is of the states so patched, before any further iteration.

    Args:
        own, other: The runs of the board and of the other one, of equally many iterations.

    Raises:
        ValueError: No such loop or no such cell.
    """
    n_loops = len(own.boards)
    one_in_range("loop", loop, n_loops)
    one_in_range("cell", cell, len(question))
    column = model.cfg.n_prefix + cell
    states = own.states[loop].clone()
    states[:, column] = other.states[loop, :, column]
    high, low = states.unsqueeze(1)
    left = max(1, n_loops - loop - 1)
    state = model.begin(_tokens(model, question), n_loops=left, high=high, low=low)
    ends = model.iteration_ends(left) if loop < n_loops - 1 else []
    return _read(model, state, [0, *ends])


def _tokens(model: PuzzleSolver, question: str) -> Tensor:
    return with_prefix(model, torch.from_numpy(sudoku_tokens([question])).to(model.device))


def _read(model: PuzzleSolver, state: State, ends: Sequence[int]) -> BoardRun:
    """The answers of a run of one board, read at some visits."""
    boards, confidence, digits, halting, states = [], [], [], [], []
    for end in ends:
        state = model.advance(state, end)
        parts = model.state_parts(state)
        logits = widened(model.unembed(parts["high"][:, model.cfg.n_prefix :])[0])
        top = logits.softmax(-1).max(-1)
        boards.append(sudoku_text(top.indices.tolist()))
        confidence.append(top.values)
        digits.append(logits[:, FIRST_DIGIT_ID:].log_softmax(-1))
        halting.append(widened(model.halt(parts["high"][0, 0]))[0].sigmoid())
        states.append(torch.cat([parts["high"], parts["low"]]))
    read = map(torch.stack, (confidence, digits, halting, states))
    return BoardRun(tuple(boards), *read)


def effect(before: BoardRun, after: BoardRun) -> Float[Tensor, "loop cell"]:
    """KL divergence of each cell's digits in one run from those in another, in nats, after each of
    the iterations that the second run has.
    """
    own, other = before.log_probs[-len(after.boards) :], after.log_probs
    return (own.exp() * (own - other)).sum(-1)
