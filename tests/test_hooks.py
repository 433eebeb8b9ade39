"""Names and hooks: one test for each sentence of the rules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from interp.gradients import gradients
from models.base import LoopedModel
from models.recurrent_depth import RecurrentDepth
from toy import BATCH, BLOCK_SITES, D_MODEL, LOOPS, POS, explode, full, hook_count, nothing, random_tokens, toy

LATE = "loops.3.blocks.1.hook_resid_post"
Resolver = Callable[[LoopedModel, object, int], list[str]]


class Calls:
    """A hook that keeps the names of the points that called it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, value: Tensor, hook: HookPoint) -> None:
        self.names.append(hook.name)


# A call with n_loops = T has exactly the names with t < T.


def block(loop: int, layer: int) -> list[str]:
    return [f"loops.{loop}.blocks.{layer}.{site}" for site in BLOCK_SITES]


def test_names_of_a_call_without_positions_and_injection() -> None:
    first = ["loops.0.hook_state_in", *block(0, 0), *block(0, 1), "loops.0.hook_state_out"]
    second = ["loops.1.hook_state_in", *block(1, 0), *block(1, 1), "loops.1.hook_state_out"]
    edges = ["ln_final.hook_scale", "ln_final.hook_normalized"]
    assert toy().hook_names(2) == ["hook_embed", *first, *second, *edges]
    assert toy().hook_names(1) == ["hook_embed", *first, *edges]


def test_names_of_a_call_with_positions_and_injection() -> None:
    first = ["loops.0.hook_state_in", *block(0, 0), *block(0, 1), "loops.0.hook_state_out"]
    opening = ["loops.1.hook_state_in", "loops.1.hook_input", "loops.1.hook_injected"]
    second = [*opening, *block(1, 0), *block(1, 1), "loops.1.hook_state_out"]
    edges = ["ln_final.hook_scale", "ln_final.hook_normalized"]
    assert toy("learned", True).hook_names(2) == ["hook_embed", "hook_pos_embed", *first, *second, *edges]


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
    "one star is one segment": ("loops.*.hook_state_in", ["loops.0.hook_state_in", "loops.1.hook_state_in"]),
    "one star inside a segment": ("loops.1.hook_state_*", ["loops.1.hook_state_in", "loops.1.hook_state_out"]),
    "one star in the middle": ("loops.0.blocks.1.ln*.hook_scale", ["loops.0.blocks.1.ln1.hook_scale", "loops.0.blocks.1.ln2.hook_scale"]),
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
    "predicate": (lambda name: name.endswith("blocks.1.hook_mlp_out"), [f"loops.{t}.blocks.1.hook_mlp_out" for t in range(2)]),
}


@pytest.mark.parametrize("method", RESOLVERS)
@pytest.mark.parametrize("kind", FILTERS)
def test_every_method_takes_every_kind_of_filter(kind: str, method: str, plain: RecurrentDepth) -> None:
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


# A name that matches nothing in this call, or lacks its iteration, raises KeyError with the nearest names.

MISSING = {
    "no iteration": ("blocks.0.hook_resid_pre", r"loops\.0\.blocks\.0\.hook_resid_pre.*loops\.\*\.blocks\.0\.hook_resid_pre"),
    "bare site": ("hook_resid_pre", r"nearest: loops\.0\.blocks\.0\.hook_resid_pre"),
    "misspelt": ("loops.1.blocks.0.hook_resid_prey", r"nearest: loops\.1\.blocks\.0\.hook_resid_pre"),
    "pattern": ("loops.*.blocks.7.hook_resid_pre", "matches no hook point of a call with n_loops=2; nearest: loops"),
    "later iteration": ("loops.2.blocks.0.hook_resid_pre", r"n_loops=2 the iterations are loops\.0 to loops\.1"),
    "pattern in a later iteration": ("loops.2.**", r"n_loops=2 the iterations are loops\.0 to loops\.1"),
    "one of a list": (["hook_embed", "loops.1.blocks.0.hook_nowhere"], "'loops.1.blocks.0.hook_nowhere' matches no hook point"),
    "predicate": (lambda name: "nowhere" in name, "the predicate matches none of the"),
}


@pytest.mark.parametrize("method", RESOLVERS)
@pytest.mark.parametrize("kind", MISSING)
def test_every_method_refuses_a_name_that_this_call_lacks(kind: str, method: str, plain: RecurrentDepth) -> None:
    names, message = MISSING[kind]
    with pytest.raises(KeyError, match=message):
        RESOLVERS[method](plain, names, 2)
    assert hook_count(plain) == 0


def test_gradients_refuse_a_name_that_this_call_lacks(plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match=r"iterations are loops\.0 to loops\.1"):
        gradients(plain, full(), lambda logits: logits.sum(-1), "loops.2.hook_state_in", 2)


# Nothing is ever silently the last iteration.


def test_each_iteration_calls_its_own_point(plain: RecurrentDepth) -> None:
    tokens, outputs = random_tokens(), []
    _, cache = plain.run_with_cache(tokens, n_loops=3)
    for loop in range(3):
        name = f"loops.{loop}.blocks.0.hook_resid_post"
        outputs.append(plain.run_with_hooks(tokens, n_loops=3, fwd_hooks=[(name, lambda value, hook: value * 1.5)]))
        _, hooked = plain.run_with_cache(tokens, n_loops=3)
        assert torch.equal(hooked[name], cache[name])
    assert all(not torch.allclose(outputs[a], outputs[b]) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_hook_at_one_iteration_leaves_the_earlier_ones_alone(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    _, before = plain.run_with_cache(tokens, n_loops=3, names_filter="**.hook_resid_post")
    with plain.hooks([("loops.1.blocks.1.hook_mlp_out", lambda value, hook: value * 1.5)], n_loops=3):
        _, after = plain.run_with_cache(tokens, n_loops=3, names_filter="**.hook_resid_post")
    same = {name: torch.equal(after[name], before[name]) for name in before}
    early = ["loops.0.blocks.0.hook_resid_post", "loops.0.blocks.1.hook_resid_post", "loops.1.blocks.0.hook_resid_post"]
    assert [name for name, equal in same.items() if equal] == early


# Points grow to the largest T, never shrink, take the model's mode, and exist before filters are resolved.


def test_points_grow_and_never_shrink(plain: RecurrentDepth) -> None:
    plain(random_tokens(), n_loops=6)
    points = dict(plain.hook_dict)
    assert "loops.5.hook_state_out" in points
    assert "loops.6.hook_state_out" not in points
    plain(random_tokens(), n_loops=2)
    plain.hook_names(1)
    assert plain.hook_dict == points


def test_points_are_reachable_as_attributes(plain: RecurrentDepth) -> None:
    plain.grow(2)
    point = plain.hook_dict["loops.1.blocks.0.attn.hook_q"]
    assert plain.loops[1].blocks[0].attn.hook_q is point
    assert point.name == "loops.1.blocks.0.attn.hook_q"


@pytest.mark.parametrize("training", [True, False])
def test_late_points_take_the_models_mode(training: bool, plain: RecurrentDepth) -> None:
    plain.train(training)
    plain.grow(7)
    assert {module.training for module in plain.modules()} == {training}
    plain.train(not training)
    assert {module.training for module in plain.modules()} == {not training}


@pytest.mark.parametrize("method", ["hooks", "run_with_hooks", "run_with_cache", "add_caching_hooks", "get_caching_hooks", "add_hook"])
def test_points_exist_before_filters_are_resolved(method: str) -> None:
    fresh = toy(n_loops=None)
    assert RESOLVERS[method](fresh, "loops.5.hook_state_*", 6) == ["loops.5.hook_state_in", "loops.5.hook_state_out"]


def test_first_run_with_cache_after_growing_is_not_empty() -> None:
    fresh = toy(n_loops=2)
    _, cache = fresh.run_with_cache(random_tokens(), n_loops=5, names_filter="loops.4.blocks.*.hook_resid_post")
    assert list(cache) == ["loops.4.blocks.0.hook_resid_post", "loops.4.blocks.1.hook_resid_post"]
    _, everything = toy(n_loops=2).run_with_cache(random_tokens(), n_loops=5, names_filter=lambda name: True)
    assert list(everything) == toy().hook_names(5)


# A forward with a hook at t >= T raises.


def test_forward_with_a_hook_beyond_its_iterations_raises(plain: RecurrentDepth) -> None:
    plain.add_hook(LATE, nothing)
    with pytest.raises(ValueError, match=r"hook is attached at 'loops\.3\.blocks\.1\.hook_resid_post'.*n_loops=2.*0 to 1"):
        plain(random_tokens(), n_loops=2)
    assert plain(random_tokens(), n_loops=4).isfinite().all()
    plain.reset_hooks()
    assert plain(random_tokens(), n_loops=2).isfinite().all()


@pytest.mark.parametrize("attach", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_pytorchs_own_hook_beyond_a_calls_iterations_raises_too(attach: str, plain: RecurrentDepth) -> None:
    handle = getattr(plain.hook_dict[LATE], attach)(lambda *arguments: None)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain(random_tokens(), n_loops=2)
    handle.remove()
    assert plain(random_tokens(), n_loops=2).isfinite().all()


def test_exact_name_in_a_context_for_unknown_iterations_raises_in_the_shorter_call(plain: RecurrentDepth) -> None:
    with plain.hooks([(LATE, explode)]), pytest.raises(ValueError, match="hook is attached at"):
        plain(random_tokens(), n_loops=3)
    assert hook_count(plain) == 0


def test_resumed_run_with_a_hook_beyond_its_iterations_raises(plain: RecurrentDepth) -> None:
    state = plain.begin(random_tokens(), n_loops=2)
    plain.add_hook(LATE, nothing)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain.advance(state)
    with pytest.raises(ValueError, match="hook is attached at"):
        plain.begin(random_tokens(), n_loops=2)


def test_run_with_hooks_at_an_iteration_that_the_call_lacks_is_a_key_error(plain: RecurrentDepth) -> None:
    plain.grow(4)
    with pytest.raises(KeyError, match=r"n_loops=2 the iterations are loops\.0 to loops\.1"):
        plain.run_with_hooks(random_tokens(), n_loops=2, fwd_hooks=[(LATE, nothing)])


@pytest.mark.parametrize("n_loops", [2, 4])
@pytest.mark.parametrize("names", ["loops.*.hook_state_in", lambda name: name.endswith("hook_z"), ["hook_embed", "**.hook_z"]])
def test_hooks_by_pattern_refuse_a_call_of_another_length(names: object, n_loops: int, plain: RecurrentDepth) -> None:
    plain.add_hook(names, nothing, n_loops=3)
    with pytest.raises(ValueError, match=r"hook is attached at|given by a pattern were attached for n_loops=3.*n_loops=4"):
        plain(random_tokens(), n_loops=n_loops)
    assert plain(random_tokens(), n_loops=3).isfinite().all()
    plain.reset_hooks()
    assert plain(random_tokens(), n_loops=n_loops).isfinite().all()


def test_context_by_pattern_refuses_a_call_of_another_length(plain: RecurrentDepth) -> None:
    with plain.hooks([("**.hook_z", nothing)], n_loops=2), pytest.raises(ValueError, match=r"attached for n_loops=2.*n_loops=3"):
        plain(random_tokens(), n_loops=3)
    assert plain(random_tokens(), n_loops=3).isfinite().all()


def test_caching_hooks_by_default_filter_refuse_a_call_of_another_length(plain: RecurrentDepth) -> None:
    plain.add_caching_hooks(n_loops=2)
    with pytest.raises(ValueError, match=r"attached for n_loops=2.*n_loops=3"):
        plain(random_tokens(), n_loops=3)


def test_pattern_without_a_known_number_of_iterations_is_refused() -> None:
    model = toy(n_loops=None)
    with pytest.raises(ValueError, match="records no number of iterations"):
        model.add_hook("**.hook_z", nothing)
    model.add_hook("loops.2.blocks.0.attn.hook_z", nothing)
    assert hook_count(model) > 0


# pos_slice cuts the position axis of every site.


def manual_slice(name: str, value: Tensor, window: slice) -> Tensor:
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        return value[:, :, window]
    return value[:, window]


@pytest.mark.parametrize("window", [slice(2, 5), slice(-3, None), slice(None, None, 2), slice(4, 5)])
def test_pos_slice_cuts_the_position_axis_of_every_site(window: slice, model: RecurrentDepth) -> None:
    """Python's own slice is taken, as TransformerLens's Slice takes it."""
    tokens = random_tokens()
    _, whole = model.run_with_cache(tokens, n_loops=2, names_filter="**")
    logits, cut = model.run_with_cache(tokens, n_loops=2, names_filter="**", pos_slice=window)
    assert list(cut) == model.hook_names(2)
    assert logits.shape == (BATCH, POS, model.cfg.d_vocab)
    for name, value in whole.items():
        assert torch.equal(cut[name], manual_slice(name, value, window)), name


@pytest.mark.parametrize(("form", "window"), [(3, slice(3, 4)), (-1, slice(-1, None)), ((2, 5), slice(2, 5)), ([1, 4], slice(1, 5, 3))])
def test_pos_slice_takes_transformer_lens_forms_at_every_site(form: object, window: slice, plain: RecurrentDepth) -> None:
    """One position keeps an axis of one, as TransformerLens's own run_with_cache does."""
    tokens = random_tokens()
    _, whole = plain.run_with_cache(tokens, n_loops=2, names_filter="**")
    _, cut = plain.run_with_cache(tokens, n_loops=2, names_filter="**", pos_slice=form)
    for name, value in whole.items():
        assert torch.equal(cut[name], manual_slice(name, value, window)), name


# hook.loop() and hook.layer(), idle points, other ways of attaching, backward hooks


def test_hook_points_know_their_iteration_and_layer(model: RecurrentDepth) -> None:
    for name in model.hook_names(LOOPS):
        point, parts = model.hook_dict[name], name.split(".")
        assert point.loop() == (int(parts[1]) if parts[0] == "loops" else None)
        if "blocks" in parts:
            assert point.layer() == int(parts[3])
        else:
            with pytest.raises(ValueError, match="is in no block, so it has no layer"):
                point.layer()


def test_hooks_can_ask_for_their_iteration(plain: RecurrentDepth) -> None:
    seen = []
    plain.run_with_hooks(
        random_tokens(), n_loops=2, fwd_hooks=[("**.hook_mlp_out", lambda v, hook: seen.append((hook.loop(), hook.layer())))]
    )
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_idle_points_are_not_called(model: RecurrentDepth, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = HookPoint.forward

    def counted(self: HookPoint, value: Tensor) -> Tensor:
        calls.append(self.name)
        return forward(self, value)

    monkeypatch.setattr(HookPoint, "forward", counted)
    model(random_tokens(), n_loops=LOOPS)
    assert calls == []
    names = ["hook_embed", "loops.2.hook_state_out", "loops.2.blocks.1.attn.hook_k"]
    model.run_with_hooks(random_tokens(), n_loops=LOOPS, fwd_hooks=[(names, nothing)])
    assert sorted(calls) == sorted(names)


def test_only_a_visit_that_is_asked_for_its_pattern_leaves_the_fused_kernel(plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    plain.run_with_hooks(random_tokens(), n_loops=3, fwd_hooks=[("**.hook_z", nothing)])
    assert len(calls) == 6
    plain.run_with_hooks(random_tokens(), n_loops=3, fwd_hooks=[("loops.1.blocks.0.attn.hook_pattern", nothing)])
    assert len(calls) == 6 + 5


def test_pytorchs_own_hook_on_a_point_fires(model: RecurrentDepth) -> None:
    tokens, seen = random_tokens(), []
    logits = model(tokens, n_loops=LOOPS)
    name = "loops.1.blocks.0.hook_mlp_out"
    handle = model.hook_dict[name].register_forward_hook(lambda module, inputs, output: seen.append(module.name) or output * 1.5)
    changed = model(tokens, n_loops=LOOPS)
    handle.remove()
    assert seen == [name]
    assert torch.equal(changed, model.run_with_hooks(tokens, n_loops=LOOPS, fwd_hooks=[(name, lambda value, hook: value * 1.5)]))
    assert torch.equal(model(tokens, n_loops=LOOPS), logits)


def test_prepended_hook_comes_first(plain: RecurrentDepth) -> None:
    order = []
    plain.add_hook("hook_embed", lambda value, hook: order.append("second"))
    plain.add_hook("hook_embed", lambda value, hook: order.append("first"), prepend=True)
    plain(random_tokens())
    assert order == ["first", "second"]


@pytest.mark.parametrize("method", ["run_with_cache", "add_caching_hooks", "get_caching_hooks"])
def test_caching_gradients_is_refused_with_the_way_to_get_them(method: str, plain: RecurrentDepth) -> None:
    arguments = (random_tokens(),) if method == "run_with_cache" else ()
    with pytest.raises(ValueError, match=r"incl_bwd is not supported.*loopscope\.gradients"):
        getattr(plain, method)(*arguments, incl_bwd=True)
    assert hook_count(plain) == 0


def test_backward_hooks_that_would_be_removed_too_early_are_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"backward hooks would be removed.*loopscope\.gradients"):
        plain.run_with_hooks(random_tokens(), bwd_hooks=[(LATE, nothing)])
    assert hook_count(plain) == 0


def test_backward_hooks_in_a_context_see_the_gradient_of_their_iteration(plain: RecurrentDepth) -> None:
    batch, seen = full(), {}
    names = "loops.*.blocks.1.hook_resid_post"
    with plain.hooks(bwd_hooks=[(names, lambda grad, hook: seen.update({hook.name: grad.clone()}))], n_loops=3):
        plain(batch.tokens, n_loops=3)[:, -1].sum().backward()
    _, expected = gradients(plain, batch, lambda logits: logits.sum(-1), names, 3)
    assert hook_count(plain) == 0
    assert set(seen) == set(expected)
    for name, grad in seen.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)


def test_backward_hooks_may_stay_for_the_backward_pass(plain: RecurrentDepth) -> None:
    seen = []
    logits = plain.run_with_hooks(random_tokens(), bwd_hooks=[(LATE, lambda grad, hook: seen.append(grad.shape))], reset_hooks_end=False)
    logits.sum().backward()
    plain.reset_hooks()
    assert seen == [(BATCH, POS, D_MODEL)]
    assert hook_count(plain) == 0


# How long hooks live


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
    store, forward, _ = plain.get_caching_hooks("**.hook_z", n_loops=2, pos_slice=slice(1, 3), device="cpu")
    plain(random_tokens(), n_loops=2)
    assert store == {}
    plain.run_with_hooks(random_tokens(), n_loops=2, fwd_hooks=forward)
    assert {value.shape[1] for value in store.values()} == {2}
    assert len(store) == 4


def test_an_empty_list_of_names_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(KeyError, match="list is empty"):
        plain.run_with_cache(random_tokens(), n_loops=2, names_filter=[])
