"""Halting on KL and entropy against halting on KL alone, for several checkpoints."""

from __future__ import annotations

import pytest
import torch

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.answers import halting_compare
from loopscope.analyses.figures.answers.halting import measure
from loopscope.analyses.figures.answers.halting_compare import HaltingCompare, HaltingCompareConfig
from shipped_runs import shipped_panels, shipped_runs


@pytest.fixture(scope="module")
def shipped() -> HaltingCompare:
    curves = [measure(runs, 0.01, 3.0) for _, _, runs in shipped_runs()]
    return HaltingCompare(shipped_panels(), tuple(curves))


@pytest.mark.slow
def test_every_number_is_that_of_stopping_question_by_question() -> None:
    cap, kl, entropy, hops = 9, 0.02, 1.1, 8
    config = HaltingCompareConfig(
        checkpoints=("mini/multi_hop/r_dyn", "mini/multi_hop/r6"),
        n_loops=cap,
        kl=kl,
        entropy=entropy,
        per_hop=5,
    )
    record = halting_compare.run(config)
    for name, curve in zip(config.checkpoints, record.curves, strict=True):
        subject = open_subject(SourceConfig(checkpoint=name))
        used: list[list[int]] = [[], []]
        right: list[list[bool]] = [[], []]
        asked = subject.questions[hops][:5]
        tokens = subject.model.encode([question.text for question in asked]).tokens
        with torch.no_grad():
            every = [
                subject.model(tokens, n_loops=t)[:, hops].double().log_softmax(-1)
                for t in range(1, cap + 1)
            ]
        for i, question in enumerate(asked):
            answers = [log_p[i] for log_p in every]
            for rule, limit in enumerate((entropy, float("inf"))):
                stop = cap
                for t in range(2, cap + 1):
                    now, before = answers[t - 1], answers[t - 2]
                    if (
                        float((now.exp() * (now - before)).sum()) < kl
                        and float(-(now.exp() * now).sum()) < limit
                    ):
                        stop = t
                        break
                used[rule].append(stop)
                right[rule].append(
                    int(answers[stop - 1].argmax())
                    == subject.model.to_single_token(question.answer)
                )
        for rule in range(2):
            assert float(curve.iterations[rule, curve.hops.index(hops)]) == pytest.approx(
                sum(used[rule]) / 5
            )
            assert float(curve.accuracy[rule, curve.hops.index(hops)]) == pytest.approx(
                sum(right[rule]) / 5
            )
        assert used[0] != used[1] or name == "mini/multi_hop/r6"


def test_kl_alone_stops_the_dynamic_model_too_early(shipped: HaltingCompare) -> None:
    summary = shipped.summary().set_index(["checkpoint", "rule"]).loc["mini/multi_hop/r_dyn"]
    both, alone = summary.loc["KL<0.01 and H<3"], summary.loc["KL<0.01"]
    assert both["below the best r"] < 0.01
    assert alone["below the best r"] > 0.3
    assert alone["mean iterations"] < both["mean iterations"] - 1


def test_the_frame_has_the_two_rules_that_are_compared(shipped: HaltingCompare) -> None:
    frame = shipped.frame()
    assert set(frame["rule"]) == {"KL<0.01 and H<3", "KL<0.01"}
    assert len(frame) == 2 * (10 + 14 + 12 + 16)
    earlier = frame.pivot_table(index=["checkpoint", "hops"], columns="rule", values="iterations")
    assert (earlier["KL<0.01"] <= earlier["KL<0.01 and H<3"]).all()


def test_two_rules_and_the_best_r_in_every_column_on_shared_axes(shipped: HaltingCompare) -> None:
    figure = halting_compare.figure(shipped)
    assert len(figure.data) == 4 * 5
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        "KL &lt; 0.01 and entropy &lt; 3",
        "KL &lt; 0.01",
        "best fixed r",
    ]
    upper = [axis for axis in figure.select_yaxes(row=1)]
    assert len({tuple(axis.range) for axis in upper}) == 1
    assert upper[0].range[1] >= max(float(curve.iterations[:2].max()) for curve in shipped.curves)
    assert sorted({shape.x0 for shape in figure.layout.shapes}) == [4.5, 6.5, 8.5, 10.5]
    last = shipped.curves[-1]
    drawn = [trace.y for trace in figure.data[-5:]]
    expected = [
        last.iterations[0],
        last.accuracy[0],
        last.iterations[1],
        last.accuracy[1],
        last.best,
    ]
    assert all(
        y == pytest.approx(values.tolist()) for y, values in zip(drawn, expected, strict=True)
    )
