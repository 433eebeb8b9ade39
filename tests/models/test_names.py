"""The names of a call's hook points, and the names, patterns, lists and predicates that choose
among them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loopscope.interp.attribution.gradients import gradients
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BLOCK_SITES, LOOPS, Calls, full, hook_count, nothing, random_tokens, toy

Resolver = Callable[[LoopedModel, object, int], list[str]]

# A call with n_loops = T has exactly the names with t < T.


def block(loop: int, layer: int) -> list[str]:
    return [f"loops.{loop}.blocks.{layer}.{site}" for site in BLOCK_SITES]


def test_names_of_a_call_without_positions_and_injection() -> None:
    first = ["loops.0.hook_state_in", *block(0, 0), *block(0, 1), "loops.0.hook_state_out"]
    second = ["loops.1.hook_state_in", *block(1, 0), *block(1, 1), "loops.1.hook_state_out"]
    edges = ["ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out"]
    assert toy().hook_names(2) == ["hook_embed", *first, *second, *edges]
    assert toy().hook_names(1) == ["hook_embed", *first, *edges]


def test_names_of_a_call_with_positions_and_injection() -> None:
    first = ["loops.0.hook_state_in", *block(0, 0), *block(0, 1), "loops.0.hook_state_out"]
    opening = ["loops.1.hook_state_in", "loops.1.hook_input", "loops.1.hook_injected"]
    second = [*opening, *block(1, 0), *block(1, 1), "loops.1.hook_state_out"]
    edges = ["ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out"]
    assert toy("learned", True).hook_names(2) == [
        "hook_embed",
        "hook_pos_embed",
        *first,
        *second,
        *edges,
    ]


def test_a_longer_call_before_does_not_add_names(model: RecurrentDepth) -> None:
    short = model.hook_names(2)
    model(random_tokens(), n_loops=6)
    assert model.hook_names(2) == short
    _, cache = model.run_with_cache(random_tokens(), n_loops=2, names_filter="**")
    assert list(cache) == short


def test_names_stand_in_the_order_in_which_points_are_called(model: RecurrentDepth) -> None:
    calls = Calls()
    model.run_with_hooks(random_tokens(), n_loops=LOOPS, fwd_hooks=[("**", calls)])
    assert calls.names == model.hook_names(LOOPS)


def test_number_of_iterations_defaults_to_what_is_recorded(plain: RecurrentDepth) -> None:
    assert plain.hook_names() == plain.hook_names(LOOPS)


# Filters and hooks take a name, a pattern, a list or a predicate, through one resolver.


def by_add_hook(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    model.add_hook(names, nothing, n_loops=n_loops)
    return [name for name in model.hook_names(n_loops) if model.hook_dict[name].fwd_hooks]


def by_hooks(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    calls = Calls()
    with model.hooks([(names, calls)], n_loops=n_loops):
        model(random_tokens(), n_loops=n_loops)
    return calls.names


def by_run_with_hooks(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    calls = Calls()
    model.run_with_hooks(random_tokens(), n_loops=n_loops, fwd_hooks=[(names, calls)])
    return calls.names


def by_run_with_cache(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    return list(model.run_with_cache(random_tokens(), n_loops=n_loops, names_filter=names)[1])


def by_add_caching_hooks(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    store = model.add_caching_hooks(names, n_loops=n_loops)
    model(random_tokens(), n_loops=n_loops)
    return list(store)


def by_get_caching_hooks(model: LoopedModel, names: object, n_loops: int) -> list[str]:
    store, forward, backward = model.get_caching_hooks(names, n_loops=n_loops)
    assert not store
    assert not backward
    return [name for name, _ in forward]


RESOLVERS: dict[str, Resolver] = {
    "add_hook": by_add_hook,
    "hooks": by_hooks,
    "run_with_hooks": by_run_with_hooks,
    "run_with_cache": by_run_with_cache,
    "add_caching_hooks": by_add_caching_hooks,
    "get_caching_hooks": by_get_caching_hooks,
}
FILTERS: dict[str, tuple[object, list[str]]] = {
    "name": ("loops.1.blocks.0.attn.hook_z", ["loops.1.blocks.0.attn.hook_z"]),
    "one star is one segment": (
        "loops.*.hook_state_in",
        ["loops.0.hook_state_in", "loops.1.hook_state_in"],
    ),
    "one star inside a segment": (
        "loops.1.hook_state_*",
        ["loops.1.hook_state_in", "loops.1.hook_state_out"],
    ),
    "one star in the middle": (
        "loops.0.blocks.1.ln*.hook_scale",
        ["loops.0.blocks.1.ln1.hook_scale", "loops.0.blocks.1.ln2.hook_scale"],
    ),
    "two stars are several segments": (
        "**.hook_z",
        [f"loops.{t}.blocks.{layer}.attn.hook_z" for t in range(2) for layer in range(2)],
    ),
    "two stars are no segment": ("**.hook_embed", ["hook_embed"]),
    "two stars in the middle": (
        "loops.0.**.hook_z",
        ["loops.0.blocks.0.attn.hook_z", "loops.0.blocks.1.attn.hook_z"],
    ),
    "list": (
        ["loops.1.hook_state_in", "hook_embed", "loops.0.hook_state_*"],
        ["hook_embed", "loops.0.hook_state_in", "loops.0.hook_state_out", "loops.1.hook_state_in"],
    ),
    "predicate": (
        lambda name: name.endswith("blocks.1.hook_mlp_out"),
        [f"loops.{t}.blocks.1.hook_mlp_out" for t in range(2)],
    ),
}


@pytest.mark.parametrize("method", RESOLVERS)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_method_takes_every_kind_of_filter(
    kind: str, method: str, plain: RecurrentDepth
) -> None:
    names, expected = FILTERS[kind]
    assert RESOLVERS[method](plain, names, 2) == expected


def test_everything(model: RecurrentDepth) -> None:
    for method in ("run_with_hooks", "run_with_cache", "get_caching_hooks"):
        assert RESOLVERS[method](model, "**", 2) == model.hook_names(2)


def test_a_dot_in_a_pattern_is_a_dot(plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match="matches no hook point"):
        plain.run_with_cache(random_tokens(), names_filter="loops.*.hook.state_in")
    with pytest.raises(KeyError, match="matches no hook point"):
        plain.run_with_cache(random_tokens(), names_filter="loops.*.hook_resid_post")


# A name that matches nothing in this call, or lacks its iteration, raises KeyError with the nearest
# names.

MISSING = {
    "no iteration": (
        "blocks.0.hook_resid_pre",
        r"loops\.0\.blocks\.0\.hook_resid_pre.*loops\.\*\.blocks\.0\.hook_resid_pre",
    ),
    "bare site": ("hook_resid_pre", r"nearest: loops\.0\.blocks\.0\.hook_resid_pre"),
    "misspelt": (
        "loops.1.blocks.0.hook_resid_prey",
        r"nearest: loops\.1\.blocks\.0\.hook_resid_pre",
    ),
    "pattern": (
        "loops.*.blocks.7.hook_resid_pre",
        "matches no hook point of a call with n_loops=2; nearest: loops",
    ),
    "later iteration": (
        "loops.2.blocks.0.hook_resid_pre",
        r"n_loops=2 the iterations are loops\.0 to loops\.1",
    ),
    "pattern in a later iteration": (
        "loops.2.**",
        r"n_loops=2 the iterations are loops\.0 to loops\.1",
    ),
    "one of a list": (
        ["hook_embed", "loops.1.blocks.0.hook_nowhere"],
        "'loops.1.blocks.0.hook_nowhere' matches no hook point",
    ),
    "predicate": (lambda name: "nowhere" in name, "the predicate matches none of the"),
}


@pytest.mark.parametrize("method", RESOLVERS)
@pytest.mark.parametrize("kind", MISSING)
def test_every_method_refuses_a_name_that_this_call_lacks(
    kind: str, method: str, plain: RecurrentDepth
) -> None:
    names, message = MISSING[kind]
    with pytest.raises(KeyError, match=message):
        RESOLVERS[method](plain, names, 2)
    assert hook_count(plain) == 0


def test_gradients_refuse_a_name_that_this_call_lacks(plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match=r"iterations are loops\.0 to loops\.1"):
        gradients(plain, full(), lambda logits: logits.sum(-1), "loops.2.hook_state_in", 2)


def test_an_empty_list_of_names_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match="list is empty"):
        plain.run_with_cache(random_tokens(), n_loops=2, names_filter=[])


# Points exist before filters are resolved.


@pytest.mark.parametrize(
    "method",
    [
        "hooks",
        "run_with_hooks",
        "run_with_cache",
        "add_caching_hooks",
        "get_caching_hooks",
        "add_hook",
    ],
)
def test_points_exist_before_filters_are_resolved(method: str) -> None:
    fresh = toy(n_loops=None)
    assert RESOLVERS[method](fresh, "loops.5.hook_state_*", 6) == [
        "loops.5.hook_state_in",
        "loops.5.hook_state_out",
    ]


def test_first_run_with_cache_after_growing_is_not_empty() -> None:
    fresh = toy(n_loops=2)
    _, cache = fresh.run_with_cache(
        random_tokens(), n_loops=5, names_filter="loops.4.blocks.*.hook_resid_post"
    )
    assert list(cache) == ["loops.4.blocks.0.hook_resid_post", "loops.4.blocks.1.hook_resid_post"]
    _, everything = toy(n_loops=2).run_with_cache(
        random_tokens(), n_loops=5, names_filter=lambda name: True
    )
    assert list(everything) == toy().hook_names(5)
