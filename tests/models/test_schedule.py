"""begin, advance, readout: which visits a run makes, and where it may stop."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, D_VOCAB, LAYERS, LOOPS, POS, assert_close, padded, random_tokens, toy


def test_forward_is_begin_advance_readout(model: RecurrentDepth) -> None:
    batch = padded()
    state = model.advance(model.begin(batch.tokens, batch.mask, n_loops=3))
    logits = model(batch.tokens, n_loops=3, mask=batch.mask)
    assert logits.shape == (BATCH, POS, D_VOCAB)
    assert torch.equal(model.readout(state), logits)
    at = model.readout(state, batch.readout)
    assert at.shape == (BATCH, D_VOCAB)
    assert_close(at, logits[torch.arange(BATCH), batch.readout])
    assert_close(model.unembed(model.read_state(state)), logits)


def test_begin_holds_the_embedding(model: RecurrentDepth) -> None:
    batch = padded()
    state = model.begin(batch.tokens, batch.mask, n_loops=3)
    assert (state.visit, state.n_loops) == (0, 3)
    assert torch.equal(state.mask, batch.mask.bool())
    assert torch.equal(state.positions, torch.arange(POS).expand(BATCH, POS))
    embedded = model.W_E[batch.tokens] + (model.W_pos[:POS] if model.positional else 0)
    assert torch.equal(state.resid, embedded)


def test_state_is_frozen(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens())
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'visit'"):
        state.visit = 3


def test_schedule_lists_the_visits_in_order(model: RecurrentDepth) -> None:
    visits = model.schedule(3)
    assert [visit.name for visit in visits] == [
        f"loops.{t}.blocks.{layer}" for t in range(3) for layer in range(LAYERS)
    ]
    assert [(visit.index, visit.loop, visit.layer) for visit in visits] == [
        (i, i // LAYERS, i % LAYERS) for i in range(3 * LAYERS)
    ]
    assert all(visit.block is model.blocks[visit.layer] for visit in visits)
    assert model.iteration_ends(3) == [2, 4, 6]
    assert model.schedule() == model.schedule(LOOPS)


@pytest.mark.parametrize(
    ("until", "stop"),
    [
        (0, 0),
        (3, 3),
        ("loops.1.blocks.1", 3),
        ("loops.0.blocks.0", 0),
        ("loops.2", 4),
        ("loops.3.blocks.1", 7),
        (8, 8),
        (None, 8),
    ],
)
def test_advance_stops_before_a_visit(
    until: int | str | None, stop: int, model: RecurrentDepth
) -> None:
    state = model.advance(model.begin(random_tokens()), until)
    assert state.visit == stop
    _, cache = model.run_with_cache(random_tokens(), names_filter="**.hook_resid_post")
    expected = model.begin(random_tokens()).resid if stop == 0 else list(cache.values())[stop - 1]
    assert_close(state.resid, expected)


def test_advance_to_where_a_state_stands_changes_nothing(plain: RecurrentDepth) -> None:
    state = plain.advance(plain.begin(random_tokens()), 3)
    assert plain.advance(state, 3) is state
    assert plain.advance(state, "loops.1.blocks.1") is state


@pytest.mark.parametrize("until", ["loops.4", "loops.0.blocks.2", "coda.0", "loop.0", ""])
def test_advance_to_an_unknown_visit_raises(until: str, plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match=f"'{until}' is no visit of a schedule with n_loops=4"):
        plain.advance(plain.begin(random_tokens()), until)


@pytest.mark.parametrize("until", [2, -1, 9, "loops.1", "loops.0.blocks.1"])
def test_advance_backwards_or_beyond_raises(until: int | str, plain: RecurrentDepth) -> None:
    state = plain.advance(plain.begin(random_tokens()), 3)
    with pytest.raises(
        ValueError, match="stands before visit 3 of 8, so it cannot be run to visit"
    ):
        plain.advance(state, until)


def test_until_is_no_truth_value(plain: RecurrentDepth) -> None:
    with pytest.raises(TypeError, match="must be an integer, got bool"):
        plain.advance(plain.begin(random_tokens()), True)


def test_state_parts_are_what_an_analysis_may_read() -> None:
    injecting = toy("none", True)
    state = injecting.begin(random_tokens(), n_loops=2)
    parts = injecting.state_parts(state)
    assert set(parts) == {"resid", "input"}
    assert torch.equal(parts["input"], injecting.W_E[random_tokens()])
