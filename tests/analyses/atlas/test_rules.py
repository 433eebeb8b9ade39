"""The rules of the atlas: verdicts by their bounds."""

from __future__ import annotations

import pytest

from loopscope.analyses.atlas.rules import QUESTIONS
from loopscope.analyses.common.claims import Bound, judged

GAIN, CONTROL = Bound("gain", "at least", 0.5, 0.25), Bound("control", "at most", 0.125, 0.75)


@pytest.mark.parametrize(
    ("gain", "control", "expected"),
    [
        (0.5, 0.125, "yes"),
        (0.4375, 0.0, "partly"),
        (0.75, 0.75, "partly"),
        (0.1875, 0.0, "no"),
        (0.75, 0.875, "no"),
        (float("nan"), 0.0, "no"),
    ],
)
def test_a_claim_is_as_good_as_its_worst_bound(gain: float, control: float, expected: str) -> None:
    assert judged((GAIN, CONTROL), {"gain": gain, "control": control}) == expected


def test_a_bound_says_its_limits() -> None:
    assert str(GAIN) == "gain: at least 0.5 (partly: 0.25)"


def test_partly_is_never_harder_than_shown() -> None:
    for bound in (bound for question in QUESTIONS for bound in question.bounds):
        assert bound.verdict(bound.shown) == "yes"
        assert bound.verdict(bound.partly) in ("yes", "partly")


def test_every_question_has_a_control_and_a_name_of_its_own() -> None:
    assert len({question.name for question in QUESTIONS}) == len(QUESTIONS)
    assert len({question.paper for question in QUESTIONS}) == 12
    assert all(question.control for question in QUESTIONS)
