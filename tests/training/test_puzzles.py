"""Training of puzzle solvers: the loss, the gradients, resuming, and the exported checkpoints."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import Puzzle
from loopscope.training.puzzles.data import copies_of
from loopscope.training.puzzles.recipes import PUZZLE_RECIPES, PuzzleRecipe, SudokuTask
from loopscope.training.puzzles.scores import by_grade, examined
from loopscope.training.puzzles.supervision import (
    Carry,
    Draws,
    Examples,
    next_rows,
    run_step,
    stable_max_cross_entropy,
    supervise,
)
from loopscope.training.puzzles.trainer import PuzzleTrainer, fresh_solver, train_solver
from loopscope.training.runs import train
from toy import assert_close

pytestmark = pytest.mark.shapes

RECIPE = PuzzleRecipe(
    name="tiny",
    task=SudokuTask(puzzles=12, held_out=5, clues=(6, 8)),
    n_layers=1,
    d_model=12,
    n_heads=3,
    d_mlp=14,
    n_loops=3,
    first=2,
    updates=5,
    batch_size=4,
    eval_every=2,
    eval_questions=3,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("puzzles") / "run"
    before = torch.get_rng_state()
    train_solver(RECIPE, folder)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers go on"
    return folder


def test_tasks_that_cannot_be_trained_are_refused() -> None:
    with pytest.raises(ValueError, match=r"side must be 4 or 6 .* got 9"):
        SudokuTask(side=9)
    for clues in ((0, 4), (8, 6), (4, 17)):
        with pytest.raises(ValueError, match="from 1 to 16, got"):
            SudokuTask(clues=clues)


def test_stable_max_is_the_share_of_a_piecewise_size() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0], [-3.0, 2.0, 5.0]])
    found = stable_max_cross_entropy(logits, torch.tensor([2, -100]))
    assert found.tolist() == pytest.approx([-math.log(0.5 / 3.5), 0.0])


@pytest.mark.parametrize("solver", ["trm", "hrm"])
def test_gradients_pass_through_the_last_runs_only(solver: str) -> None:
    model = fresh_solver(replace(RECIPE, solver=solver)).double()
    cells = torch.randint(1, 6, (3, 16), generator=torch.Generator().manual_seed(1))
    rows = next_rows(
        model, Carry.empty(model, 3, 16), Examples(cells, cells, torch.zeros(3, dtype=torch.int64))
    )
    whole, part = run_step(model, rows, whole=True), run_step(model, rows)
    assert_close(part.resid, whole.resid)
    state = model.begin(torch.nn.functional.pad(cells, (1, 0)), n_loops=1)
    with torch.no_grad():
        before = model.advance(state, f"loops.0.{model.trained_from}")
    held = replace(before, resid=before.resid.detach())
    wanted = model.advance(held).resid

    def gradient(resid: Tensor) -> Tensor:
        model.zero_grad()
        (resid * torch.arange(resid.shape[-1])).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    own = gradient(part.resid)
    assert_close(own, gradient(wanted))
    assert (own - gradient(whole.resid)).norm() > 0.1 * own.norm()


def test_a_row_that_goes_on_keeps_its_states_and_its_puzzle() -> None:
    model = fresh_solver(RECIPE)
    rows = Carry.empty(model, 2, 16)
    nan = torch.full_like(rows.high, torch.nan)
    fresh = Examples(
        torch.full((2, 16), 3), torch.full((2, 16), 4), torch.zeros(2, dtype=torch.int64)
    )
    began = next_rows(model, replace(rows, high=nan, low=nan), fresh)
    assert began.high.isfinite().all()
    assert torch.equal(began.cells, fresh.cells)
    goes_on = replace(began, halted=torch.tensor([True, False]), steps=torch.tensor([3, 2]))
    other = Examples(fresh.cells + 1, fresh.labels + 1, fresh.puzzle)
    after = next_rows(model, replace(goes_on, high=goes_on.high + 1), other)
    assert after.steps.tolist() == [0, 2]
    assert after.cells[:, 0].tolist() == [4, 3]
    assert_close(after.high[0, 0], model.high_init)
    assert_close(after.high[1, 0], model.high_init + 1)


@pytest.mark.parametrize("max_steps", [1, 3])
def test_the_continue_logit_learns_the_value_of_the_next_step(max_steps: int) -> None:
    model = fresh_solver(replace(RECIPE, solver="hrm")).double()
    with torch.no_grad():
        model.halt.weight.normal_(generator=torch.Generator().manual_seed(2))
    cells = torch.randint(1, 6, (4, 16), generator=torch.Generator().manual_seed(1))
    fresh = Examples(cells, cells, torch.zeros(4, dtype=torch.int64))
    draws = Draws(torch.ones(4), torch.full((4,), 2))
    after, done = supervise(
        model, Carry.empty(model, 4, 16), fresh, draws, max_steps=max_steps, exploration=0.1
    )
    halt, go_on = model.halt(run_step(model, after).resid[:, 0]).unbind(-1)
    wanted = halt if max_steps == 1 else torch.maximum(halt, go_on)
    assert_close(done.target, wanted.sigmoid().detach())
    stops = done.halting[:, 0] > done.halting[:, 1]
    assert after.halted.tolist() == ([True] * 4 if max_steps == 1 else stops.tolist())


def test_draws_stay_between_two_steps_and_the_last() -> None:
    least = Draws.make(200, 5, torch.Generator().manual_seed(0)).least
    assert (int(least.min()), int(least.max())) == (2, 5)


def test_copies_are_right_puzzles() -> None:
    copies = copies_of(RECIPE.task)
    drawn = copies.draw(9, np.random.default_rng(1))
    for question, answer in zip(drawn.cells.tolist(), drawn.labels.tolist(), strict=True):
        board = "".join("." if t == 1 else str(t - 1) for t in question)
        assert copies.rules.solve(board).boards == ("".join(str(t - 1) for t in answer),)


def test_a_run_writes_both_checkpoints_with_the_averaged_weights(finished: Path) -> None:
    trainer = PuzzleTrainer(RECIPE, finished, resume=True)
    last = load(finished / "final")
    assert isinstance(last, PuzzleSolver)
    average = trainer.learner.average.state_dict()
    for name, tensor in last.state_dict().items():
        assert torch.equal(tensor, average[name]), name
    card = json.loads((finished / "final" / "card.json").read_text())
    told = examined(last, trainer.held_out, RECIPE.n_loops)
    assert {name: card[name] for name in told} == told
    assert sum(each["puzzles"] for each in card["exact_by_grade"].values()) == 5
    assert load(finished / "first").cfg == last.cfg
    text = "<pad>" + "<.>" * 16
    assert last.encode([text]).tokens.shape == (1, 17)


def test_scores_are_counted_by_grade() -> None:
    easy, hard = (
        Puzzle("2413132442313.42", "2413132442313142"),
        Puzzle("2......4.23.3..2", "2413132442313142"),
    )
    found = by_grade(torch.tensor([True, True, False]), [hard, easy, easy])
    assert list(found) == ["naked singles, 1 round", "naked singles, 3 rounds"]
    assert found["naked singles, 1 round"] == {"puzzles": 2, "exact": 0.5}


def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    stopped = PuzzleTrainer(RECIPE, tmp_path / "run")
    stopped.step()
    stopped.step()
    stopped.save()
    stopped.log.close()
    train_solver(RECIPE, tmp_path / "run", resume=True)
    for stage in ("first", "final"):
        one, other = (
            load(finished / stage).state_dict(),
            load(tmp_path / "run" / stage).state_dict(),
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_command_knows_the_recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PUZZLE_RECIPES, "tiny", RECIPE)
    with pytest.raises(ValueError, match="no released layout to write"):
        train("tiny", tmp_path, release=True)
    with pytest.raises(ValueError, match=r"there is no recipe 'none'.*mini/sudoku/trm"):
        train("none", tmp_path)
    with pytest.raises(ValueError, match="first must be above 0 and below updates"):
        replace(RECIPE, first=5)
