"""Layers and attention over iterations, against caches and plain loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from loopscope.checkpoints.load import load
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.models.core.state import Slot
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LENGTHS,
    LOOPS,
    POS,
    ShortEnding,
    assert_close,
    cached,
    explode,
    hook_count,
    odd_one,
    padded,
    toy,
)

REAL = torch.arange(POS) < torch.tensor(LENGTHS)[:, None]


# Layers


def test_each_layer_has_the_trajectory_of_its_own_output(model: RecurrentDepth) -> None:
    cache = cached(model, padded(), "loops.*.blocks.*.hook_resid_post")
    found = layer_dynamics(model, padded(), LOOPS)
    assert found.names == ("blocks.0", "blocks.1")
    for layer, record in enumerate(found.layers):
        expected = torch.stack(
            [cache[f"loops.{t}.blocks.{layer}.hook_resid_post"] for t in range(LOOPS)]
        )
        assert record.iterations == tuple(range(1, LOOPS + 1))
        assert_close(record.states[:, REAL], expected[:, REAL])
        assert record.states[:, ~REAL].isnan().all()
        assert_close(
            record.step_norm()[1:, REAL], (expected[1:] - expected[:-1]).norm(dim=-1)[:, REAL]
        )


def cyclic() -> RecurrentDepth:
    """Block 0 adds a constant and block 1 takes it away, so that each layer is at a fixed point of
    its own.
    """
    model = toy()
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.W_O_flat, block.attn.b_O, block.mlp.W_out, block.mlp.b_out):
                part.zero_()
        model.blocks[0].mlp.b_out[:2] = torch.tensor([3.0, 4.0])
        model.blocks[1].mlp.b_out[:2] = -torch.tensor([3.0, 4.0])
    return model


@pytest.mark.shapes
def test_layers_may_settle_at_different_fixed_points() -> None:
    found = layer_dynamics(cyclic(), padded(), 6)
    between = found.between_layers()
    assert between.shape == (LAYERS, LAYERS, BATCH, POS)
    assert_close(between[0, 1, REAL], torch.full((sum(LENGTHS),), 5.0, dtype=torch.float64))
    assert (between[1, 1, REAL] == 0).all()
    assert_close(
        found.between_layers(relative=True)[0, 1, REAL],
        5.0 / found.layers[0].state_norm()[-1, REAL],
    )
    for record in found.layers:
        assert record.step_norm()[1:, REAL].max() < 1e-12
        assert (record.period(max_period=3, tol=1e-9)[REAL] == 1).all()


def test_a_block_that_an_iteration_leaves_out_has_no_point_there() -> None:
    found = layer_dynamics(odd_one(ShortEnding), padded(), 3)
    assert [record.iterations for record in found.layers] == [(1, 2, 3), (1, 2)]


def test_frame_of_layers(plain: RecurrentDepth) -> None:
    found = layer_dynamics(plain, padded(), 3, positions="readout")
    frame = found.frame()
    assert list(frame.columns) == ["block", "layer", *found.layers[0].frame().columns]
    assert frame["block"].tolist() == ["blocks.0"] * 9 + ["blocks.1"] * 9
    assert frame["layer"].tolist() == [0] * 9 + [1] * 9
    assert frame["step_norm"].tolist()[12:] == found.layers[1].step_norm()[1:].flatten().tolist()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_layers_in_pieces_give_the_same(batch_size: int, plain: RecurrentDepth) -> None:
    layers = [
        layer_dynamics(plain, padded(), 3, batch_size=size).layers[1].states
        for size in (batch_size, 512)
    ]
    torch.testing.assert_close(*layers, rtol=1e-9, atol=1e-9, equal_nan=True)


# Attention


def test_attention_change_and_entropy_by_their_definitions(model: RecurrentDepth) -> None:
    cache = cached(model, padded(), "loops.*.blocks.*.attn.hook_pattern")
    found = attention_dynamics(model, padded(), LOOPS)
    tolerance = 1e-9 if next(model.parameters()).dtype == torch.float64 else 1e-5
    for t in range(LOOPS):
        for layer in range(LAYERS):
            for head in range(HEADS):
                now = [
                    cache[f"loops.{t}.blocks.{layer}.attn.hook_pattern"][i, head, j]
                    for i, n in enumerate(LENGTHS)
                    for j in range(n)
                ]
                entropy = sum(-(p * p.log()).nansum() for p in now) / sum(LENGTHS)
                assert found.entropy[t, layer, head].item() == pytest.approx(
                    entropy.item(), abs=tolerance
                )
                if t > 0:
                    name = f"loops.{t - 1}.blocks.{layer}.attn.hook_pattern"
                    before = [
                        cache[name][i, head, j] for i, n in enumerate(LENGTHS) for j in range(n)
                    ]
                    change = sum(
                        (a - b).clamp(min=0).sum() for a, b in zip(now, before, strict=True)
                    ) / sum(LENGTHS)
                    assert found.change[t, layer, head].item() == pytest.approx(
                        change.item(), abs=tolerance
                    )
    assert found.change[0].isnan().all()
    assert found.change[1:].min() > 0
    assert found.change[1:].max() < 1


def test_attention_of_chosen_queries_and_in_pieces(plain: RecurrentDepth) -> None:
    for positions in ("real", "readout", [3, 1]):
        whole = attention_dynamics(plain, padded(), 3, positions=positions)
        pieces = attention_dynamics(plain, padded(), 3, positions=positions, batch_size=2)
        torch.testing.assert_close(
            pieces.change, whole.change, rtol=1e-9, atol=1e-12, equal_nan=True
        )
        torch.testing.assert_close(pieces.entropy, whole.entropy, rtol=1e-9, atol=1e-12)
    first = attention_dynamics(plain, padded(), 3, positions=[0])
    assert (
        first.entropy.abs().max() == first.change[1:].abs().max() == 0
    )  # the first query sees nothing but itself


def test_attention_at_a_fixed_point_does_not_change() -> None:
    found = attention_dynamics(cyclic(), padded(), 4)
    assert found.change[1:].max() < 1e-12
    assert found.entropy.min() > 0


def test_attention_of_a_block_that_an_iteration_leaves_out() -> None:
    found = attention_dynamics(odd_one(ShortEnding), padded(), 3, batch_size=2)
    assert found.change.isnan().any(-1).tolist() == [[True, True], [False, False], [False, True]]
    assert found.entropy.isnan().any(-1).tolist() == [[False, False], [False, False], [False, True]]


def test_frame_of_attention(plain: RecurrentDepth) -> None:
    found = attention_dynamics(plain, padded(), 3)
    frame = found.frame()
    assert list(frame.columns) == ["visit", "loop", "layer", "head", "change", "entropy"]
    row = frame[(frame.loop == 2) & (frame.layer == 1) & (frame["head"] == 4)]
    assert row["visit"].tolist() == ["loops.2.blocks.1"]
    assert row[["change", "entropy"]].to_numpy().tolist() == [
        [found.change[2, 1, 4].item(), found.entropy[2, 1, 4].item()]
    ]
    assert len(frame) == 3 * LAYERS * HEADS


# What is refused, and what is left


class NoPattern(RecurrentDepth):
    """A family whose blocks have no attention patterns."""

    hidden: ClassVar = ("attn.hook_pattern", "hook_resid_post")

    def plan(self, n_loops: int) -> list[Slot]:
        return [
            replace(slot, sites=tuple(s for s in slot.sites if s not in self.hidden))
            for slot in super().plan(n_loops)
        ]


def test_families_without_the_site_are_refused() -> None:
    model = odd_one(NoPattern)
    with pytest.raises(
        ValueError,
        match=r"needs the site 'attn.hook_pattern', which no block in the loop of a NoPattern has",
    ):
        attention_dynamics(model, padded(), 2)
    with pytest.raises(ValueError, match="needs the site 'hook_resid_post'"):
        layer_dynamics(model, padded(), 2)


@pytest.mark.parametrize("method", [layer_dynamics, attention_dynamics])
def test_nothing_is_left_behind(method: Callable[..., object], plain: RecurrentDepth) -> None:
    with plain.hooks([("loops.1.hook_state_out", explode)], n_loops=2):
        before = hook_count(plain)
        with pytest.raises(RuntimeError, match="a hook failed"):
            method(plain, padded(), 2)
        assert hook_count(plain) == before
    method(plain, padded(), 2)
    assert hook_count(plain) == 0


def test_attention_of_a_trained_model_settles() -> None:
    texts = ["<e_24><r_0><r_7>", "<e_3><r_1>", "<e_11><r_2><r_9><r_5><r_0>"]
    assert attention_dynamics(load("ltg_trained"), texts, 16).change[-1].max() < 0.05
