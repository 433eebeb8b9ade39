"""Puzzles: the rules of Sudoku, puzzles with one solution, symmetric copies, and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loopscope.tasks.puzzles import sudoku
from loopscope.tasks.puzzles.boards import (
    Puzzle,
    maze_tokens,
    sudoku_text,
    sudoku_tokens,
    sudoku_words,
    sudoku_words_of,
)
from loopscope.tasks.puzzles.files import read_arrays, read_csv, write_arrays, write_csv
from loopscope.tasks.puzzles.grades import Grade, grade
from loopscope.tasks.puzzles.mazes import make_maze, solve_maze
from loopscope.tasks.puzzles.sudoku import Sudoku, make_sudokus

pytestmark = pytest.mark.shapes

SMALL, WIDE = Sudoku.of_side(4), Sudoku.of_side(6)


@pytest.fixture(scope="module")
def wide() -> list[Puzzle]:
    return [WIDE.make(np.random.default_rng(seed)) for seed in range(5)]


def test_a_solver_fills_the_forced_cells_without_a_guess() -> None:
    found = SMALL.solve("2......4.23.3..2")
    assert found.boards == ("2413132442313142",)
    assert found.guesses == 0


def test_a_solver_counts_solutions_and_guesses() -> None:
    assert len(SMALL.solve("." * 16, most=300).boards) == 288
    assert len(SMALL.solve("." * 16).boards) == 2
    two = SMALL.solve("12" + "34" + "." * 12, most=99)
    assert len(two.boards) == 288 // 24
    assert two.guesses >= 1
    assert SMALL.solve("11" + "." * 14).boards == ()


def test_a_made_puzzle_has_one_solution_and_no_clue_too_many(wide: list[Puzzle]) -> None:
    for puzzle in wide:
        found = WIDE.solve(puzzle.question)
        assert found.boards == (puzzle.answer,)
        assert WIDE.solve(puzzle.question, most=1).guesses == puzzle.rating
        digits = np.array(list(puzzle.answer)).reshape(6, 6)
        for lines in (digits, digits.T):
            assert all(set(line) == set("123456") for line in lines)
        for cell in [i for i, clue in enumerate(puzzle.question) if clue != "."]:
            fewer = puzzle.question[:cell] + "." + puzzle.question[cell + 1 :]
            assert len(WIDE.solve(fewer).boards) == 2


def test_more_clues_are_left_where_more_are_asked_for() -> None:
    puzzle = WIDE.make(np.random.default_rng(3), clues=20)
    assert 36 - puzzle.question.count(".") == 20


def test_houses_are_rows_columns_and_boxes() -> None:
    assert WIDE.houses[0] == (0, 1, 2, 3, 4, 5)
    assert WIDE.houses[7] == (1, 7, 13, 19, 25, 31)
    assert WIDE.houses[13] == (3, 4, 5, 9, 10, 11)
    assert len(WIDE.houses) == 18


def test_relations_name_the_box_before_the_line() -> None:
    names = {0: "self", 1: "box", 2: "box", 3: "row", 6: "box", 8: "box", 12: "column", 13: "none"}
    assert {cell: WIDE.relation(0, cell) for cell in names} == names


def test_a_grade_says_what_a_puzzle_needs_and_for_how_many_rounds() -> None:
    solved = "2413132442313142"
    assert grade(SMALL, solved) == Grade(0, 0)
    one_round = f"{solved[:5]}..{solved[7:]}"
    assert str(grade(SMALL, one_round)) == "naked singles, 1 round"
    assert str(grade(SMALL, "2......4.23.3..2")) == "naked singles, 3 rounds"
    found = [
        grade(WIDE, board)
        for board in (
            ".....3.45.1..1.2...2...4........6..5",
            "21.........5..3........66..4..1...5.",
            "3......26..32.........6..153.....4..",
        )
    ]
    assert found == [Grade(0, 6), Grade(1, 5), Grade(2, 2)] == sorted(found)
    assert [each.needs for each in found] == ["naked singles", "hidden singles", "guesses"]
    assert WIDE.solve("21.........5..3........66..4..1...5.").guesses == 1
    with pytest.raises(ValueError, match="got 15 cells"):
        grade(SMALL, "." * 15)


def test_every_puzzle_of_4_rows_with_one_solution_needs_naked_singles_alone() -> None:
    """A clue more never takes a naked single away, so it is enough to grade the puzzles of which no
    clue can be spared; and symmetries leave two solved boards.
    """
    grids = SMALL.solve("." * 16, most=300).boards
    classes = [SMALL.canonical(grid) for grid in grids]
    subsets, copies = np.arange(1 << 16), 0
    for kind, board in dict(zip(classes, grids, strict=True)).items():
        is_one = np.ones(1 << 16, dtype=bool)
        for other in grids:
            differs = sum(1 << i for i in range(16) if board[i] != other[i])
            is_one &= (subsets & differs != 0) | (differs == 0)
        spare = [(subsets >> i & 1 == 1) & is_one[subsets & ~(1 << i)] for i in range(16)]
        for kept in np.flatnonzero(is_one & ~np.any(spare, axis=0)).tolist():
            clues = "".join(digit if kept >> i & 1 else "." for i, digit in enumerate(board))
            assert grade(SMALL, clues).level == 0, clues
            copies += classes.count(kind)
    assert copies == 85_632, "as others have counted them"


@pytest.mark.parametrize("rules", [SMALL, WIDE], ids=["4", "6"])
def test_symmetries_keep_solutions_and_the_class(rules: Sudoku) -> None:
    rng = np.random.default_rng(2)
    puzzle = rules.make(rng)
    assert len(np.unique(rules.symmetries, axis=0)) == {4: 128, 6: 3456}[rules.side]
    names = rng.permutation(rules.side) + 1
    for move in rules.symmetries[rng.integers(len(rules.symmetries), size=5)]:
        question, answer = (
            "".join(board[i] if board[i] == "." else str(names[int(board[i]) - 1]) for i in move)
            for board in (puzzle.question, puzzle.answer)
        )
        assert rules.solve(question).boards == (answer,)
        assert rules.canonical(question) == rules.canonical(puzzle.question)
    other = rules.make(rng)
    assert other.question.count(".") == puzzle.question.count(".") or rules.canonical(
        other.question
    ) != rules.canonical(puzzle.question)


def test_no_training_puzzle_is_a_copy_of_a_held_out_one() -> None:
    clues = (6, 7, 8)
    train = make_sudokus(SMALL, 30, 0, held_out=False, clues=clues)
    test = make_sudokus(SMALL, 7, 0, held_out=True, clues=clues)
    assert not {SMALL.canonical(p.question) for p in train} & {
        SMALL.canonical(p.question) for p in test
    }
    assert len({p.question for p in train}) == 30
    assert make_sudokus(SMALL, 20, 0, held_out=False, clues=clues) == train[:20]


def test_more_puzzles_than_there_are_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full board of 4 rows is one of 288."""
    monkeypatch.setattr(sudoku, "_DRAWS", 30)
    with pytest.raises(ValueError, match="289 distinct puzzles are asked for, but 30 draws after"):
        make_sudokus(SMALL, 289, 0, held_out=False, clues=(16,))


def test_boards_are_tokens_as_the_public_data_sets_write_them() -> None:
    assert sudoku_tokens(["1.30", "4321"]).tolist() == [[2, 1, 4, 1], [5, 4, 3, 2]]
    assert maze_tokens(["# SGo"]).tolist() == [[1, 2, 3, 4, 5]]
    assert sudoku_text([2, 1, 5, 0]) == "1.4?"
    assert sudoku_words(4) == ("<pad>", "<.>", "<1>", "<2>", "<3>", "<4>")
    assert sudoku_words_of("1.0", 2) == "<pad><pad><1><.><.>"


def test_what_is_no_board_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a board has 16 cells.*got 15 cells"):
        SMALL.solve("." * 15)
    with pytest.raises(ValueError, match=r"got 16 cells and '5'"):
        SMALL.solve("5" + "." * 15)
    with pytest.raises(ValueError, match="one size, got \\[1, 2\\] cells"):
        sudoku_tokens(["1", "12"])
    with pytest.raises(ValueError, match="written with the characters '# SGo', got 'x'"):
        maze_tokens(["x"])
    with pytest.raises(ValueError, match="one character for each cell, got 2 and 1"):
        Puzzle("12", "1")
    with pytest.raises(ValueError, match="4, 6 or 9 rows, got 5"):
        Sudoku.of_side(5)
    with pytest.raises(ValueError, match="no fewer columns than rows"):
        Sudoku(3, 2)
    with pytest.raises(ValueError, match="most must be at least 1 solution, got 0"):
        SMALL.solve("." * 16, most=0)
    with pytest.raises(ValueError, match="too many to be listed"):
        _ = Sudoku.of_side(9).symmetries


# Mazes


def test_a_maze_is_a_tree_with_one_way() -> None:
    puzzle = make_maze(9, np.random.default_rng(4))
    free = [i for i, c in enumerate(puzzle.question) if c != "#"]
    doors = sum((i + 1 in free) + (i + 9 in free) for i in free)
    assert doors == len(free) - 1
    assert solve_maze(puzzle.question) == puzzle.answer
    assert puzzle.rating == puzzle.answer.count("o")
    assert puzzle.answer.replace("o", " ") == puzzle.question


def test_a_way_is_the_shortest_one() -> None:
    assert solve_maze("S   " + " ## " + " ## " + "G   ") == "S   " + "o## " + "o## " + "G   "
    with pytest.raises(ValueError, match="must have a way from S to G"):
        solve_maze("S##G")
    with pytest.raises(ValueError, match="got 4 cells with 2 S and 0 G"):
        solve_maze("SS  ")
    with pytest.raises(ValueError, match="odd and at least 5, got 6"):
        make_maze(6, np.random.default_rng(0))


# Files


def test_csv_files_are_read_as_they_are_written(tmp_path: Path) -> None:
    puzzles = [Puzzle("1.", "12", 3, "a,b"), Puzzle(".1", "21", 5, "c")]
    write_csv(puzzles, tmp_path / "train.csv")
    assert read_csv(tmp_path / "train.csv") == puzzles
    assert read_csv(tmp_path / "train.csv", least_rating=4) == puzzles[1:]
    (tmp_path / "bad.csv").write_text("source,question,answer,rating\nx,1.,12,hard\n")
    with pytest.raises(ValueError, match=r"bad.csv, line 2: .*'hard'"):
        read_csv(tmp_path / "bad.csv")
    (tmp_path / "other.csv").write_text("q,a\n")
    with pytest.raises(ValueError, match="must have the columns source, question, answer, rating"):
        read_csv(tmp_path / "other.csv")


def test_arrays_are_those_that_the_reference_reads(tmp_path: Path) -> None:
    puzzles = [Puzzle("1.", "12"), Puzzle(".1", "21"), Puzzle("..", "12")]
    write_arrays(puzzles, tmp_path / "train", sudoku_tokens)
    inputs, labels = read_arrays(tmp_path / "train")
    assert inputs.tolist() == [[2, 1], [1, 2], [1, 1]]
    assert labels.tolist() == [[2, 3], [3, 2], [2, 3]]
    about = json.loads((tmp_path / "train" / "dataset.json").read_text())
    assert (about["vocab_size"], about["seq_len"], about["total_groups"]) == (11, 2, 3)
    assert np.load(tmp_path / "train" / "all__puzzle_indices.npy").tolist() == [0, 1, 2, 3]
    np.save(tmp_path / "train" / "all__labels.npy", np.ones((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match=r"one shape, got \[3, 2\] and \[2, 2\]"):
        read_arrays(tmp_path / "train")
    np.save(tmp_path / "train" / "all__labels.npy", np.ones(2))
    with pytest.raises(ValueError, match=r"whole numbers \[example, cell\], got float64 \[2\]"):
        read_arrays(tmp_path / "train")
    with pytest.raises(ValueError, match="at least one puzzle, got none"):
        write_arrays([], tmp_path / "none", maze_tokens)
