"""Steps of the state over iterations: against a cache and plain loops, and what the shipped
checkpoint shows.
"""

from __future__ import annotations

import math

import pytest
import torch

from loopscope.analyses.common.inputs_of import Asked, Group
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.dynamics import steps
from loopscope.analyses.figures.dynamics.steps import StepsConfig
from loopscope.interp.common.columns import Shown
from toy import LENGTHS, LOOPS, cached, padded, settling

ASKED = Asked(Subject("toy", settling(), {}, None, {}), Group(None, ("a", "b", "c"), padded()))


@pytest.fixture(scope="module")
def shipped() -> steps.Steps:
    return steps.run(StepsConfig(per_hop=20))


def slow(path: list[torch.Tensor], t: int) -> list[float]:
    """The six statistics of one trajectory after iteration t, from 2 on."""
    step, before = path[t] - path[t - 1], path[t - 1] - path[t - 2]
    norm = float(path[t].norm())
    cosine = float(path[t] @ path[t - 1]) / (norm * float(path[t - 1].norm()))
    turned = float(step @ before) / float(step.norm() * before.norm())
    to_last = float((path[t] - path[-1]).norm() / path[-1].norm())
    return [
        norm,
        float(step.norm()),
        float(step.norm() / path[t - 1].norm()),
        turned,
        math.degrees(math.acos(cosine)),
        to_last,
    ]


@pytest.mark.shapes
@pytest.mark.parametrize("positions", ["readout", "real"])
def test_the_means_are_those_of_plain_loops(positions: Shown) -> None:
    record = steps.measure(ASKED, ASKED.groups(), LOOPS, positions)
    cache = cached(ASKED.subject.model, padded(), "**.hook_state_*")
    states = [
        cache["loops.0.hook_state_in"],
        *(cache[f"loops.{t}.hook_state_out"] for t in range(LOOPS)),
    ]
    spots = [
        (i, p) for i, n in enumerate(LENGTHS) for p in range(n) if positions == "real" or p == n - 1
    ]
    assert record.groups == ("3 texts",)
    assert record.values.shape == (6, 1, LOOPS + 1)
    for t in range(2, LOOPS + 1):
        rows = torch.tensor(
            [slow([state[i, p].detach() for state in states], t) for i, p in spots],
            dtype=torch.float64,
        )
        torch.testing.assert_close(
            record.values[:, 0, t], rows.mean(0), rtol=0, atol=1e-9 * float(rows.abs().max())
        )
    assert record.values[1:5, 0, 0].isnan().all()
    assert record.of("update_cosine")[:, :2].isnan().all()


def test_small_turns_are_exact_in_float32() -> None:
    narrow = Asked(Subject("toy", settling().float(), {}, None, {}), ASKED.group())
    wide, less = (
        steps.measure(asked, asked.groups(), 40).of("angle")[0, 1:].double()
        for asked in (ASKED, narrow)
    )
    assert wide[-1] < 1.0
    torch.testing.assert_close(less, wide, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_shipped_states_grow_by_equal_steps_and_deeper_questions_settle_later(
    shipped: steps.Steps,
) -> None:
    assert shipped.hops == tuple(range(1, 17))
    assert shipped.inputs == (20,) * 16
    assert shipped.of("update_cosine")[:, -1].min() > 0.999
    last = shipped.of("step_norm")[:, -1]
    assert 3.9 < last.min() < last.max() < 4.4
    still = shipped.summary()["turn below 1 degree from"].tolist()
    assert still[0] <= 9 < 12 < still[9] < 18 < still[15]
    for row, first in zip(shipped.of("angle"), still, strict=True):
        assert row[first - 1] >= 1.0 > row[first:].max()
    assert len(shipped.frame()) == 16 * 33


def test_fewer_than_two_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 iterations, got --n-loops 1"):
        steps.run(StepsConfig(n_loops=1))


def test_a_panel_for_each_statistic_and_a_curve_for_each_group(shipped: steps.Steps) -> None:
    figure = steps.figure(shipped)
    assert len(figure.data) == 6 * 16
    assert [trace.name for trace in figure.data if trace.showlegend][:2] == ["1 hop", "2 hops"]
    assert list(figure.data[16 * 4 + 3].y) == shipped.of("angle")[3, 1:].tolist()
    assert list(figure.data[0].x) == list(range(1, 33))
    assert figure.layout.yaxis5.type == "log"
    assert {trace.legendgroup for trace in figure.data[10:16]} == {"beyond"}
    assert {trace.legendgroup for trace in figure.data[:10]} == {"trained"}
