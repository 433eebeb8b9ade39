"""Margins of several checkpoints side by side."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.answers import margins
from loopscope.analyses.figures.answers.margins import Margins, MarginsConfig, placed
from loopscope.analyses.figures.answers.overthinking import measure
from shipped_runs import shipped_panels, shipped_runs


@pytest.fixture(scope="module")
def shipped() -> Margins:
    found = [measure(subject, runs) for _, subject, runs in shipped_runs()]
    return Margins(shipped_panels(), tuple(found))


def test_a_margin_is_that_of_a_separate_call(shipped: Margins) -> None:
    subject = open_subject(SourceConfig(checkpoint="mini/multi_hop/r2"))
    total = 0.0
    asked = subject.questions[3][:20]
    with torch.no_grad():
        every = subject.model(
            subject.model.encode([question.text for question in asked]).tokens, n_loops=5
        )[:, 3]
    for question, logits in zip(asked, every, strict=True):
        answer = subject.model.to_single_token(question.answer)
        rivals = [float(logit) for token, logit in enumerate(logits) if token != answer]
        total += float(logits[answer]) - max(rivals)
    assert float(shipped.margins[0].margin[2, 4]) == pytest.approx(total / 20, abs=1e-4)
    frame = shipped.frame()
    row = frame[
        (frame["checkpoint"] == "mini/multi_hop/r2")
        & (frame["hops"] == 3)
        & (frame["iterations"] == 5)
    ]
    assert row["margin"].item() == float(shipped.margins[0].margin[2, 4])


@pytest.mark.shapes
def test_the_model_of_two_iterations_overthinks_and_the_dynamic_one_does_not(
    shipped: Margins,
) -> None:
    summary = shipped.summary().set_index(["checkpoint", "hops"])
    inside = {
        name: summary.loc[f"mini/multi_hop/{name}"].loc[: panel.trained_hops]
        for name, panel in named(shipped).items()
    }
    assert inside["r2"]["drop"].min() > 6.0
    assert inside["r_dyn"]["drop"].max() < 0.5
    assert inside["r6"]["t*"].diff()[2:].min() > 0.4
    assert inside["r_dyn"]["t*"].iloc[-1] > inside["r_dyn"]["t*"].iloc[0] + 3


def named(record: Margins) -> dict[str, margins.Panel]:
    return {panel.checkpoint.rpartition("/")[2]: panel for panel in record.panels}


def test_one_curve_and_one_label_per_hop_count_and_a_line_at_t_star(shipped: Margins) -> None:
    figure = margins.figure(shipped)
    curves = [(panel, hop) for panel, each in enumerate(shipped.margins) for hop in each.hops]
    assert len(figure.data) == len(curves) == 10 + 14 + 12 + 16
    for trace, (panel, hop) in zip(figure.data, curves, strict=True):
        each = shipped.margins[panel]
        assert trace.y == pytest.approx(each.margin[each.hops.index(hop)].tolist())
        assert list(trace.x) == list(range(1, 13))
    dashed = sorted(shape.x0 for shape in figure.layout.shapes if shape.line.dash == "dash")
    expected = [
        float(t)
        for each in shipped.margins
        for t, hit in zip(each.t_star, each.hit_share, strict=True)
        if hit >= 0.5
    ]
    assert dashed == pytest.approx(sorted(expected))
    assert 0 < len(dashed) < len(curves)
    labels = [note.text for note in figure.layout.annotations if note.text.isdigit()]
    assert labels == [str(hop) for _, hop in curves]
    low, high = figure.layout.yaxis.range
    assert all(tuple(axis.range) == (low, high) for axis in figure.select_yaxes())
    assert all(low < note.y < high for note in figure.layout.annotations if note.text.isdigit())


def test_labels_keep_their_order_their_distance_and_their_bounds() -> None:
    heights = [0.0, 0.1, 5.0, 0.05, 9.95, 9.9]
    found = placed(heights, 1.0, (-0.5, 10.0))
    assert (
        sorted(range(6), key=found.__getitem__)
        == sorted(range(6), key=heights.__getitem__)
        == [0, 3, 1, 2, 5, 4]
    )
    ordered = sorted(found)
    assert min(above - below for below, above in pairwise(ordered)) >= 1.0 - 1e-12
    assert ordered[0] >= -0.5
    assert ordered[-1] <= 10.0
    assert found[2] == 5.0
    assert placed([1.0, 1.0], 1.0, (-9.0, 9.0)) == [0.5, 1.5]
    assert placed([8.0, 9.0, 7.5], 1.0, (0.0, 8.0)) == [7.0, 8.0, 6.0]
    assert placed([1.0, -3.0, -2.5], 1.0, (0.0, 8.0)) == [2.0, 0.0, 1.0]


def test_a_hop_count_that_is_never_answered_has_no_line() -> None:
    one = margins.run(
        MarginsConfig(checkpoints=("mini/multi_hop/r2",), n_loops=2, per_hop=3)
    ).margins[0]
    never = replace(
        one,
        t_star=torch.full_like(one.t_star, torch.nan),
        hit_share=torch.zeros_like(one.hit_share),
    )
    figure = margins.figure(Margins((margins.Panel("x", None, None),), (never,)))
    assert not [shape for shape in figure.layout.shapes if shape.line.dash == "dash"]
