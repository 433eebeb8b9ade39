"""Identity 8: a run that is stopped, cut, joined or given its earlier keys goes on as the full run
does.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.models.basis.tokens import Batch
from loopscope.models.core.attention import KeyValues
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, cat_states
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    LAYERS,
    LOOPS,
    POS,
    POSITION,
    assert_close,
    full,
    index_at,
    is_close,
    padded,
    random_tokens,
    run,
    run_hooked,
)


def start(model: LoopedModel, batch: Batch) -> State:
    return model.begin(batch.tokens, batch.mask, n_loops=LOOPS)


def test_stopping_and_resuming_at_any_visit_equals_the_full_run(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch)
    for stop in range(LOOPS * LAYERS + 1):
        state = model.advance(start(model, batch), stop)
        assert state.visit == stop
        assert_close(model.readout(model.advance(state)), logits)


def test_stopping_at_every_visit_equals_the_full_run(model: RecurrentDepth) -> None:
    batch = padded()
    state = start(model, batch)
    for visit in model.schedule(LOOPS):
        state = model.advance(state, visit.name)
    assert_close(model.readout(model.advance(state)), run(model, batch))


def test_resuming_after_slicing_moving_and_joining_states(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch)
    for stop in range(LOOPS * LAYERS + 1):
        state = model.advance(start(model, batch), stop)
        swapped = cat_states([state.rows(slice(1, None)).to("cpu"), state.rows(torch.tensor([0]))])
        assert_close(model.readout(model.advance(swapped)), logits[[1, 2, 0]])
        shorter = state.rows(pos=slice(0, POSITION + 1))
        assert_close(model.readout(model.advance(shorter)), logits[:, : POSITION + 1])


def test_states_leave_an_earlier_state_as_it_was(model: RecurrentDepth) -> None:
    before = start(model, padded())
    resid, parts = before.resid.clone(), {name: part.clone() for name, part in before.parts.items()}
    model.advance(before)
    assert before.visit == 0
    assert torch.equal(before.resid, resid)
    assert all(torch.equal(before.parts[name], part) for name, part in parts.items())
    assert set(parts) == ({"input"} if model.cfg.input_injection else set())


def recorded(model: LoopedModel, batch: Batch) -> dict[str, KeyValues]:
    store: dict[str, KeyValues] = {}
    model.advance(start(model, batch), store=store)
    return store


@pytest.mark.parametrize("first", [1, POSITION, POS - 1])
def test_later_rows_with_supplied_keys_equal_the_full_run(
    first: int, model: RecurrentDepth
) -> None:
    batch = full()
    logits, store = run(model, batch), recorded(model, batch)
    assert list(store) == [visit.name for visit in model.schedule(LOOPS)]
    for stop in (0, 1, LAYERS, LOOPS * LAYERS - 1):
        state = model.advance(start(model, batch), stop).rows(pos=slice(first, None))
        assert_close(model.readout(model.advance(state, supplied=store)), logits[:, first:])


def test_later_rows_with_supplied_keys_and_padding_equal_the_full_run(
    model: RecurrentDepth,
) -> None:
    batch = padded()
    logits, store = run(model, batch), recorded(model, batch)
    state = model.advance(start(model, batch), 3).rows(torch.tensor([1, 2]), slice(POSITION, None))
    others = {
        name: KeyValues(kv.k[1:], kv.v[1:], kv.positions[1:], kv.mask[1:])
        for name, kv in store.items()
    }
    assert_close(model.readout(model.advance(state, supplied=others)), logits[1:, POSITION:])


def test_changed_later_rows_see_the_supplied_earlier_ones(model: RecurrentDepth) -> None:
    batch = full()
    changed = replace(
        batch, tokens=torch.cat([batch.tokens[:, :4], random_tokens(seed=4)[:, 4:]], dim=1)
    )
    later = start(model, changed).rows(pos=slice(4, None))
    assert_close(
        model.readout(model.advance(later, supplied=recorded(model, batch))),
        run(model, changed)[:, 4:],
    )


@pytest.mark.parametrize(
    "site",
    [
        "attn.hook_attn_scores",
        "attn.hook_pattern",
        "ln1.hook_scale",
        "attn.hook_q",
        "hook_resid_mid",
    ],
)
def test_hooks_act_on_a_subset_of_rows(site: str, model: RecurrentDepth) -> None:
    batch, name = full(), f"loops.1.blocks.1.{site}"
    store, last = recorded(model, batch), index_at(name, -1)

    def halve_last(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[last] *= 0.5
        return changed

    expected = run_hooked(model, batch, name, halve_last)
    later = start(model, batch).rows(pos=slice(POS - 2, None))
    with model.hooks([(name, halve_last)], n_loops=LOOPS):
        logits = model.readout(model.advance(later, supplied=store))
    assert not is_close(logits, run(model, batch)[:, POS - 2 :])
    assert_close(logits, expected[:, POS - 2 :])


def test_rows_that_would_see_no_key_are_refused(plain: RecurrentDepth) -> None:
    padding = start(plain, padded()).rows(torch.tensor([1]), slice(5, None))
    with pytest.raises(ValueError, match="must see at least one key"):
        plain.advance(padding)


def test_states_of_different_places_do_not_join(plain: RecurrentDepth) -> None:
    state = start(plain, full())
    with pytest.raises(ValueError, match="must stand at one visit"):
        cat_states([state, plain.advance(state, 1)])
