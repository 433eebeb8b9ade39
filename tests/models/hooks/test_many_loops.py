"""Calls of thousands of iterations: hook points are made where a hook is attached."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loopscope.models.core.points import SHOWN
from loopscope.models.core.registry import build
from loopscope.models.core.state import MOST_LOOPS
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import Calls, nothing, random_tokens, toy_config

MANY = 4000


def test_a_model_that_records_thousands_of_iterations_makes_few_points() -> None:
    model = build(toy_config(n_loops=MANY))
    assert len(model.hook_names()) > MANY * 40
    assert len(model.hook_dict) < (SHOWN + 1) * 50


def test_a_late_point_is_made_where_a_hook_is_attached(plain: RecurrentDepth) -> None:
    name, calls = f"loops.{SHOWN + 5}.blocks.1.hook_resid_post", Calls()
    n_loops = SHOWN + 7
    logits, cache = plain.run_with_cache(random_tokens(), n_loops=n_loops, names_filter=name)
    assert list(cache) == [name]
    with plain.hooks([(name, calls)], n_loops=n_loops):
        plain(random_tokens(), n_loops=n_loops)
    assert calls.names == [name]
    assert plain.hook_dict[name].name == name
    assert torch.equal(plain(random_tokens(), n_loops=n_loops), logits)


def test_late_hooks_are_refused_in_shorter_calls_too(plain: RecurrentDepth) -> None:
    name = f"loops.{SHOWN + 5}.hook_state_in"
    plain.add_hook(name, nothing)
    with pytest.raises(ValueError, match=rf"a hook is attached at '{name}'"):
        plain(random_tokens(), n_loops=SHOWN)


@pytest.mark.parametrize("n_loops", [MOST_LOOPS + 1, 10**9, 10**19])
def test_more_iterations_than_can_be_run_are_refused(n_loops: int, plain: RecurrentDepth) -> None:
    for call in (plain.hook_names, plain.schedule, lambda n: plain(random_tokens(), n_loops=n)):
        with pytest.raises(
            ValueError, match=f"n_loops must be at most {MOST_LOOPS}, got {n_loops}"
        ):
            call(n_loops)


@pytest.mark.parametrize("n_loops", [np.int64(3), np.int32(3), np.uint8(3), torch.tensor(3)])
def test_whole_numbers_of_other_libraries_count_iterations(
    n_loops: object, plain: RecurrentDepth
) -> None:
    assert torch.equal(plain(random_tokens(), n_loops=n_loops), plain(random_tokens(), n_loops=3))


@pytest.mark.parametrize("n_loops", [True, 3.0, "3", np.float64(3), torch.tensor([3, 4]), [3]])
def test_what_is_no_whole_number_is_refused(n_loops: object, plain: RecurrentDepth) -> None:
    with pytest.raises(TypeError, match=r"n_loops must be an integer,.* got"):
        plain(random_tokens(), n_loops=n_loops)
