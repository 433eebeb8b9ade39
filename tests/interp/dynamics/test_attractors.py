"""Fixed points, cycles, restarts: on maps whose attractors are known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from family_toys import LOOPS as FAMILY_LOOPS
from family_toys import TOYS
from family_toys import full as family_batch
from loopscope.interp.dynamics.attractors import fixed_points
from loopscope.interp.dynamics.basins import Basins, _numbered, basins, restart_vote
from loopscope.interp.dynamics.path_independence import path_independence
from loopscope.models.core.hooks import Taps
from loopscope.models.core.state import Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, odd_one, padded, toy

pytestmark = pytest.mark.shapes
T = 12


class Mapped(RecurrentDepth):
    """An iteration is a rule on the state of each example, and the blocks are put aside."""

    rule = "halve"

    def embed(
        self, tokens: Tensor, positions: Tensor, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, _ = super().embed(tokens, positions, taps)
        return resid, {"start": resid, "input": resid.flip(-1)}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return resid, {**parts, "start": resid}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        before = parts["start"]
        moved = {
            "halve": parts["input"] + 0.5 * (before - parts["input"]),
            "turn": before.roll(before.shape[-1] // 5, -1),
            "sign": before.sign(),
            "grow": 2 * before,
        }
        return moved[self.rule], parts


def mapped(rule: str) -> Mapped:
    model = odd_one(Mapped)
    model.rule = rule
    return model


def test_a_contraction_settles_at_a_fixed_point() -> None:
    found = fixed_points(mapped("halve"), padded(), 20)
    assert found.period.tolist() == [1.0] * BATCH
    assert found.settled.all()
    until = found.iterations.long()
    for row in range(BATCH):
        after = found.residual[until[row] :, row]
        assert (after < 0.01).all()
        assert found.residual[until[row] - 1, row] >= 0.01
    assert found.frame()["residual"].tolist() == pytest.approx(found.residual[-1].tolist())
    assert len(found.plot().data) == BATCH


def test_a_turn_of_a_fifth_is_a_cycle_of_five() -> None:
    found = fixed_points(mapped("turn"), padded(), T, max_period=5)
    assert found.period.tolist() == [5.0] * BATCH
    assert found.iterations.tolist() == [0.0] * BATCH
    shorter = fixed_points(mapped("turn"), padded(), T, max_period=4)
    assert shorter.period.isnan().all()
    assert shorter.iterations.isnan().all()


def test_a_state_that_grows_settles_in_its_direction_alone() -> None:
    model = mapped("grow")
    assert not fixed_points(model, padded(), T).settled.any()
    assert fixed_points(model, padded(), T, space="direction").period.tolist() == [1.0] * BATCH


def test_residuals_stand_beside_accuracy() -> None:
    found = fixed_points(toy(), padded(), 5)
    answers = found.lens.top(1).tokens[-1, :, 0].clone()
    answers[2] = (answers[2] + 1) % 29
    table = found.by_answer(answers)
    assert table["examples"].tolist() == [2, 1]
    assert table["residual"][1] == pytest.approx(found.residual[-1, 2].item())
    assert table["auc"][0] in (0.0, 0.5, 1.0)
    last = found.residual[-1]
    assert table["residual"][0] == pytest.approx(last[:2].mean().item()), "the mean of the two"
    alone = found.by_answer(found.lens.top(1).tokens[-1, :, 0])
    assert alone["examples"].tolist() == [3, 0]
    assert math.isnan(alone["residual"][1])


def test_all_starts_of_a_contraction_end_in_one_state() -> None:
    found = basins(mapped("halve"), padded(), 4, 0.5, T)
    assert (found.basin == 0).all()
    assert found.same_state.tolist() == [1.0] * BATCH
    torch.testing.assert_close(found.moved[1:], torch.full((3, BATCH), 0.5).double())
    torch.testing.assert_close(found.distance[1:], found.distance[1:].clamp(max=0.01))
    assert (found.distance[0] == 0).all()


def test_signs_that_a_change_turns_over_are_other_basins() -> None:
    model = mapped("sign")
    found = basins(model, padded(), 5, 3.0, 3, batch_size=2)
    assert (found.basin[0] == 0).all()
    assert found.basin.max() > 1, "starts that differ from one another are told apart"
    assert (found.residual == 0).all(), "every start rests"
    assert len(found.plot().data) == 2
    near = basins(model, padded(), 3, 1e-9, 3)
    assert (near.basin == 0).all()
    assert list(found.frame()) == [
        "start", "example", "moved", "distance", "basin", "residual", "answer",
    ]  # fmt: skip


def test_states_are_numbered_by_the_first_of_each_number() -> None:
    """Small steps do not join states that are far from one another."""
    states = torch.tensor([1.0, 1.08, 1.16, 2.0, 1.24])[:, None, None]
    assert _numbered(states, 0.1).flatten().tolist() == [0, 0, 1, 2, 1]


def record(answers: list[list[int]], residual: list[list[float]]) -> Basins:
    empty = torch.zeros(len(answers), len(answers[0]))
    return Basins(
        "state", 0.01, empty, empty, empty.long(), torch.tensor(residual), torch.tensor(answers)
    )


def test_a_vote_counts_runs_and_takes_the_steadiest() -> None:
    found = record([[4, 1], [7, 2], [7, 3]], [[0.3, 0.1], [0.2, 0.4], [0.1, 0.01]]).vote()
    assert found.majority.tolist() == [7, 1], "of equally frequent answers the first"
    assert found.steadiest.tolist() == [7, 3]
    assert found.share.tolist() == pytest.approx([2 / 3, 1 / 3])
    table = found.accuracy([7, 1])
    assert table["accuracy"].tolist() == [0.5, 1.0, 0.5]
    assert table[["gained", "lost"]].values.tolist() == [[0, 0], [1, 0], [1, 1]]
    with pytest.raises(ValueError, match="one token per row is needed: there are 2 rows"):
        found.accuracy([7, 1, 2])


def test_a_restart_vote_is_that_of_the_basins(plain: RecurrentDepth) -> None:
    voted = restart_vote(plain, padded(), 3, 0.2, 3)
    expected = basins(plain, padded(), 3, 0.2, 3).vote()
    assert voted.frame().equals(expected.frame())
    assert len(voted.plot().data) == 1


def test_a_model_that_draws_its_first_state_draws_it_again() -> None:
    model = TOYS["huginn"].make()
    batch = family_batch(TOYS["huginn"], model)
    found = basins(model, batch, 3, None, FAMILY_LOOPS, seed=6)
    other = replace(batch, options={"seed": 7})
    logits = model(other, n_loops=FAMILY_LOOPS)[torch.arange(3), batch.readout]
    assert found.answers[1].tolist() == logits.argmax(-1).tolist()
    assert (found.moved[1:] > 0.5).all(), "another draw, not a small change"


def test_no_restart_is_the_run_itself() -> None:
    model = TOYS["huginn"].make()
    batch = replace(family_batch(TOYS["huginn"], model), options={"seed": 7})
    assert (basins(model, batch, 4, None, 2, seed=5).moved[1:] > 0.5).all()


def test_the_path_does_not_matter_to_a_contraction_to_its_input() -> None:
    found = path_independence(mapped("halve"), padded(lengths=(5, 5, 5)), 40, batch_size=2)
    assert found.other.tolist() == [2, 0, 1]
    torch.testing.assert_close(found.cosine, torch.ones(BATCH).double(), rtol=0, atol=1e-9)
    assert found.same_answer.all()
    kept = path_independence(mapped("turn"), padded(lengths=(5, 5, 5)), 40)
    assert (kept.cosine < 0.9).all()
    assert len(kept.plot().data) == 1
    assert list(kept.frame()) == ["example", "other", "cosine", "distance", "same_answer"]


def test_what_has_no_attractor_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="receive nothing of the input except the state"):
        path_independence(plain, padded(lengths=(5, 5, 5)), 3)
    with pytest.raises(ValueError, match="must have one length, got lengths from 2 to 5; run"):
        path_independence(plain, padded(lengths=(5, 2, 4)), 3)
    with pytest.raises(ValueError, match="at least 2 examples, got 1"):
        path_independence(plain, padded()[:1], 3)
    with pytest.raises(ValueError, match=r"n_starts must be at least 2, got 1"):
        basins(plain, padded(), 1)
    with pytest.raises(ValueError, match="scale must be finite and above 0, got -1"):
        basins(plain, padded(), 2, -1)
    with pytest.raises(ValueError, match="try a smaller max_period or more iterations"):
        fixed_points(plain, padded(), 3, max_period=4)


def test_a_first_state_of_zeros_is_changed_after_one_iteration() -> None:
    model = TOYS["spiral"].make()
    batch = family_batch(TOYS["spiral"], model)
    assert not model.begin(batch.tokens, n_loops=3).resid.any()
    found = basins(model, batch, 3, 0.25, 3)
    torch.testing.assert_close(
        found.moved[1:], torch.full((2, BATCH), 0.25).double(), rtol=1e-9, atol=0
    )
    assert (found.distance[1:] > 0).all()
    with pytest.raises(ValueError, match="the state of example 0 is zeros, so no share of its"):
        restart_vote(model, batch, 3, 0.25, 1)
