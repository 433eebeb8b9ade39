"""The figures of puzzle solvers, on the shipped miniature."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopscope.analyses.figures.puzzles import cell_patch, fixed_points, sudoku
from loopscope.analyses.puzzles.solver import open_solver, run_cycles
from loopscope.checkpoints.locate import SHIPPED
from loopscope.tasks.puzzles.files import write_csv
from loopscope.tasks.puzzles.grades import Grade
from loopscope.training.puzzles.scores import examined, score


@pytest.fixture(scope="module")
def record() -> sudoku.SudokuRecord:
    return sudoku.run(sudoku.SudokuConfig(puzzles=15, restarts=3, n_loops=3, boards=4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini/sudoku/trm", "mini/sudoku/trm6"])
def test_a_miniature_solves_what_its_card_says(name: str) -> None:
    solver = open_solver(sudoku.SudokuConfig(checkpoint=name), 300)
    card = json.loads((SHIPPED / name / "card.json").read_text())
    told = examined(solver.model, solver.puzzles, card["n_loops"])
    assert told["exact"] == pytest.approx(card["exact"], abs=0.004), "one puzzle of 300"
    assert list(told["exact_by_grade"]) == list(card["exact_by_grade"])
    assert told["exact"][-1] > 0.98


def test_the_miniature_solves_nine_of_ten_held_out_puzzles() -> None:
    solver = open_solver(sudoku.SudokuConfig(), 60)
    assert score(solver.model, solver.puzzles, 8).exact[-1].float().mean() >= 0.9


@pytest.mark.shapes
def test_cycles_are_read_as_the_model_reads_its_steps(record: sudoku.SudokuRecord) -> None:
    solver = open_solver(sudoku.SudokuConfig(), 15)
    scores = score(solver.model, solver.puzzles, 3)
    cycles = run_cycles(solver, 3)
    assert torch.equal((cycles.boards == solver.answers).all(-1)[1::2], scores.exact)
    assert torch.equal(cycles.halting[1::2], scores.halting)
    assert torch.equal(record.exact[0, 1::2], scores.exact)
    assert record.exact.shape == (3, 6, 15)


@pytest.mark.shapes
def test_more_restarts_never_solve_fewer(record: sudoku.SudokuRecord) -> None:
    table = record.frame().pivot_table(index="cycles", columns="restarts", values="any")
    assert (table.diff(axis=1).iloc[:, 1:] >= 0).all().all()
    assert (record.frame()["chosen"] <= record.frame()["any"]).all()
    assert record.summary()["puzzles"].sum() == 15


def test_the_halting_head_is_compared_with_the_solved_puzzles(
    record: sudoku.SudokuRecord,
) -> None:
    logit = torch.tensor([math.log(3.0)])
    worked = replace(
        record,
        exact=torch.tensor([[[True, False]] * 3 + [[True, True]]]),
        halting=torch.stack([torch.zeros(2), torch.cat([logit, -logit])] * 2)[None],
        n_cycles=2,
    ).calibration()
    assert worked["loop"].tolist() == [0, 1]
    assert worked["halting"].tolist() == pytest.approx([0.5, 0.5])
    assert worked["solved"].tolist() == [0.5, 1.0]
    assert worked["error"].tolist() == pytest.approx([1 / 16, (1 / 16 + 9 / 16) / 2])
    assert worked["halted"].tolist() == [0.5, 0.5]
    assert worked["right"].tolist() == [1.0, 1.0]
    assert len(record.calibration()) == 3


def test_grades_are_lines_of_the_figure(record: sudoku.SudokuRecord) -> None:
    def lines(shown: sudoku.SudokuRecord) -> list[str]:
        drawn = sudoku.figure(shown).data
        return [trace.name for trace in drawn if trace.legend == "legend3"]

    assert [line.partition(" (")[0] for line in lines(record)] == list(record.by_grade())
    grades = (Grade(2, 3), Grade(0, 4), Grade(0, 2)) * 5
    mixed = replace(record, grades=grades)
    assert lines(mixed) == ["naked singles (10)", "guesses (5)"]
    assert mixed.summary()["needs"].tolist() == ["naked singles", "guesses"]
    assert mixed.summary()["puzzles"].tolist() == [10, 5]


def test_the_boards_are_drawn_with_clues_and_cells(record: sudoku.SudokuRecord) -> None:
    drawn = sudoku.figure(record)
    boards = [trace for trace in drawn.data if trace.text and trace.textfont.color]
    assert len(boards) == 1 + len(record.boards)
    for trace, board in zip(boards[1:], record.boards, strict=True):
        assert "".join(trace.text) == board
        wrong = [i for i, (a, b) in enumerate(zip(board, record.answer, strict=True)) if a != b]
        red = [i for i, color in enumerate(trace.textfont.color) if color == sudoku.MARK]
        assert red == [i for i in wrong if record.question[i] == "."]


@pytest.mark.shapes
def test_a_cell_acts_most_on_itself_and_on_related_cells() -> None:
    found = cell_patch.run(cell_patch.CellPatchConfig(puzzles=3, n_loops=3))
    effect = dict(zip(cell_patch.RELATIONS, found.kl.mean(0).tolist(), strict=True))
    assert effect["self"] > effect["row"] > effect["none"] > 0
    assert len(cell_patch.figure(found).data) == len(cell_patch.RELATIONS)
    assert len(found.frame()) == 2 * len(cell_patch.RELATIONS)


@pytest.mark.shapes
def test_boards_at_rest_and_boards_that_are_left() -> None:
    config = fixed_points.FixedPointsConfig(puzzles=9, n_loops=3)
    found = fixed_points.run(config)
    assert found.exact.shape == (len(fixed_points.KINDS), 6)
    assert (found.exact[2, -1] > 0.8, found.exact[3, -1] > 0.8) == (True, True)
    assert len(fixed_points.figure(found).data) == len(found.summary()) == len(fixed_points.KINDS)
    solver = open_solver(config, 3)
    wrong = (solver.answers[:1] + 1).expand(4, 3, -1)
    boards = torch.stack([solver.answers, solver.answers, solver.answers, wrong[0]])
    boards[3, 0] = solver.answers[0]
    moved = torch.tensor([1.0, 0.5, 0.5, 0.01])[:, None].expand(4, 3).clone()
    moved[3, 2] = 0.5
    run = fixed_points.Cycles(boards, torch.zeros(4, 3), moved)
    worked = fixed_points.measure(solver, [run] * 4, rest=0.05)
    assert worked.exact[0].tolist() == pytest.approx([1, 1, 1, 1 / 3])
    assert worked.left.tolist() == pytest.approx([2 / 3] * 4)
    assert worked.spurious.tolist() == pytest.approx([1 / 3] * 4)


def test_puzzles_may_come_from_a_file(tmp_path: Path) -> None:
    own = open_solver(sudoku.SudokuConfig(), 3)
    write_csv(own.puzzles[1:], tmp_path / "some.csv")
    given = open_solver(sudoku.SudokuConfig(data=tmp_path / "some.csv"), 9)
    assert given.puzzles == own.puzzles[1:]
    assert torch.equal(given.tokens, own.tokens[1:])
    with pytest.raises(ValueError, match="trm6 solves boards of 36 cells, got puzzles of 16"):
        sudoku.run(sudoku.SudokuConfig(checkpoint="mini/sudoku/trm6", data=tmp_path / "some.csv"))


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a puzzle solver.*take mini/sudoku/trm"):
        sudoku.run(sudoku.SudokuConfig(checkpoint="mini/multi_hop/r2"))
    with pytest.raises(ValueError, match="one of the 3 puzzles, from 0, got 3"):
        sudoku.run(sudoku.SudokuConfig(puzzles=3, shown=3))
    with pytest.raises(ValueError, match="restarts and boards must be at least 1"):
        sudoku.run(sudoku.SudokuConfig(puzzles=3, restarts=0))
    with pytest.raises(ValueError, match="noise and rest must be at least 0, got -1"):
        fixed_points.run(fixed_points.FixedPointsConfig(noise=-1.0))
    with pytest.raises(ValueError, match="n_loops must be above 1, got 1"):
        cell_patch.run(cell_patch.CellPatchConfig(puzzles=3, n_loops=1))
