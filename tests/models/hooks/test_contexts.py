"""Contexts of hooks are left in any order: each removes its own hooks and no others."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch

from loopscope.interp.edit.steering import steer
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_MODEL, Calls, full, hook_count, nothing, random_tokens, run


@pytest.mark.parametrize("first", [0, 1])
def test_two_contexts_may_be_left_in_any_order(first: int, plain: RecurrentDepth) -> None:
    calls = (Calls(), Calls())
    contexts = [plain.hooks([("**.hook_state_in", call)], n_loops=2) for call in calls]
    for context in contexts:
        context.__enter__()
    contexts[first].__exit__(None, None, None)
    plain(random_tokens(), n_loops=2)
    assert calls[first].names == []
    assert calls[1 - first].names == ["loops.0.hook_state_in", "loops.1.hook_state_in"]
    contexts[1 - first].__exit__(None, None, None)
    assert hook_count(plain) == 0
    assert plain.context_level == 0
    assert plain(random_tokens(), n_loops=3).isfinite().all()


def test_a_closed_generator_removes_its_own_hooks(plain: RecurrentDepth) -> None:
    def steps() -> Iterator[int]:
        with plain.hooks([("hook_embed", nothing)]):
            yield 1

    running = steps()
    next(running)
    calls = Calls()
    with plain.hooks([("hook_embed", calls)]):
        running.close()
        plain(random_tokens())
    assert calls.names == ["hook_embed"]
    assert hook_count(plain) == 0


def test_a_context_may_be_left_in_another_thread(plain: RecurrentDepth) -> None:
    mine, theirs = Calls(), plain.hooks([("hook_embed", nothing)])
    theirs.__enter__()
    with plain.hooks([("hook_embed", mine)]):
        leaving = threading.Thread(target=theirs.__exit__, args=(None, None, None))
        leaving.start()
        leaving.join()
        plain(random_tokens())
    assert mine.names == ["hook_embed"]
    assert hook_count(plain) == 0


def test_a_reset_inside_a_context_is_no_error(plain: RecurrentDepth) -> None:
    with plain.hooks([("**.hook_z", nothing)], n_loops=2):
        plain.reset_hooks()
        assert plain(random_tokens(), n_loops=3).isfinite().all()
    assert hook_count(plain) == 0


def test_hooks_of_which_one_matches_nothing_are_not_attached(plain: RecurrentDepth) -> None:
    with (
        pytest.raises(KeyError, match="matches no hook point"),
        plain.hooks([("hook_embed", nothing), ("hook_nowhere", nothing)]),
    ):
        raise AssertionError("not entered")
    assert hook_count(plain) == 0
    assert plain.context_level == 0


def test_a_context_that_was_left_holds_nothing(plain: RecurrentDepth) -> None:
    vector = torch.ones(D_MODEL)
    seen = weakref.ref(vector)
    with steer(plain, vector, loops=1, layers=0):
        pass
    del vector
    gc.collect()
    assert seen() is None
    copied = pickle.loads(pickle.dumps(plain))
    assert torch.equal(run(copied, full()), run(plain, full()))
