"""Dynamics: trajectories against caches, and each statistic against plain loops."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.dynamics.answered import dynamics_and_lens
from loopscope.interp.dynamics.states import Dynamics, dynamics
from loopscope.interp.dynamics.statistics import effective_rank
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    LENGTHS,
    LOOPS,
    POS,
    assert_close,
    cached,
    explode,
    full,
    hook_count,
    odd_one,
    padded,
    random_tokens,
    toy,
    with_words,
)

REAL = torch.arange(POS) < torch.tensor(LENGTHS)[:, None]
STATISTICS = [
    "state_norm",
    "state_cosine",
    "step_norm",
    "relative_step_norm",
    "update_cosine",
    "second_difference",
    "distance_to_last",
    "relative_distance_to_last",
]


def trajectory(states: Tensor) -> Dynamics:
    """A record of planted states, "point batch pos d_model"."""
    batch, pos = states.shape[1:3]
    shown = torch.ones(batch, pos, dtype=torch.bool)
    return Dynamics(
        states, tuple(range(len(states))), torch.arange(pos).expand(batch, pos), shown, "resid"
    )


def random_trajectory(points: int = 5) -> Dynamics:
    return trajectory(
        torch.randn(
            points, 2, 3, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64
        )
    )


# Trajectories


def test_points_are_the_state_before_the_first_iteration_and_after_each(
    model: RecurrentDepth,
) -> None:
    cache = cached(model, padded(), ["loops.0.hook_state_in", "loops.*.hook_state_out"])
    found = dynamics(model, padded(), LOOPS)
    assert found.iterations == tuple(range(LOOPS + 1))
    assert found.states.shape == (LOOPS + 1, BATCH, POS, D_MODEL)
    expected = torch.stack(
        [
            cache["loops.0.hook_state_in"],
            *(cache[f"loops.{t}.hook_state_out"] for t in range(LOOPS)),
        ]
    )
    assert_close(found.states[:, REAL], expected[:, REAL])
    assert torch.equal(found.shown, REAL)
    assert found.states[:, ~REAL].isnan().all()
    assert not found.states.requires_grad


@pytest.mark.parametrize("batch_size", [1, 2])
def test_running_in_pieces_gives_the_same(batch_size: int, plain: RecurrentDepth) -> None:
    for positions in ("real", "readout"):
        whole = dynamics(plain, padded(), 3, positions=positions)
        pieces = dynamics(plain, padded(), 3, positions=positions, batch_size=batch_size)
        torch.testing.assert_close(
            pieces.states, whole.states, rtol=1e-9, atol=1e-9, equal_nan=True
        )


@pytest.mark.parametrize("batch_size", [2, 512])
def test_the_answers_are_read_in_the_same_run(batch_size: int, model: RecurrentDepth) -> None:
    path, lens = dynamics_and_lens(model, padded(), LOOPS, positions="real", batch_size=batch_size)
    expected = readout_lens(model, padded(), LOOPS)
    assert_close(lens.heads_input, expected.heads_input)
    assert (lens.names, lens.loops) == (expected.names, expected.loops)
    assert torch.equal(lens.position, expected.position)
    assert_close(path.states[:, REAL], dynamics(model, padded(), LOOPS).states[:, REAL])


def test_positions(plain: RecurrentDepth) -> None:
    batch = padded()
    everywhere = dynamics(plain, batch, 2, positions="all")
    assert everywhere.shown.all()
    assert everywhere.states.isfinite().all()
    read = dynamics(plain, batch, 2, positions="readout")
    assert_close(read.states[:, :, 0], everywhere.states[:, torch.arange(BATCH), batch.readout])
    assert torch.equal(read.position[:, 0], batch.readout)
    some = dynamics(plain, batch, 2, positions=[5, 0])
    assert_close(some.states, everywhere.states[:, :, [5, 0]])
    assert some.position.tolist() == [[5, 0]] * BATCH


def test_columns_that_are_padding_in_every_row_are_not_there(plain: RecurrentDepth) -> None:
    assert dynamics(plain, padded(width=POS + 2), 1).states.shape == (2, BATCH, POS, D_MODEL)


@pytest.mark.parametrize("positions", [[7], [0, -1], "last"])
def test_positions_that_are_none_are_refused(positions: object, plain: RecurrentDepth) -> None:
    with pytest.raises(
        (ValueError, TypeError), match="positions"
    ):  # TypeError where the test run checks types
        dynamics(plain, padded(), 2, positions=positions)


def test_another_part_of_the_state() -> None:
    model = toy("learned", True)
    found = dynamics(model, padded(), LOOPS, part="input")
    embedded = dynamics(model, padded(), LOOPS).states[0]
    assert found.part == "input"
    assert_close(found.states[:, REAL], embedded[REAL].expand(LOOPS + 1, -1, -1))
    assert (found.step_norm()[1:, REAL] == 0).all()
    assert found.update_cosine().isnan().all()  # a step of length 0 has no direction


def test_unknown_part_is_refused_with_the_known_ones(plain: RecurrentDepth) -> None:
    with pytest.raises(
        ValueError, match="this RecurrentDepth has no part 'latent' of real numbers; it has resid"
    ):
        dynamics(plain, padded(), 2, part="latent")


class Tagged(RecurrentDepth):
    """One whose state has a part of whole numbers."""

    def embed(
        self, tokens: Tensor, positions: Tensor, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, parts = super().embed(tokens, positions, taps)
        return resid, {**parts, "momentum": resid.flip(-1), "tags": positions}


def test_part_of_whole_numbers_is_refused() -> None:
    with pytest.raises(
        ValueError, match="has no part 'tags' of real numbers; it has resid, momentum"
    ):
        dynamics(odd_one(Tagged), full(), 2, part="tags")


def test_number_of_iterations(plain: RecurrentDepth) -> None:
    assert len(dynamics(plain, padded()).states) == LOOPS + 1
    with pytest.raises(ValueError, match="records no number of iterations"):
        dynamics(toy(n_loops=None), padded())


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    texts = ["<t_3><t_9><t_4>", "<t_8>"]
    batch = with_words(plain).encode(texts)
    assert_close(
        dynamics(plain, texts, 2, positions="readout").states,
        dynamics(plain, batch, 2, positions="readout").states,
    )
    tokens = dynamics(plain, random_tokens(), 2, readout=-2, positions="readout")
    assert tokens.position.tolist() == [[POS - 2]] * BATCH


def test_nothing_is_attached_and_nothing_left_behind(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    with plain.hooks([("loops.1.hook_state_out", explode)], n_loops=2):
        before = hook_count(plain)
        with pytest.raises(RuntimeError, match="a hook failed"):
            dynamics(plain, padded(), 2)
        assert hook_count(plain) == before
    monkeypatch.setattr(
        LoopedModel, "add_hook", lambda *arguments, **options: pytest.fail("a hook was attached")
    )
    dynamics(plain, padded(), 2)


# Statistics


def size(vector: list[float]) -> float:
    return math.sqrt(sum(x * x for x in vector))


def minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / (size(a) * size(b))


def slow(h: list[list[float]], t: int) -> dict[str, float]:
    """The statistics of one trajectory at a point, by their definitions."""
    found = dict.fromkeys(STATISTICS, math.nan)
    found["state_norm"] = size(h[t])
    found["distance_to_last"] = size(minus(h[t], h[-1]))
    found["relative_distance_to_last"] = size(minus(h[t], h[-1])) / size(h[-1])
    if t > 0:
        step = minus(h[t], h[t - 1])
        found |= {
            "step_norm": size(step),
            "relative_step_norm": size(step) / size(h[t - 1]),
            "state_cosine": cosine(h[t], h[t - 1]),
        }
    if t > 1:
        before = minus(h[t - 1], h[t - 2])
        found |= {
            "update_cosine": cosine(step, before),
            "second_difference": size(minus(step, before)),
        }
    return found


def test_frame_holds_every_statistic_by_its_definition(plain: RecurrentDepth) -> None:
    record = dynamics(plain, padded(), LOOPS)
    frame = record.frame()
    assert list(frame.columns) == ["iterations", "example", "position", *STATISTICS]
    assert len(frame) == (LOOPS + 1) * sum(LENGTHS)
    assert frame["iterations"].tolist() == [
        t for t in range(LOOPS + 1) for _ in range(sum(LENGTHS))
    ]
    assert set(zip(frame["example"], frame["position"], strict=True)) == {
        (i, j) for i, n in enumerate(LENGTHS) for j in range(n)
    }
    for row in frame.to_dict("records"):
        expected = slow(
            record.states[:, row["example"], row["position"]].tolist(), row["iterations"]
        )
        for name in STATISTICS:
            assert row[name] == pytest.approx(expected[name], rel=1e-9, abs=1e-9, nan_ok=True), name


@pytest.mark.shapes
def test_statistics_of_trajectories_too_short_for_them() -> None:
    lone = random_trajectory(points=1)
    for values in (
        lone.step_norm(),
        lone.step_norm(relative=True),
        lone.update_cosine(),
        lone.second_difference(),
        lone.state_cosine(),
    ):
        assert values.shape == (1, 2, 3)
        assert values.isnan().all()
    assert (lone.distance_to_last() == 0).all()


def test_straight_line_has_parallel_updates_and_no_second_difference() -> None:
    line = trajectory(
        torch.arange(4.0, dtype=torch.float64)[:, None, None, None]
        * torch.tensor([3.0, 4.0], dtype=torch.float64)
        + 1.0
    )
    assert_close(line.update_cosine()[2:], torch.ones(2, 1, 1, dtype=torch.float64))
    assert line.second_difference()[2:].flatten().tolist() == [0.0, 0.0]
    assert line.step_norm()[1:].flatten().tolist() == [5.0, 5.0, 5.0]
    assert line.distance_to_last().flatten().tolist() == [15.0, 10.0, 5.0, 0.0]


def test_directions_do_not_see_the_length_of_the_state() -> None:
    record = random_trajectory()
    lengths = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)[:, None, None, None]
    found = replace(record, states=record.states * lengths).directions()
    assert_close(found.states, record.directions().states)
    assert_close(found.state_norm(), torch.ones(5, 2, 3, dtype=torch.float64))
    assert_close(found.state_cosine()[1:], record.state_cosine()[1:])


# Effective rank


def test_effective_rank_counts_equal_directions() -> None:
    corners = torch.cat([torch.eye(7), -torch.eye(7)]).double()
    for k in (1, 2, 5):
        assert effective_rank(corners[:, :k] * 3.0 + 2.0).item() == pytest.approx(k, rel=1e-12)


def test_effective_rank_by_hand() -> None:
    """Singular values 3 and 1: shares 3/4 and 1/4."""
    rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert effective_rank(rows).item() == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), rel=1e-12
    )


def test_effective_rank_needs_rows_that_differ() -> None:
    assert effective_rank(torch.full((5, 3), 1 / 3)).isnan()
    with pytest.raises(ValueError, match="at least two rows, got 1"):
        effective_rank(torch.ones(1, 3))


@pytest.mark.shapes
def test_effective_rank_of_each_point_leaves_padding_out(plain: RecurrentDepth) -> None:
    record = dynamics(plain, padded(), 2)
    found = record.effective_rank()
    for point, states in zip(found, record.states, strict=True):
        rows = torch.stack(
            [states[i, j] for i, length in enumerate(LENGTHS) for j in range(length)]
        )
        sizes = np.linalg.svd((rows - rows.mean(0)).numpy(), compute_uv=False)
        shares = [share for share in sizes / sizes.sum() if share > 1e-12]
        assert point.item() == pytest.approx(
            math.exp(-sum(share * math.log(share) for share in shares)), rel=1e-9
        )
        assert 1 < point < sum(LENGTHS)


# Orbits


def test_orbits_on_all_components_keep_every_distance(plain: RecurrentDepth) -> None:
    record = dynamics(plain, padded(), LOOPS)
    orbits = record.orbits(k=D_MODEL)
    assert orbits.coordinates[:, ~REAL].isnan().all()
    moved, rotated = (x[:, REAL].flatten(0, 1) for x in (record.states, orbits.coordinates))
    assert_close((rotated[:, None] - rotated).norm(dim=-1), (moved[:, None] - moved).norm(dim=-1))
    assert orbits.explained.sum().item() == pytest.approx(1.0, rel=1e-12)


def test_orbits_are_the_leading_eigenvectors_of_the_covariance(plain: RecurrentDepth) -> None:
    record = dynamics(plain, padded(), LOOPS)
    orbits = record.orbits(k=3)
    values, vectors = torch.linalg.eigh(record.states[:, REAL].flatten(0, 1).T.cov())
    assert_close(orbits.explained, values.flip(0)[:3] / values.sum())
    for component, vector in zip(orbits.components, vectors.T.flip(0)[:3], strict=True):
        assert_close((component @ vector).abs(), torch.ones((), dtype=torch.float64))
        assert component[component.abs().argmax()] > 0
    assert_close(
        orbits.coordinates[:, REAL], (record.states[:, REAL] - orbits.mean) @ orbits.components.T
    )
    assert (orbits.explained.diff() <= 0).all()


def test_orbits_do_not_depend_on_the_order_of_the_examples(plain: RecurrentDepth) -> None:
    batch = padded()
    order = torch.tensor([2, 0, 1])
    orbits, shuffled = (
        dynamics(plain, b, LOOPS, positions="readout").orbits() for b in (batch, batch[order])
    )
    assert_close(shuffled.coordinates, orbits.coordinates[:, order])


def test_frame_of_orbits(plain: RecurrentDepth) -> None:
    orbits = dynamics(plain, padded(), 2).orbits(3)
    frame = orbits.frame()
    assert list(frame.columns) == ["iterations", "example", "position", "pc1", "pc2", "pc3"]
    row = frame[(frame.iterations == 2) & (frame.example == 1) & (frame.position == 3)]
    assert row[["pc1", "pc2", "pc3"]].to_numpy().tolist() == [orbits.coordinates[2, 1, 3].tolist()]


@pytest.mark.parametrize("k", [0, 8])
def test_orbits_refuse_a_number_of_components_that_there_is_not(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in 1\.\.7 for 30 points of size 7, got {k}"):
        random_trajectory().orbits(k)


# Periods


def planted(period: int, points: int = 12) -> Tensor:
    """Wander for three points, then go round `period` places: "point d_model"."""
    places = torch.randn(
        period, 7, generator=torch.Generator().manual_seed(period), dtype=torch.float64
    )
    start = torch.randn(3, 7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.cat([start, places[torch.arange(points - 3) % period]])


def test_periods_are_found() -> None:
    drift = torch.arange(1.0, 13.0, dtype=torch.float64)[:, None].expand(12, 7)
    record = trajectory(
        torch.stack([planted(1), planted(2), planted(3), planted(4), planted(5), drift], dim=1)[
            :, :, None
        ]
    )
    assert record.period(tol=1e-6)[:, 0].tolist() == pytest.approx(
        [1, 2, 3, 4, math.nan, math.nan], nan_ok=True
    )
    assert record.period(max_period=2, tol=1e-6)[:, 0].tolist() == pytest.approx(
        [1, 2, math.nan, math.nan, math.nan, math.nan], nan_ok=True
    )
    assert (
        record.period(tol=1e-6, window=12)[:, 0].isnan().all()
    )  # the window holds the wandering too
    assert record.directions().period()[-1].item() == 1  # the drift grows without turning


def test_tolerance_of_a_period_is_relative_and_holds_all_through_the_window() -> None:
    states = torch.full((8, 1, 1, 1), 100.0, dtype=torch.float64)
    states[6] = 101.5
    assert trajectory(states).period(max_period=3, tol=0.02).item() == 1
    assert trajectory(states).period(max_period=3, tol=0.01).isnan()
    assert trajectory(states).period(max_period=1, tol=0.01, window=4).isnan()
    states[1] = 500.0
    assert trajectory(states).period(max_period=3, tol=0.02).item() == 1


def test_padding_has_no_period(plain: RecurrentDepth) -> None:
    assert dynamics(plain, padded(), LOOPS).period(max_period=2, tol=1e9)[~REAL].isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"max_period": 3},
        {"max_period": 2, "window": 3},
        {"max_period": 1, "window": 6},
    ],
)
def test_period_refuses_what_the_trajectory_cannot_show(options: dict[str, int]) -> None:
    with pytest.raises(
        ValueError, match="at least 2 \\* max_period points, of the 5 that there are"
    ):
        random_trajectory(points=5).period(**options)


# A trained model


def test_trained_model_turns_ever_less() -> None:
    model = load("ltg_trained")
    texts = ["<e_24><r_0><r_7>", "<e_3><r_1>", "<e_11><r_2><r_9><r_5><r_0>"]
    found = dynamics(model, texts, 16, positions="readout")
    assert found.state_cosine()[16].min() > 0.999
    assert found.update_cosine()[16].min() > found.update_cosine()[3].max()
