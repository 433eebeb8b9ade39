"""Attention over iterations: what is added to the method's numbers, and what the shipped checkpoint
shows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from loopscope.analyses.common.inputs_of import Asked, Group
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.figures.dynamics import attention_settling
from loopscope.analyses.figures.dynamics.attention_settling import (
    AttentionConfig,
    AttentionSettling,
)
from loopscope.interp.dynamics.layers import AttentionDynamics
from toy import LENGTHS, LOOPS, Bidirectional, cached, odd_one, padded, toy


@pytest.fixture(scope="module")
def shipped() -> AttentionSettling:
    return attention_settling.run(AttentionConfig(per_hop=20))


def asked(model: object) -> Asked:
    return Asked(Subject("toy", model, {}, None, {}), Group(None, ("a", "b", "c"), padded()))  # type: ignore[arg-type]


def synthetic(n_layers: int, n_heads: int, n_loops: int = 5) -> AttentionSettling:
    change = torch.rand(n_loops, n_layers, n_heads, dtype=torch.float64)
    change[0] = math.nan
    names = tuple(f"blocks.{i}" for i in range(n_layers))
    return AttentionSettling(
        7, None, "real", None, AttentionDynamics(names, change, torch.rand_like(change))
    )


@pytest.mark.parametrize("queries", ["real", "readout"])
def test_change_and_entropy_are_those_of_plain_loops(queries: str) -> None:
    record = attention_settling.measure(asked(toy()), asked(toy()).group(), LOOPS, queries)  # type: ignore[arg-type]
    cache = cached(toy(), padded(), "**.hook_pattern")
    spots = [
        (i, p) for i, n in enumerate(LENGTHS) for p in range(n) if queries == "real" or p == n - 1
    ]
    assert record.uniform == pytest.approx(
        sum(math.log(p + 1) for _, p in spots) / len(spots), abs=1e-12
    )
    for layer, head in ((0, 3), (1, 4)):
        rows = [
            [
                cache[f"loops.{t}.blocks.{layer}.attn.hook_pattern"][i, head, p].tolist()
                for i, p in spots
            ]
            for t in range(LOOPS)
        ]
        for t in range(1, LOOPS):
            moved = [
                sum(abs(a - b) for a, b in zip(now, before, strict=True)) / 2
                for now, before in zip(rows[t], rows[t - 1], strict=True)
            ]
            entropy = [-sum(p * math.log(p) for p in row if p > 0) for row in rows[t]]
            assert float(record.dynamics.change[t, layer, head]) == pytest.approx(
                sum(moved) / len(spots), abs=1e-9
            )
            assert float(record.dynamics.entropy[t, layer, head]) == pytest.approx(
                sum(entropy) / len(spots), abs=1e-9
            )


def test_a_model_that_sees_later_tokens_has_no_reference_entropy() -> None:
    model = odd_one(Bidirectional)
    assert attention_settling.measure(asked(model), asked(model).group(), 2).uniform is None


def test_settled_is_the_first_loop_after_the_last_change() -> None:
    change = torch.tensor([math.nan, 0.5, 0.001, 0.2, 0.01, 0.0])[:, None, None].repeat(1, 1, 3)
    change[-1, 0, 1], change[1:, 0, 2] = 0.3, 0.0
    dynamics = AttentionDynamics(("blocks.0",), change, torch.zeros_like(change))
    record = AttentionSettling(1, None, "real", None, dynamics)
    assert record.settled() == [[4, None, 1]]
    assert record.summary()["settled from loop"].tolist() == [4, "never", 1]


def test_shipped_heads_settle_and_end_with_all_keys_alike(shipped: AttentionSettling) -> None:
    assert shipped.hops == 6
    assert all(first is not None and 5 <= first <= 8 for row in shipped.settled() for first in row)
    assert shipped.uniform == pytest.approx(sum(math.log(k) for k in range(1, 8)) / 7)
    assert shipped.dynamics.entropy[-1].min() > 0.94 * shipped.uniform
    assert shipped.dynamics.entropy[1].mean() < 0.7 * shipped.uniform
    assert len(shipped.frame()) == 16 * 2 * 4


def test_one_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="needs at least 2 of them, got --n-loops 1"):
        attention_settling.run(AttentionConfig(n_loops=1))


def test_a_curve_for_each_head_and_panel(shipped: AttentionSettling) -> None:
    figure = attention_settling.figure(shipped)
    assert len(figure.data) == 2 * 2 * 4
    assert [trace.name for trace in figure.data if trace.showlegend] == [
        f"head {i}" for i in range(4)
    ]
    assert list(figure.data[5].y)[1:] == shipped.dynamics.change[1:, 1, 1].tolist()
    assert any(note.text == "dotted: all keys alike" for note in figure.layout.annotations)
    without = attention_settling.figure(replace(shipped, uniform=None))
    assert not any(note.text == "dotted: all keys alike" for note in without.layout.annotations)


@pytest.mark.parametrize(("n_layers", "n_heads", "rows"), [(5, 3, 15), (2, 9, 18), (7, 11, 7)])
def test_many_heads_are_rows_of_two_maps(n_layers: int, n_heads: int, rows: int) -> None:
    record = synthetic(n_layers, n_heads)
    figure = attention_settling.figure(record)
    assert [trace.type for trace in figure.data] == ["heatmap", "heatmap"]
    z = torch.tensor(figure.data[1].z, dtype=torch.float64)
    assert z.shape == (rows, 5)
    expected = (
        record.dynamics.entropy.flatten(1) if rows > n_layers else record.dynamics.entropy.mean(2)
    )
    torch.testing.assert_close(z, expected.T)
