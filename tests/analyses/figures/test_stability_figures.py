"""Exponents, attractors and edited schedules of the shipped checkpoint: the figures against the
methods.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from family_toys import TOYS, position_solver
from family_toys import full as family_batch
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.dynamics import attractors, lyapunov, schedule_edit
from loopscope.interp.dynamics.basins import restart_vote
from loopscope.interp.dynamics.growth import finite_time_exponent
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import padded, toy

LOOPS = 12


@pytest.fixture(scope="module")
def followed() -> lyapunov.Lyapunov:
    return lyapunov.run(lyapunov.LyapunovConfig(n_loops=LOOPS, per_hop=8, deepest=2))


@pytest.mark.slow
def test_the_exponents_are_those_of_the_method(followed: lyapunov.Lyapunov) -> None:
    assert followed.hops == (15,) * 8 + (16,) * 8
    asked = open_inputs(lyapunov.LyapunovConfig(per_hop=8))
    group = asked.group(16)
    found = finite_time_exponent(asked.subject.model, group.batch, LOOPS, space="direction")
    torch.testing.assert_close(followed.exponent[8:], found.exponent)
    answers = asked.answers(group).ids
    assert followed.right[8:].tolist() == found.lens.correct(answers)[-1].tolist()
    torch.testing.assert_close(followed.margin[8:], found.lens.margin(answers)[LOOPS // 2 - 1])
    assert 0 < int(followed.right.sum()) < 16
    assert followed.summary()["inputs"].sum() == len(followed.frame()) == 16


@pytest.mark.slow
def test_shares_are_means_that_sum_to_the_mean_exponent(followed: lyapunov.Lyapunov) -> None:
    for answer, chosen in enumerate((followed.right, ~followed.right)):
        total = followed.shares[answer].sum(1).mean()
        torch.testing.assert_close(total, followed.exponent[chosen].mean(), rtol=0, atol=1e-5)


@pytest.mark.shapes
def test_right_and_wrong_answers_are_drawn_apart(followed: lyapunov.Lyapunov) -> None:
    right, wrong, *shares = lyapunov.figure(followed).data
    assert len(right.x) == int(followed.right.sum())
    assert sorted(wrong.y) == pytest.approx(sorted(followed.exponent[~followed.right].tolist()))
    assert len(shares) == 2 * len(followed.sublayers)
    assert lyapunov.SECTION.found(followed) == str(followed.separation)


@pytest.mark.shapes
def test_ends_of_restarts_are_those_of_the_methods() -> None:
    config = attractors.AttractorsConfig(n_loops=6, hops=7, per_hop=6, n_starts=3)
    record, asked = attractors.run(config), open_inputs(config)
    group = asked.group(7)
    vote = restart_vote(asked.subject.model, group.batch, 3, None, 6)
    answers = asked.answers(group).ids
    assert record.right[0].tolist() == (vote.single == answers).tolist()
    assert record.right[1].tolist() == (vote.majority == answers).tolist()
    assert record.summary()["inputs"].tolist() == [
        int(record.right[0].sum()), int((~record.right[0]).sum()),
    ]  # fmt: skip
    bars = attractors.figure(record).data[-1]
    assert list(bars.y)[:3] == pytest.approx(record.right.double().mean(1).tolist())
    assert bars.y[4] == pytest.approx(record.same_answer.mean().item())
    assert "Of 3 starts the majority is right for" in attractors.SECTION.found(record)


@pytest.mark.shapes
def test_skipping_any_iteration_of_a_model_whose_iterations_are_alike_is_one_less() -> None:
    record = schedule_edit.run(schedule_edit.ScheduleEditConfig(n_loops=4, hops=4, per_hop=20))
    skipped = record.values[record.edits.index("skip loop")]
    repeated = record.values[record.edits.index("repeat loop")]
    assert skipped.tolist() == [record.fewer] * 4
    assert repeated.tolist() == [record.more] * 4
    frozen = record.values[record.edits.index("freeze loop")]
    assert frozen[0].isnan()
    assert not frozen[1:].isnan().any()
    assert "Which iteration is skipped does not matter" in schedule_edit.SECTION.found(record)
    uneven = replace(
        record, values=torch.linspace(0, 1, record.values.numel()).view_as(record.values)
    )
    assert "Skipping an iteration leaves 0.00 (loop 0) to" in schedule_edit.SECTION.found(uneven)
    (cells,) = schedule_edit.figure(record).data
    assert list(cells.y)[-1] == "skip loop"
    assert list(cells.z[-1]) == skipped.tolist()


def test_edits_that_a_family_cannot_run_are_left_empty() -> None:
    """The passes of this family but the first read messages of the pass before."""
    model = TOYS["inkling2_loop"].make()
    batch = family_batch(TOYS["inkling2_loop"], model)
    group = Group(None, ("a", "b", "c"), batch)
    record = schedule_edit.measure(Asked(Subject("toy", model, {}, None, {}), group), group, 3)
    assert record.own
    assert record.base == 1.0
    skipped = record.values[record.edits.index("skip loop")]
    assert skipped.isnan().tolist() == [True, False, False]
    assert len(record.summary()) > 3


def test_answers_that_are_not_finite_inside_an_edit_are_no_wrong_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, normalize = toy(), RecurrentDepth.normalize
    monkeypatch.setattr(
        model, "normalize", lambda x, *taps: normalize(model, x, *taps) / (model.edited is None)
    )
    group = Group(None, ("a", "b", "c"), padded())
    asked = Asked(Subject("toy", model, {}, None, {}), group)
    with pytest.raises(ValueError, match="tokens can be ranked by finite logits only"):
        schedule_edit.measure(asked, group, 2)


def test_a_model_that_needs_all_its_positions_is_edited() -> None:
    model = position_solver()
    tokens = torch.arange(10).view(2, 5)
    batch = Batch(tokens, torch.ones_like(tokens), torch.tensor([4, 4]))
    group = Group(None, ("a", "b"), batch)
    record = schedule_edit.measure(Asked(Subject("toy", model, {}, None, {}), group), group, 2)
    assert not record.values[record.edits.index("skip loop")].isnan().any()


def test_no_hop_count_is_refused() -> None:
    for module, config in (
        (lyapunov, lyapunov.LyapunovConfig(deepest=0)),
        (attractors, attractors.AttractorsConfig(deepest=0)),
    ):
        with pytest.raises(ValueError, match="at least one hop count is needed, got --deepest 0"):
            module.run(config)  # type: ignore[attr-defined]
