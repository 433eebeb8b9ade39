"""Changes of the top answer from one iteration to the next."""

from __future__ import annotations

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.answers import flips, recurrence_grids
from loopscope.analyses.figures.answers.flips import KINDS, Flips, FlipsConfig
from loopscope.analyses.figures.answers.recurrence_grids import RecurrenceGridsConfig
from shipped_runs import shipped_panels, shipped_runs


@pytest.fixture(scope="module")
def shipped() -> Flips:
    found = [flips.measure(runs, subject.model.cfg.n_loops) for _, subject, runs in shipped_runs()]
    return Flips(shipped_panels(), tuple(found))


@pytest.mark.slow
def test_the_shares_are_those_of_counting_question_by_question(shipped: Flips) -> None:
    subject = open_subject(SourceConfig(checkpoint="mini/multi_hop/r2"))
    counts = [[0] * 4 for _ in KINDS]
    asked = subject.questions[4][:20]
    tokens = subject.model.encode([question.text for question in asked]).tokens
    with torch.no_grad():
        answers = [
            subject.model.to_str_tokens(subject.model(tokens, n_loops=t)[:, 4].argmax(-1))
            for t in range(1, 6)
        ]
    for i, question in enumerate(asked):
        for step in range(4):
            before, after = answers[step][i], answers[step + 1][i]
            if before == after:
                continue
            kind = 0 if after == question.answer else 1 if before == question.answer else 2
            counts[kind][step] += 1
    found = shipped.flips[0].share[:, 3, :4]
    torch.testing.assert_close(found, torch.tensor(counts) / 20)
    assert all(sum(row) > 0 for row in counts)


@pytest.mark.slow
def test_accuracy_changes_by_what_becomes_right_less_what_becomes_wrong(shipped: Flips) -> None:
    names = tuple(panel.checkpoint for panel in shipped.panels[:2])
    grids = recurrence_grids.run(RecurrenceGridsConfig(checkpoints=names, n_loops=12, per_hop=20))
    for grid, each in zip(grids.grids, shipped.flips[:2], strict=True):
        torch.testing.assert_close(grid.accuracy.diff(dim=1), each.share[0] - each.share[1])


def test_fixed_depth_loses_answers_and_the_dynamic_model_keeps_them(shipped: Flips) -> None:
    summary = shipped.summary().set_index(["checkpoint", "hops"])
    assert summary.loc["mini/multi_hop/r2", "right to wrong per question"][:4].min() > 0.25
    assert summary.loc["mini/multi_hop/r_dyn", "right to wrong per question"][:10].max() < 0.15
    assert summary.loc["mini/multi_hop/r_dyn", "all after the training R"][:10].max() == 0.0
    assert summary.loc["mini/multi_hop/r4", "right to wrong per question"][10] > 0.8


def test_the_frame_has_a_row_per_kind_hop_count_and_iteration_from_2(shipped: Flips) -> None:
    frame = shipped.frame()
    assert len(frame) == 3 * 11 * (10 + 14 + 12 + 16)
    assert (frame["iterations"].min(), frame["iterations"].max()) == (2, 12)
    row = frame[
        (frame["checkpoint"] == "mini/multi_hop/r6")
        & (frame["hops"] == 5)
        & (frame["iterations"] == 5)
    ].set_index("kind")
    assert row["share"].tolist() == shipped.flips[2].share[:, 4, 3].tolist()
    assert row.loc["wrong to right", "share"] > 0.9


def test_a_row_per_kind_with_one_scale_for_all_checkpoints(shipped: Flips) -> None:
    figure = flips.figure(shipped)
    assert [trace.coloraxis for trace in figure.data] == ["coloraxis"] * 4 + ["coloraxis2"] * 4 + [
        "coloraxis3"
    ] * 4
    most = [max(float(each.share[k].max()) for each in shipped.flips) for k in range(3)]
    axes = [figure.layout[f"coloraxis{k}"] for k in ("", "2", "3")]
    assert [axis.cmax for axis in axes] == pytest.approx(most)
    assert all(axis.cmin == 0 for axis in axes)
    assert all(tuple(axis.range) == (0.5, 16.5) for axis in figure.select_yaxes())
    assert figure.data[6].z[8] == pytest.approx(shipped.flips[2].share[1, 8].tolist())


def test_one_iteration_has_no_changes() -> None:
    with pytest.raises(
        ValueError, match="a change of the answer needs n_loops of at least 2, got 1"
    ):
        flips.run(FlipsConfig(n_loops=1))
