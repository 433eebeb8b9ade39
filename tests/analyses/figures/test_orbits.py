"""Paths of the state: the plane, the periods, and the names that they get."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from golden_cases import GOLDEN
from loopscope.analyses.common.inputs_of import Asked, open_inputs
from loopscope.analyses.figures.dynamics import orbits
from loopscope.analyses.figures.dynamics.orbits import OrbitsConfig
from loopscope.interp.dynamics.states import Dynamics


@pytest.fixture(scope="module")
def shipped() -> orbits.OrbitPaths:
    return orbits.run(OrbitsConfig(n_loops=32))


@pytest.mark.parametrize("checkpoint", ["huginn", "retrofit_llama"])
def test_the_coordinates_are_those_of_the_principal_plane(checkpoint: str) -> None:
    config = OrbitsConfig(
        checkpoint=str(GOLDEN / checkpoint),
        tokens=(5, 7, 11, 3),
        positions="tokens",
        components=3,
        n_loops=9,
        paths=3,
    )
    asked = open_inputs(config)
    asked.subject.model.double()
    record, paths = orbits.measure(asked, config), slow_paths(asked, 9)[:3]
    for space, points in enumerate((paths, paths / paths.norm(dim=-1, keepdim=True))):
        rows = points.flatten(0, 1)
        centred = rows - rows.mean(0)
        sizes, axes = torch.linalg.eigh(centred.T @ centred)
        expected = (centred @ axes[:, -3:].flip(1)).view(3, 9, 3)
        torch.testing.assert_close(
            record.coordinates[space].abs(), expected.abs(), rtol=0, atol=1e-9
        )
        torch.testing.assert_close(
            record.explained[space], (sizes[-3:].flip(0) / sizes.sum()), rtol=0, atol=1e-9
        )
    steps = paths.diff(dim=1)
    cosines = torch.nn.functional.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=-1)
    torch.testing.assert_close(record.straightness, cosines[:, -6:].amin(1), rtol=0, atol=1e-9)
    norms = steps.norm(dim=-1)
    torch.testing.assert_close(
        record.step_ratio, norms[:, 8 - 1] / norms[:, 2 - 1], rtol=1e-9, atol=0
    )


def slow_paths(asked: Asked, n_loops: int) -> Tensor:
    """Float[Tensor, "path iteration d_model"], every token of the first input, from a cache."""
    tokens = asked.group().batch.tokens
    cache = asked.subject.model.run_with_cache(
        tokens, n_loops=n_loops, names_filter="loops.*.hook_state_out"
    )[1]
    return torch.stack([cache[f"loops.{t}.hook_state_out"][0] for t in range(n_loops)], dim=1)


def kind_of(points: Tensor) -> tuple[str, str]:
    """What one path in space comes to, through the record alone."""
    state = Dynamics.of(
        points[:, None, None],
        range(1, len(points) + 1),
        (torch.zeros(1, 1).long(), torch.ones(1, 1).bool()),
        "resid",
    )
    steps = state.step_norm()[:, 0, 0]
    record = orbits.OrbitPaths(
        labels=("path",),
        hops=(None,),
        trained_hops=None,
        coordinates=torch.zeros(2, 1, len(points), 2),
        explained=torch.zeros(2, 2),
        period=torch.stack(
            [space.period(4, 0.01, 8)[:, 0] for space in (state, state.directions())]
        ),
        straightness=state.update_cosine()[-6:, 0].amin(0),
        step_ratio=(steps[-1] / steps[-7])[None],
    )
    return record.kinds()[0]


def test_each_kind_of_path_has_its_name() -> None:
    t = torch.arange(1, 13, dtype=torch.float64)
    ones = torch.ones_like(t)
    assert kind_of(torch.stack([ones, 2 * ones], 1)) == ("fixed point", "fixed point")
    assert kind_of(torch.stack([3 + 0.5**t, ones], 1)) == ("fixed point", "fixed point")
    assert kind_of(torch.stack([(math.pi * t).cos(), 3 * ones], 1)) == ("orbit of 2", "orbit of 2")
    assert kind_of(torch.stack([(2 * math.pi * t / 3).cos(), (2 * math.pi * t / 3).sin()], 1)) == (
        "orbit of 3",
        "orbit of 3",
    )
    assert kind_of(torch.stack([100 * t, 200 * t + 1], 1)) == ("slider", "fixed point")
    assert kind_of(torch.stack([0.9**t, 1 + 0 * t], 1)) == ("settling", "moving")
    assert kind_of(torch.stack([2 + (0.7 * t).cos(), (0.7 * t).sin()], 1)) == (
        "wandering",
        "moving",
    )


def test_shipped_states_slide_on_while_their_directions_come_to_rest(
    shipped: orbits.OrbitPaths,
) -> None:
    assert shipped.hops == (1, 3, 5, 7, 10, 12, 14, 16)
    assert shipped.kinds() == [("slider", "fixed point")] * 8
    assert shipped.coordinates.shape == (2, 8, 32, 2)
    assert len(shipped.frame()) == 2 * 8 * 32
    assert shipped.summary()["state"].tolist() == ["slider"] * 8


def test_questions_of_one_hop_count_and_tokens_of_one_question() -> None:
    by_question = orbits.run(OrbitsConfig(hops=4, paths=3, n_loops=8))
    asked = open_inputs(OrbitsConfig())
    assert by_question.labels == asked.group(4).texts[:3]
    by_token = orbits.run(OrbitsConfig(hops=4, positions="tokens", n_loops=8))
    words = asked.subject.model.to_str_tokens(asked.group(4).texts[0])
    assert by_token.labels == tuple(f"{i} {word}" for i, word in enumerate(words))


def test_too_few_iterations_or_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="in the last 8 iterations, got only --n-loops 7"):
        orbits.run(OrbitsConfig(n_loops=7))
    with pytest.raises(ValueError, match="at least one path is needed, got --paths 0"):
        orbits.run(OrbitsConfig(paths=0))


@pytest.mark.shapes
def test_each_path_is_drawn_in_each_panel_from_a_ring_to_a_square(
    shipped: orbits.OrbitPaths,
) -> None:
    figure = orbits.figure(shipped)
    paths = [trace for trace in figure.data if trace.mode == "lines+markers"]
    ends = [trace for trace in figure.data if trace.mode == "markers"]
    assert len(paths) == 2 * 8
    assert [trace.name for trace in paths if trace.showlegend] == [
        "1 hop",
        *(f"{hop} hops" for hop in shipped.hops[1:]),
    ]
    assert list(paths[3].x) == shipped.coordinates[0, 3, :, 0].tolist()
    assert list(paths[8 + 3].y) == shipped.coordinates[1, 3, :, 1].tolist()
    assert [trace.marker.symbol for trace in ends] == ["circle-open", "square"] * 2
    assert list(ends[1].x) == shipped.coordinates[0, :, -1, 0].tolist()
    assert "8 of 8: slider" in figure.layout.annotations[0].text
    assert "8 of 8: fixed point" in figure.layout.annotations[1].text
    tall = orbits.figure(
        replace(shipped, coordinates=torch.randn(2, 8, 32, 3), explained=torch.rand(2, 3))
    )
    assert len(tall.data) == 2 * (2 * 8 + 4)
