"""Realignment of the shipped two-hop miniature: chosen on one half, reported on the other."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.common.two_hop import TwoHopQuestions, ask
from loopscope.analyses.figures.circuit.realignment import (
    BARS,
    Realignment,
    RealignmentConfig,
    figure,
    run,
)
from loopscope.interp.edit.realignment import realign
from loopscope.interp.lens.lens import readout_lens

pytestmark = pytest.mark.shapes
OOD = "mini/systematicity/r4_l2/ood"


@cache
def shipped() -> Realignment:
    return run(RealignmentConfig(checkpoints=(OOD,)))


def test_the_shipped_miniature_is_realigned() -> None:
    """The claim and its controls."""
    found = shipped().outcomes[0]["OOD"]
    score = {bar: found.right[bar].double().mean().item() for bar in BARS}
    assert score["realigned"] >= 0.85
    assert score["random entity"] <= 0.10
    assert score["second-best token"] <= 0.10
    assert abs(score["rescaled"] - score["base"]) <= 0.03
    low, high = found.interval("realigned", 500, 0)
    assert score["base"] < low < score["realigned"] < high


def test_each_half_is_answered_by_the_choice_of_the_other() -> None:
    found = shipped().outcomes[0]["OOD"]
    subject = open_subject(SourceConfig(checkpoint=OOD))
    asked: TwoHopQuestions = ask(subject, "test_inferred_ood")
    count = len(asked.questions)
    first = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 2]
    right = []
    for loop, how in found.chosen:
        with realign(subject.model, loop, [1], how):
            lens = readout_lens(subject.model, asked.batch)
        right.append(lens.correct(asked.targets[:, 1])[-1])
    expected = right[0].clone()  # chosen on the first half
    expected[first] = right[1][first]
    assert torch.equal(found.right["realigned"], expected)
    assert found.explored.shape == (3, 2)
    assert found.explored.max() == found.explored[1, 0]


def test_the_record_and_its_picture() -> None:
    record = shipped()
    frame = record.frame()
    assert len(frame) == 2 * len(BARS)
    assert (frame["low"] <= frame["accuracy"]).all()
    assert list(record.summary()["group"]) == ["OOD", "ID"]
    assert len(figure(record).data) == len(BARS) + 4


def test_one_iteration_leaves_nothing_to_realign() -> None:
    with pytest.raises(ValueError, match="runs one iteration"):
        run(RealignmentConfig(checkpoints=("mini/systematicity/r1_l8/id",), per_group=3))


def test_one_question_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1; pass a larger per_group"):
        run(RealignmentConfig(checkpoints=(OOD,), per_group=1))
