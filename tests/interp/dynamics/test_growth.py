"""Growth of one change: finite differences against derivatives, and what it says of answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from family_toys import TOYS
from family_toys import full as family_batch
from loopscope.interp.dynamics.growth import (
    FiniteTimeExponent,
    Separation,
    auc,
    finite_time_exponent,
    perturbation_growth,
)
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, LOOPS, assert_close, padded, toy

pytestmark = pytest.mark.shapes
ANSWERS = torch.tensor([5, 3, 2])


@pytest.fixture(scope="module")
def found() -> FiniteTimeExponent:
    return finite_time_exponent(toy(), padded(), LOOPS)


def test_the_exponent_is_the_first_of_the_spectrum(found: FiniteTimeExponent) -> None:
    spectrum = lyapunov_spectrum(toy(), padded(), 1, LOOPS)
    torch.testing.assert_close(found.exponent, spectrum.spectrum()[:, 0], rtol=0, atol=1e-12)
    frame = found.frame()
    last = frame[frame["loop"] == LOOPS - 1]["exponent"]
    assert last.tolist() == pytest.approx(found.exponent.tolist())


@pytest.mark.parametrize("space", ["state", "direction"])
def test_a_small_change_grows_as_its_derivative_does(space: str) -> None:
    model, batch = toy(), padded()
    small = perturbation_growth(
        model, batch, LOOPS, space=space, scale=1e-6, n_directions=1, batch_size=4
    )
    exact = finite_time_exponent(model, batch, LOOPS, space=space)
    assert small.distance.shape == (LOOPS + 1, BATCH, 1)
    torch.testing.assert_close(small.growth[1:, :, 0], exact.growth.cumsum(0), rtol=0, atol=1e-4)


def test_changes_have_matched_norms(plain: RecurrentDepth) -> None:
    batch = padded()
    found = perturbation_growth(plain, batch, 2, start=1, scale=0.01, n_directions=3)
    state = plain.advance(plain.begin(batch.tokens, batch.mask, n_loops=2), "loops.1")
    size = (state.resid * batch.mask[..., None]).flatten(1).norm(dim=1)
    expected = 0.01 * size[:, None].expand(BATCH, 3)
    torch.testing.assert_close(found.distance[0], expected, rtol=1e-9, atol=0)
    assert found.frame()["iterations"].max() == 1
    assert [len(trace.x) for trace in found.plot().data] == [2] * BATCH


def test_the_auc_counts_pairs() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 3.0])
    assert auc(scores, torch.tensor([False, False, True, True])) == (1 + 1 + 0.5 + 1) / 4
    assert math.isnan(auc(scores, torch.zeros(4).bool()))


def test_the_record_compares_the_exponent_with_the_margin(found: FiniteTimeExponent) -> None:
    last = found.lens.top(1).tokens[-1, :, 0]
    answers = last.clone()
    answers[1] = (last[1] + 1) % 29
    compared = found.separation(answers)
    assert (compared.right, compared.wrong, compared.half) == (2, 1, 2)
    wrong = torch.tensor([False, True, False])
    assert compared.exponent == auc(found.exponent, wrong)
    assert compared.margin == auc(-found.lens.margin(answers)[1], wrong)
    assert compared.frame()["auc"].tolist() == [compared.exponent, compared.margin]


def test_the_sentence_says_when_the_margin_does_as_well() -> None:
    def said(exponent: float, margin: float) -> str:
        return str(Separation(197, 53, 24, 12, exponent, margin))

    assert "AUC of 0.900. But the margin after 12 of 24" in said(0.9, 0.999)
    assert "separates them better (0.999)" in said(0.9, 0.999)
    assert "separates them as well (0.905)" in said(0.9, 0.905)
    assert "It is ahead of the margin after 12 of 24 iterations (0.700)" in said(0.9, 0.7)
    alone = str(Separation(3, 0, 4, 2, math.nan, math.nan))
    assert alone == "All 3 answers are right, so nothing can separate them."


def test_changes_that_are_none_are_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="scale must be finite and above 0, got 0"):
        perturbation_growth(plain, padded(), 2, scale=0)
    with pytest.raises(ValueError, match="n_directions must be at least 1, got 0"):
        perturbation_growth(plain, padded(), 2, n_directions=0)


def test_a_state_of_zeros_is_changed_one_iteration_later() -> None:
    model = TOYS["spiral"].make()
    batch = family_batch(TOYS["spiral"], model)
    found = perturbation_growth(model, batch, 3)
    assert found.start == 1
    assert found.growth.isfinite().all()
    with pytest.raises(ValueError, match=r"the state of example 0 is zeros, .* \(start=1\)"):
        perturbation_growth(model, batch, 3, start=0)


def test_a_draw_does_not_depend_on_the_columns_of_padding(plain: RecurrentDepth) -> None:
    wide, narrow = (padded(lengths=(5, 4), width=width) for width in (11, 5))
    narrow = replace(narrow, tokens=wide.tokens[:, :5])
    found = [finite_time_exponent(plain, batch, LOOPS).growth for batch in (wide, narrow)]
    assert_close(*found)
