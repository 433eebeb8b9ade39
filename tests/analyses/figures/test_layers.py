"""What each block does over iterations: angles and steps against a cache and plain loops, and the
shipped checkpoint's facts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loopscope.analyses.common.inputs_of import Asked, Group
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.dynamics import layers
from loopscope.analyses.figures.dynamics.layers import LayersConfig
from toy import LENGTHS, LOOPS, ShortEnding, cached, odd_one, padded, toy

GROUP = Group(None, ("a", "b", "c"), padded())
SPOTS = [(i, p) for i, n in enumerate(LENGTHS) for p in range(n)]


@pytest.fixture(scope="module")
def shipped() -> layers.Layers:
    return layers.run(LayersConfig(per_hop=20))


def angle(a: torch.Tensor, b: torch.Tensor) -> float:
    return math.acos(float(a @ b) / float(a.norm() * b.norm())) / math.pi


@pytest.mark.shapes
def test_angles_and_steps_are_those_of_plain_loops() -> None:
    model = toy()
    record = layers.measure(Asked(Subject("toy", model, {}, None, {}), GROUP), GROUP, LOOPS)
    cache = cached(model, padded(), "loops.*.blocks.*.hook_resid_post")
    out = {
        (t, i): cache[f"loops.{t}.blocks.{i}.hook_resid_post"].detach()
        for t in range(LOOPS)
        for i in (0, 1)
    }
    assert record.names == ("blocks.0", "blocks.1")
    assert record.of("angular_distance")[0, 0].isnan()
    for t, i in list(out)[1:]:
        before = out[t, 0] if i else out[t - 1, 1]
        found = sum(angle(out[t, i][spot], before[spot]) for spot in SPOTS) / len(SPOTS)
        assert float(record.of("angular_distance")[t, i]) == pytest.approx(found, abs=1e-9)
        norm = sum(float(out[t, i][spot].norm()) for spot in SPOTS) / len(SPOTS)
        assert float(record.of("output_norm")[t, i]) == pytest.approx(norm, rel=1e-9)
        if t == 0:
            assert record.of("relative_step")[t].isnan().all()
            continue
        steps = [(out[t, i][spot] - out[t - 1, i][spot]) for spot in SPOTS]
        relative = sum(
            float(step.norm() / out[t - 1, i][spot].norm())
            for step, spot in zip(steps, SPOTS, strict=True)
        ) / len(SPOTS)
        assert float(record.of("relative_step")[t, i]) == pytest.approx(relative, rel=1e-9)
        if t > 1:
            earlier = [(out[t - 1, i][spot] - out[t - 2, i][spot]) for spot in SPOTS]
            cosine = sum(
                float(a @ b / (a.norm() * b.norm())) for a, b in zip(steps, earlier, strict=True)
            ) / len(SPOTS)
            assert float(record.of("update_cosine")[t, i]) == pytest.approx(cosine, abs=1e-9)


def test_a_block_that_an_iteration_leaves_out_has_no_value_there() -> None:
    model = odd_one(ShortEnding)
    record = layers.measure(Asked(Subject("toy", model, {}, None, {}), GROUP), GROUP, LOOPS)
    assert record.values[:, -1, 1].isnan().all()
    assert record.values[:2, -1, 0].isfinite().all()
    assert record.values[:2, -2, 1].isfinite().all()


def test_shipped_blocks_turn_the_stream_less_and_less(shipped: layers.Layers) -> None:
    turned = shipped.of("angular_distance")
    assert turned[1].min() > 0.2
    assert turned[-1].max() < 0.02
    assert shipped.of("update_cosine")[-1].min() > 0.999
    growth = shipped.of("output_norm").diff(dim=0)[-1]
    assert 3.9 < growth.min() < growth.max() < 4.4
    assert len(shipped.frame()) == 16 * 2
    assert shipped.summary()["block"].tolist() == ["blocks.0", "blocks.1"]


def test_one_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2 of them, got --n-loops 1"):
        layers.run(LayersConfig(n_loops=1))


def test_a_curve_for_each_iteration_and_then_for_each_block(shipped: layers.Layers) -> None:
    figure = layers.figure(shipped)
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(curves) == 16 + 3 * 2
    assert list(curves[5].y) == shipped.of("angular_distance")[5].tolist()
    assert list(curves[16 + 1].y) == shipped.of("output_norm")[:, 1].tolist()
    assert [trace.name for trace in curves if trace.showlegend] == ["blocks.0", "blocks.1"]
    many = replace(
        shipped, names=tuple(f"blocks.{i}" for i in range(23)), values=torch.rand(4, 5, 23)
    )
    shown = [trace.name for trace in layers.figure(many).data if trace.showlegend]
    assert shown == ["blocks.0", "blocks.22"]
