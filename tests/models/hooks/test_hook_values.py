"""Values that hooks write into or return: nothing that was kept or handed in changes, and a value
of another kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import TOYS
from family_toys import random_tokens as tokens_for
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import unrolled
from toy import LOOPS, hook_count, random_tokens


def write_zeros(value: Tensor, hook: object) -> Tensor:
    value[:, -1] = 0
    return value


def write_and_return_nothing(value: Tensor, hook: object) -> None:
    value[:, -1] = 0


def out_of_place(value: Tensor, hook: object) -> Tensor:
    changed = value.clone()
    changed[:, -1] = 0
    return changed


@pytest.mark.parametrize("hook", [write_zeros, write_and_return_nothing])
def test_a_hook_that_writes_in_place_leaves_the_state_that_was_handed_in(
    hook: Any, plain: RecurrentDepth
) -> None:
    state = plain.advance(plain.begin(random_tokens(), n_loops=LOOPS), "loops.1")
    before = state.resid.clone()
    with plain.hooks([("loops.1.hook_state_in", hook)], n_loops=LOOPS):
        ended = plain.advance(state)
    assert torch.equal(state.resid, before)
    with plain.hooks([("loops.1.hook_state_in", out_of_place)], n_loops=LOOPS):
        assert torch.equal(plain.advance(state).resid, ended.resid)


@pytest.mark.parametrize("hook", [write_zeros, write_and_return_nothing])
@pytest.mark.parametrize(
    "site", ["hook_resid_pre", "ln1.hook_normalized", "attn.hook_q", "mlp.hook_pre"]
)
def test_a_hook_that_writes_in_place_does_as_one_that_returns_a_copy(
    site: str, hook: Any, plain: RecurrentDepth
) -> None:
    name, tokens = f"loops.1.blocks.1.{site}", random_tokens()
    _, kept = plain.run_with_cache(tokens, names_filter="**")
    logits = {}
    for change in (hook, out_of_place):
        with plain.hooks([(name, change)]):
            logits[change], cache = plain.run_with_cache(tokens, names_filter="**")
        if change is hook:
            early = list(kept)[: list(kept).index(name)]
            assert all(torch.equal(cache[key], kept[key]) for key in early)
    assert torch.equal(logits[hook], logits[out_of_place])


def test_what_a_caching_hook_kept_outlives_a_later_hook_at_its_point(plain: RecurrentDepth) -> None:
    name, tokens = "loops.1.blocks.0.hook_resid_pre", random_tokens()
    _, clean = plain.run_with_cache(tokens, names_filter=name)
    kept = plain.add_caching_hooks(name)
    plain.run_with_hooks(tokens, fwd_hooks=[(name, write_zeros)])
    assert torch.equal(kept[name], clean[name])


def test_an_unrolled_view_gives_copies_too(plain: RecurrentDepth) -> None:
    view = unrolled(plain, LOOPS)
    _, clean = view.run_with_cache(random_tokens())
    with view.hooks([("blocks.3.hook_resid_pre", write_zeros)]):
        _, cache = view.run_with_cache(random_tokens())
    assert torch.equal(cache["blocks.2.hook_resid_post"], clean["blocks.2.hook_resid_post"])
    assert cache["blocks.3.hook_resid_post"].ne(clean["blocks.3.hook_resid_post"]).any()


OTHERS = {
    "a row": lambda value, hook: value[:1],
    "a dtype": lambda value, hook: value.float(),
    "a number": lambda value, hook: 0.0,
    "a device": lambda value, hook: value.to("meta"),
    "an axis": lambda value, hook: value[None],
}


@pytest.mark.parametrize("returned", OTHERS.values(), ids=OTHERS)
def test_a_hook_that_returns_another_kind_of_value_is_refused(
    returned: Any, plain: RecurrentDepth
) -> None:
    for name in plain.hook_names(2):
        with pytest.raises(ValueError, match=rf"^a hook at '{name}' must return None or a tensor"):
            plain.run_with_hooks(random_tokens(), n_loops=2, fwd_hooks=[(name, returned)])
    assert hook_count(plain) == 0


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("huginn", "albert", "smollm") else pytest.mark.slow)
        for name in TOYS
    ],
)
def test_every_site_of_every_family_refuses_one_row_for_all(name: str) -> None:
    model: LoopedModel = TOYS[name].make()
    tokens = tokens_for(model)
    options, outside = TOYS[name].begin(tokens), set(model.hook_names(2))

    def refuses(site: str, run: Callable[[], object]) -> None:
        with (
            model.hooks([(site, OTHERS["a row"])], n_loops=2),
            pytest.raises(ValueError, match=rf"a hook at '{site}' must return"),
        ):
            run()

    state = model.begin(tokens, n_loops=2, **options)
    for visit in model.schedule(2):
        here = set(visit.hook_names())
        for site in here & outside:
            refuses(site, partial(model.advance, state, visit.index + 1))
        outside -= here
        state = model.advance(state, visit.index + 1)
    for site in outside:
        refuses(site, partial(model, tokens, n_loops=2, **options))


def test_a_nan_query_comes_out_the_same_with_an_idle_hook_on_the_pattern() -> None:
    for name in ("ouro", "smollm", "albert"):
        model = TOYS[name].make().float()
        tokens = tokens_for(model)
        visit = model.schedule(2)[-1].name
        for part, number in (("q", "nan"), ("q", "inf"), ("k", "-inf"), ("v", "nan")):

            def broken(value: Tensor, hook: object, number: str = number) -> Tensor:
                value[1, 2, 1, 3] = float(number)
                return value

            hooks = [(f"{visit}.attn.hook_{part}", broken)]
            idle = [*hooks, (f"{visit}.attn.hook_pattern", lambda value, hook: None)]
            names = f"{visit}.attn.hook_z"
            found = []
            for fwd in (hooks, idle):
                with model.hooks(fwd, n_loops=2):
                    found.append(model.run_with_cache(tokens, n_loops=2, names_filter=names)[1])
            assert torch.equal(*(cache[names].isfinite() for cache in found))
            assert not found[0][names].isfinite().all() or part == "k"
