"""The explorer's page of boards: its computations, its figures and its callbacks."""

from __future__ import annotations

from dataclasses import replace

import plotly.graph_objects as go
import pytest
import torch

from looks.marks import hard_to_see
from loopscope.analyses.common.configs import ExploreConfig, SourceConfig
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.explorer.app import make_explorer
from loopscope.analyses.explorer.boards.app import BoardExplorer, make_board_app, wires_of
from loopscope.analyses.explorer.boards.model import (
    BoardRun,
    Table,
    changed_clues,
    effect,
    judged,
    patched,
    run_board,
    table_of,
    wrong_cells,
)
from loopscope.analyses.explorer.boards.sentences import patch_sentence, relation_table
from loopscope.analyses.explorer.boards.view import (
    boards_figure,
    effect_figure,
    halting_figure,
    relation_means,
)
from loopscope.models.core.registry import build
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.models.families.puzzle_solvers.trm import TrmConfig
from loopscope.tasks.puzzles.boards import sudoku_text, sudoku_tokens
from loopscope.tasks.puzzles.sudoku import Sudoku
from loopscope.training.puzzles.supervision import with_prefix
from toy import assert_close, randomize_

pytestmark = pytest.mark.shapes

SMALL = Sudoku.of_side(4)
SOLVED = "2413132442313142"
PUZZLE, CHANGED = "2......4.23.3..2", "1......4.23.3..2"
LOOPS = 3


@pytest.fixture(scope="module")
def solver() -> PuzzleSolver:
    cfg = TrmConfig(
        n_layers=1, n_loops=LOOPS, n_cycles=2, n_low_loops=1, d_model=15, n_heads=3, d_mlp=14,
        d_vocab=6, n_prefix=1, n_ctx=17, positions="learned",
    )  # fmt: skip
    model = randomize_(build(cfg)).double()
    assert isinstance(model, PuzzleSolver)
    return model


@pytest.fixture
def made(solver: PuzzleSolver) -> BoardExplorer:
    table = table_of(Subject("toy", solver, {}, None, {}))
    assert table is not None
    puzzles = (replace(table.puzzles[0], question=PUZZLE, answer=SOLVED), *table.puzzles[1:])
    return BoardExplorer(Table(solver, SMALL, puzzles), LOOPS, LOOPS)


def tokens_of(model: PuzzleSolver, board: str) -> torch.Tensor:
    return with_prefix(model, torch.from_numpy(sudoku_tokens([board])))


# Computing


def test_each_board_is_that_of_a_run_of_so_many_iterations(solver: PuzzleSolver) -> None:
    run = run_board(solver, PUZZLE, LOOPS)
    for loop in range(LOOPS):
        logits = solver(tokens_of(solver, PUZZLE), n_loops=loop + 1)[0, 1:]
        assert run.boards[loop] == sudoku_text(logits.argmax(-1).tolist())
        assert_close(run.confidence[loop], logits.softmax(-1).amax(-1))
        assert_close(run.log_probs[loop], logits[:, 2:].log_softmax(-1))
    _, cache = solver.run_with_cache(
        tokens_of(solver, PUZZLE), n_loops=LOOPS, names_filter="loops.*.hook_halt_logit"
    )
    halting = [cache[f"loops.{loop}.hook_halt_logit"][0, 0].sigmoid() for loop in range(LOOPS)]
    assert_close(run.halting, torch.stack(halting))


@pytest.mark.parametrize("loop", range(LOOPS))
def test_a_patch_is_a_state_in_which_one_cell_is_another_runs(
    solver: PuzzleSolver, loop: int
) -> None:
    own, other = (run_board(solver, board, LOOPS) for board in (CHANGED, PUZZLE))
    found = patched(solver, CHANGED, own, other, loop, 5)
    ends = solver.iteration_ends(LOOPS)
    states = [
        solver.advance(solver.begin(tokens_of(solver, board), n_loops=LOOPS), ends[loop])
        for board in (CHANGED, PUZZLE)
    ]
    column = torch.arange(17)[None, :, None] == 6
    low = torch.where(column, states[1].parts["low"], states[0].parts["low"])
    state = replace(
        states[0],
        resid=torch.where(column, states[1].resid, states[0].resid),
        parts={**states[0].parts, "low": low},
    )
    for i, end in enumerate(ends[loop:]):
        state = solver.advance(state, end) if i else state
        assert_close(found.log_probs[i], solver.readout(state)[0, 1:, 2:].log_softmax(-1))
    assert len(found.boards) == LOOPS - loop
    moved = effect(own, found)
    assert moved[0].argmax() == 5
    assert (moved[0] > 1e-9).nonzero().tolist() == [[5]], "no iteration has run since"
    still = patched(solver, CHANGED, own, own, loop, 5)
    assert_close(effect(own, still), torch.zeros_like(moved))


def test_the_effect_is_the_divergence_of_the_digits(solver: PuzzleSolver) -> None:
    own, other = (run_board(solver, board, LOOPS) for board in (CHANGED, PUZZLE))
    p, q = own.log_probs.exp(), other.log_probs.exp()
    assert_close(effect(own, other), (p * (p / q).log()).sum(-1))
    with pytest.raises(ValueError, match=r"loop must be in 0\.\.2, got 3"):
        patched(solver, CHANGED, own, other, 3, 0)
    with pytest.raises(ValueError, match=r"cell must be in 0\.\.15, got 16"):
        patched(solver, CHANGED, own, other, 0, 16)


def test_what_clues_allow_is_said() -> None:
    one = judged(SMALL, PUZZLE)
    assert one.answer == SOLVED
    assert one.sentence == "One solution, which needs naked singles, 3 rounds."
    for board, words in (
        ("22......" + "." * 8, "2 stands twice in a box (row 0, column 0 and row 0, column 1)"),
        ("2.....2." + "." * 8, "several solutions"),
        ("123....4........", "No board has these clues"),
    ):
        found = judged(SMALL, board)
        assert words in found.sentence
        assert found.answer is None
    with pytest.raises(ValueError, match="got 16 cells and '7'"):
        judged(SMALL, "7" + "." * 15)


def test_a_search_without_end_is_given_up() -> None:
    hard = ".....5.8....6.1.43..........1.5........1.6...3.......553.....61........4........."
    assert "Not decided after 5000 guesses" in judged(Sudoku.of_side(9), hard).sentence


def test_a_changed_clue_is_shown_as_wrong() -> None:
    board, sure = "4" + SOLVED[1:], torch.full((1, 16), 0.9)
    run = BoardRun((board,), sure, torch.zeros(1, 16, 4), torch.zeros(1), torch.zeros(1, 1, 16, 8))
    assert SOLVED[0] == "2"
    (trace,) = boards_figure(SMALL, SOLVED[0] + "." * 15, SOLVED, run)["data"]
    assert trace["z"][0][0] == pytest.approx(-0.9)
    assert "changes the clue: says 4" in trace["hovertext"][0][0]


def test_wrong_cells_are_not_clues() -> None:
    board = "1" + SOLVED[1:15] + "3"
    assert wrong_cells(SMALL, "." * 16, board, SOLVED) == {0, 15}
    assert wrong_cells(SMALL, "1" + "." * 15, board, SOLVED) == {15}
    assert wrong_cells(SMALL, "." * 16, "1..1" + "." * 8 + "??..", None) == {0, 3}


def test_a_solver_is_known_by_its_sizes_and_its_card() -> None:
    shipped = table_of(open_subject(SourceConfig(checkpoint="mini/sudoku/trm6"), False))
    assert shipped is not None
    assert (shipped.rules.side, len(shipped.puzzles), shipped.puzzles[3].rating >= 0) == (
        6,
        30,
        True,
    )
    assert table_of(open_subject(SourceConfig(), False)) is None
    for changes in ({"n_ctx": 18}, {"d_vocab": 11}, {"n_ctx": None, "positions": "rope"}):
        cfg = {**TrmConfig.TINY, "n_layers": 1, "d_model": 32, "n_heads": 2, "d_mlp": 8}
        sizes = {**cfg, "d_vocab": 6, "n_prefix": 1, "n_ctx": 17, "n_loops": 1, **changes}
        assert table_of(Subject("toy", build(TrmConfig(**sizes)), {}, None, {})) is None


# Drawing


def test_boards_are_drawn_with_their_cells_and_relations(solver: PuzzleSolver) -> None:
    own, other = (run_board(solver, board, LOOPS) for board in (CHANGED, PUZZLE))
    drawn = go.Figure(boards_figure(SMALL, PUZZLE, SOLVED, other))
    assert len(drawn.data) == LOOPS
    for trace, board in zip(drawn.data, other.boards, strict=True):
        assert "".join(cell or "." for row in trace.text for cell in row) == board
        colors = [color for row in trace.z for color in row]
        wrong = wrong_cells(SMALL, PUZZLE, board, SOLVED) | changed_clues(PUZZLE, board)
        assert {i for i, color in enumerate(colors) if color < 0} == wrong
        kept = {0, 7, 9, 10, 12, 15} - changed_clues(PUZZLE, board)
        assert {i for i, color in enumerate(colors) if color > 1} == kept
    assert drawn.data[2].customdata[1][3] == "2 7"
    after = patched(solver, CHANGED, own, other, 1, 6)
    moved = effect(own, after)
    effects = go.Figure(effect_figure(SMALL, after, moved, 1, 6))
    assert hard_to_see(drawn) == hard_to_see(effects) == []
    assert [len(effects.data), effects.data[0].customdata[0][0]] == [2, "1 0"]
    hovers = [cell.split("<br>")[1] for row in effects.data[1].hovertext for cell in row]
    assert hovers[:4] == [
        "no row, column or box in common",
        "no row, column or box in common",
        "same box as the patched cell",
        "same box as the patched cell",
    ]
    assert hovers[4:7] == ["same row as the patched cell"] * 2 + ["the patched cell"]
    assert hovers[10] == "same column as the patched cell"
    means = relation_means(SMALL, moved, 6)
    assert means["same row as the patched cell"] == pytest.approx(moved[:, 4:6].mean(1).tolist())
    assert next(iter(means)) == "the patched cell"
    assert "loop 2" in str(relation_table(means, 1))
    assert [trace.name for trace in go.Figure(halting_figure(own, CHANGED, None)).data] == [
        "halting probability"
    ]
    curve = go.Figure(halting_figure(other, PUZZLE, SOLVED)).data[1]
    right = [sum(a == b for a, b in zip(board, SOLVED, strict=True)) for board in other.boards]
    clues = [sum(b[i] == PUZZLE[i] for i in (0, 7, 9, 10, 12, 15)) for b in other.boards]
    assert list(curve.y) == pytest.approx([(r - c) / 10 for r, c in zip(right, clues, strict=True)])


def test_a_patch_is_told_by_the_cells_that_it_changes(solver: PuzzleSolver) -> None:
    own = run_board(solver, PUZZLE, 2)
    assert "every cell says what it says without" in patch_sentence(SMALL, own, own, 0, 3)
    other = replace(own, boards=(own.boards[0], "x" * 5 + own.boards[1][5:]))
    said = patch_sentence(SMALL, own, other, 0, 3)
    assert f"row 0, column 0 from {own.boards[1][0]} to x; " in said
    assert said.endswith("; and 1 more.")


# The callbacks


def test_the_fields_hold_the_puzzle_and_their_changes_are_marked(made: BoardExplorer) -> None:
    cells = made.fill(0, None)
    assert "".join(cell or "." for cell in cells) == PUZZLE
    assert replace(made, first=CHANGED).fill(0, None)[0] == "1"
    assert replace(made, first=CHANGED).fill(0, 1)[0] == "2"
    asked, finding, wrong, stale, _, *looks = made.check(0, *cells)
    assert asked == {"puzzle": 0, "board": PUZZLE}
    assert (finding.startswith("One solution"), wrong, stale) == (True, "", "")
    assert [looks[0], looks[1]] == ["clue", ""]
    changed = made.check(0, "1", *cells[1:])
    assert (changed[0]["board"], changed[5]) == (CHANGED, "changed")
    for bad in ("7", "x"):
        refused = made.check(0, bad, *cells[1:])
        assert (refused[1], refused[3]) == ("", "stale")
        assert refused[2].endswith(f"'.' or '0', got 16 cells and {bad!r}.")


def test_answers_and_patches_are_drawn_and_timed(made: BoardExplorer) -> None:
    asked = {"puzzle": 0, "board": CHANGED}
    boards, halting, took = made.show_boards(asked, 2)
    assert (len(boards["data"]), len(go.Figure(halting).data)) == (2, 2)
    assert took.startswith("boards ")
    assert made.limit(2, 2)[1] is None
    assert [option["label"] for option in made.limit(2, 1)[0]] == ["loop 0", "loop 1"]
    figure, said, table, took = made.show_patch(1, 5, asked, LOOPS)
    assert (len(figure["data"]), took.startswith("patch ")) == (2, True)
    assert said.startswith("After loop 1 the states of row 1, column 1 are those of the unchanged")
    assert table is not None
    same = made.show_patch(1, 5, {"puzzle": 0, "board": PUZZLE}, LOOPS)
    assert "change a clue" in same[1]
    assert same[0]["data"] == []
    assert made.show_patch(None, 5, asked, LOOPS)[1] == ""
    click = {"points": [{"customdata": "1 5"}]}
    assert made.choose(click) == (1, 5, None)
    assert made.choose(None)[2] is None


def test_the_page_has_a_field_for_each_cell(made: BoardExplorer) -> None:
    subject = Subject("toy", made.table.model, {}, None, {})
    layout = str(make_board_app(subject, made.table, LOOPS, LOOPS, CHANGED).layout)
    ends = {end.split(".")[0] for wire in wires_of(16) for end in wire.outputs.split()}
    assert {key for key in ends if f"id='{key}'" not in layout} == set()
    with pytest.raises(ValueError, match=r"one board.*leave out second='<w_1>'"):
        make_explorer(ExploreConfig(checkpoint="mini/sudoku/trm", port=0, second="<w_1>"))
    with pytest.raises(ValueError, match="got 3 cells"):
        make_board_app(subject, made.table, LOOPS, LOOPS, "123")
