"""How long hooks live, and in which order they are called."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import Calls, explode, hook_count, nothing, random_tokens


def test_permanent_hooks_stay_until_asked_for(plain: RecurrentDepth) -> None:
    calls = Calls()
    plain.add_perma_hook("loops.*.hook_state_in", calls, n_loops=2)
    before = hook_count(plain)
    plain.add_hook("hook_embed", nothing)
    plain.reset_hooks()
    assert hook_count(plain) == before
    plain.run_with_cache(random_tokens(), n_loops=2)
    assert calls.names == ["loops.0.hook_state_in", "loops.1.hook_state_in"]
    with pytest.raises(ValueError, match=r"attached for n_loops=2.*n_loops=3"):
        plain(random_tokens(), n_loops=3)
    plain.reset_hooks(including_permanent=True)
    assert hook_count(plain) == 0
    assert plain(random_tokens(), n_loops=3).isfinite().all()


def test_nested_contexts_remove_only_their_own_hooks(plain: RecurrentDepth) -> None:
    plain.add_hook("hook_embed", nothing)
    own = hook_count(plain)
    outer_calls, inner_calls = Calls(), Calls()
    with plain.hooks([("**.hook_state_in", outer_calls)], n_loops=2):
        outer = hook_count(plain)
        with plain.hooks([("**.hook_state_in", inner_calls), ("**.hook_z", nothing)], n_loops=2):
            plain(random_tokens(), n_loops=2)
            assert hook_count(plain) > outer > own
        assert hook_count(plain) == outer
        plain(random_tokens(), n_loops=2)
    assert hook_count(plain) == own
    assert inner_calls.names == ["loops.0.hook_state_in", "loops.1.hook_state_in"]
    assert outer_calls.names == inner_calls.names * 2


def test_inner_context_that_fails_leaves_the_outer_one_in_place(plain: RecurrentDepth) -> None:
    with plain.hooks([("hook_embed", nothing)]):
        outer = hook_count(plain)
        with pytest.raises(RuntimeError, match="a hook failed"):
            plain.run_with_hooks(random_tokens(), fwd_hooks=[("**.hook_z", explode)])
        assert hook_count(plain) == outer > 0
        assert plain.context_level == 1
    assert hook_count(plain) == 0


def test_hooks_of_a_context_may_be_kept(plain: RecurrentDepth) -> None:
    calls = Calls()
    plain.run_with_hooks(random_tokens(), fwd_hooks=[("hook_embed", calls)], reset_hooks_end=False)
    plain(random_tokens())
    assert calls.names == ["hook_embed", "hook_embed"]
    plain.reset_hooks()
    assert hook_count(plain) == 0


def test_resetting_reaches_points_that_later_calls_do_not(plain: RecurrentDepth) -> None:
    plain.add_hook("loops.7.hook_state_in", nothing)
    plain(random_tokens(), n_loops=8)
    plain.reset_hooks()
    assert hook_count(plain) == 0
    assert plain(random_tokens(), n_loops=1).isfinite().all()


def test_add_caching_hooks_fill_a_given_dictionary_until_reset(plain: RecurrentDepth) -> None:
    mine: dict[str, Tensor] = {}
    assert plain.add_caching_hooks("hook_embed", cache=mine) is mine
    plain(random_tokens())
    assert torch.equal(mine["hook_embed"], plain.W_E[random_tokens()])
    mine.clear()
    plain.reset_hooks()
    plain(random_tokens())
    assert mine == {}


def test_get_caching_hooks_are_attached_by_the_caller(plain: RecurrentDepth) -> None:
    store, forward, _ = plain.get_caching_hooks(
        "**.hook_z", n_loops=2, pos_slice=slice(1, 3), device="cpu"
    )
    plain(random_tokens(), n_loops=2)
    assert store == {}
    plain.run_with_hooks(random_tokens(), n_loops=2, fwd_hooks=forward)
    assert {value.shape[1] for value in store.values()} == {2}
    assert len(store) == 4


def test_prepended_hook_comes_first(plain: RecurrentDepth) -> None:
    order = []
    plain.add_hook("hook_embed", lambda value, hook: order.append("second"))
    plain.add_hook("hook_embed", lambda value, hook: order.append("first"), prepend=True)
    plain(random_tokens())
    assert order == ["first", "second"]
