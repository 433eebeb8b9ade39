"""Each iteration has its own hook points, which grow with the calls and cost nothing while idle."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from loopscope.models.core.hooks import LoopHookPoint, existing_modules
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import LOOPS, Calls, nothing, random_tokens, toy

# Nothing is ever silently the last iteration.


def test_each_iteration_calls_its_own_point(plain: RecurrentDepth) -> None:
    tokens, outputs = random_tokens(), []
    _, cache = plain.run_with_cache(tokens, n_loops=3)
    for loop in range(3):
        name = f"loops.{loop}.blocks.0.hook_resid_post"
        outputs.append(
            plain.run_with_hooks(
                tokens, n_loops=3, fwd_hooks=[(name, lambda value, hook: value * 1.5)]
            )
        )
        _, hooked = plain.run_with_cache(tokens, n_loops=3)
        assert torch.equal(hooked[name], cache[name])
    assert all(not torch.allclose(outputs[a], outputs[b]) for a, b in ((0, 1), (1, 2), (0, 2)))


def test_hook_at_one_iteration_leaves_the_earlier_ones_alone(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    _, before = plain.run_with_cache(tokens, n_loops=3, names_filter="**.hook_resid_post")
    with plain.hooks(
        [("loops.1.blocks.1.hook_mlp_out", lambda value, hook: value * 1.5)], n_loops=3
    ):
        _, after = plain.run_with_cache(tokens, n_loops=3, names_filter="**.hook_resid_post")
    same = {name: torch.equal(after[name], before[name]) for name in before}
    early = [
        "loops.0.blocks.0.hook_resid_post",
        "loops.0.blocks.1.hook_resid_post",
        "loops.1.blocks.0.hook_resid_post",
    ]
    assert [name for name, equal in same.items() if equal] == early


# Points grow to the largest T, never shrink, and take the model's mode.


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
    point = plain.loops[1].blocks[0].attn.hook_q
    assert point.name == "loops.1.blocks.0.attn.hook_q"
    assert plain.hook_dict[point.name] is plain.mod_dict[point.name] is point
    assert point in set(plain.hook_points())


NAME = "loops.1.blocks.0.attn.hook_q"
LOOKS = {
    "hook_dict": lambda model: model.hook_dict[NAME],
    "mod_dict": lambda model: model.mod_dict[NAME],
    "an attribute": lambda model: model.loops[1].blocks[0].attn.hook_q,
    "a walk": lambda model: dict(model.named_modules())[NAME],
    "a walk by another module": lambda model: dict(nn.Sequential(model).named_modules())[
        f"0.{NAME}"
    ],
    "get_submodule": lambda model: model.get_submodule(NAME),
    "modules": lambda model: next(m for m in model.modules() if getattr(m, "name", "") == NAME),
}


@pytest.mark.parametrize("look", LOOKS)
def test_points_are_there_however_one_looks_for_them(look: str, plain: RecurrentDepth) -> None:
    calls = Calls()
    handle = plain.hook_point(plain.resolve_names(NAME, 2)[0]).add_hook(nothing)
    LOOKS[look](plain).add_hook(calls)
    plain(random_tokens(), n_loops=2)
    assert calls.names == [NAME]
    handle.hook.remove()


def test_runs_and_weights_make_no_points(plain: RecurrentDepth) -> None:
    plain(random_tokens(), n_loops=4)
    assert len(list(plain.parameters())) == len(plain.state_dict())
    plain.train().eval()
    model = copy.deepcopy(plain)
    assert [m for m in existing_modules(model.loops) if isinstance(m, HookPoint)] == []
    assert len(model.hook_dict) == len(model.hook_names(4))
    assert model.loops[3].hook_state_out is not plain.loops[3].hook_state_out


@pytest.mark.parametrize("training", [True, False])
def test_late_points_take_the_models_mode(training: bool, plain: RecurrentDepth) -> None:
    plain.train(training)
    plain.grow(7)
    assert {module.training for module in plain.modules()} == {training}
    plain.train(not training)
    assert {module.training for module in plain.modules()} == {not training}


# hook.loop() and hook.layer(), idle points, PyTorch's own hooks


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
        random_tokens(),
        n_loops=2,
        fwd_hooks=[("**.hook_mlp_out", lambda v, hook: seen.append((hook.loop(), hook.layer())))],
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


def test_only_a_visit_that_is_asked_for_its_pattern_leaves_the_fused_kernel(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = torch.nn.functional.scaled_dot_product_attention
    calls = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: calls.append(1) or fused(*a, **k),
    )
    plain.run_with_hooks(random_tokens(), n_loops=3, fwd_hooks=[("**.hook_z", nothing)])
    assert len(calls) == 6
    plain.run_with_hooks(
        random_tokens(), n_loops=3, fwd_hooks=[("loops.1.blocks.0.attn.hook_pattern", nothing)]
    )
    assert len(calls) == 6 + 5


def test_pytorchs_own_hook_on_a_point_fires(model: RecurrentDepth) -> None:
    tokens, seen = random_tokens(), []
    logits = model(tokens, n_loops=LOOPS)
    name = "loops.1.blocks.0.hook_mlp_out"
    handle = model.hook_dict[name].register_forward_hook(
        lambda module, inputs, output: seen.append(module.name) or output * 1.5
    )
    changed = model(tokens, n_loops=LOOPS)
    handle.remove()
    assert seen == [name]
    assert torch.equal(
        changed,
        model.run_with_hooks(
            tokens, n_loops=LOOPS, fwd_hooks=[(name, lambda value, hook: value * 1.5)]
        ),
    )
    assert torch.equal(model(tokens, n_loops=LOOPS), logits)


def test_a_point_is_as_its_constructors_make_it(plain: RecurrentDepth) -> None:
    made, other = plain.hook_embed, plain.loops[1].blocks[0].hook_resid_pre
    fresh = vars(LoopHookPoint())
    assert vars(made).keys() == vars(other).keys() == fresh.keys()
    for attribute, value in fresh.items():
        assert type(getattr(made, attribute)) is type(value) or attribute in ("name", "watch")
        if isinstance(value, dict | list | set):
            assert getattr(made, attribute) == value
            assert getattr(made, attribute) is not getattr(other, attribute)


def test_points_are_one_for_all_threads_that_ask() -> None:
    model, names = toy(), toy().hook_names(4)
    model.grow(4)
    with ThreadPoolExecutor(6) as pool:
        walks = [pool.submit(lambda: list(model.parameters())) for _ in range(20)]
        asked = [pool.submit(model.hook_point, name) for name in names for _ in range(3)]
        points = [each.result() for each in asked]
        assert all(len(each.result()) == len(list(model.parameters())) for each in walks)
    assert all(point is model.hook_dict[str(point.name)] for point in points)
    assert "hook_state_out" in repr(model.loops)
