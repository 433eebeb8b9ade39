"""Identity 4: a hook that returns None changes nothing, and no hook stays behind or is lost,
whatever fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    LOOPS,
    SHORT,
    SWITCHING_SITES,
    assert_close,
    cached,
    explode,
    full,
    hook_count,
    nothing,
    padded,
    projection,
    run,
    run_hooked,
    toy,
)


def test_hook_that_returns_none_changes_nothing(model: RecurrentDepth) -> None:
    batch = padded()
    logits = run(model, batch, SHORT)
    for name in model.hook_names(SHORT):
        hooked = run_hooked(model, batch, name, nothing, SHORT)
        if name.endswith(SWITCHING_SITES):
            assert_close(hooked, logits)
        else:
            assert torch.equal(hooked, logits), name


BAD_IN_THE_MIDDLE = [
    ("loops.0.blocks.0.hook_resid_pre", nothing),
    ("loops.0.nowhere", nothing),
    ("hook_embed", nothing),
]


def failing_metric(logits: Tensor) -> Tensor:
    raise RuntimeError("a metric failed")


def names_that_fail(name: str) -> bool:
    raise RuntimeError("a predicate failed")


FAILURES: dict[str, tuple[type[Exception], str, Callable[[LoopedModel, Batch], object]]] = {
    "run_with_hooks, hook": (
        RuntimeError,
        "a hook failed",
        lambda m, b: run_hooked(m, b, "loops.1.blocks.0.hook_resid_mid", explode),
    ),
    "run_with_hooks, name": (
        KeyError,
        "nowhere",
        lambda m, b: m.run_with_hooks(b.tokens, fwd_hooks=BAD_IN_THE_MIDDLE),
    ),
    "run_with_hooks, predicate": (
        RuntimeError,
        "a predicate failed",
        lambda m, b: m.run_with_hooks(
            b.tokens, fwd_hooks=[("hook_embed", nothing), (names_that_fail, nothing)]
        ),
    ),
    "hooks, name": (KeyError, "nowhere", lambda m, b: m.hooks(BAD_IN_THE_MIDDLE).__enter__()),
    "run_with_cache, name": (
        KeyError,
        "nowhere",
        lambda m, b: m.run_with_cache(
            b.tokens, names_filter=["hook_embed", "loops.0.nowhere", "**.hook_z"]
        ),
    ),
    "run_with_cache, tokens": (
        ValueError,
        "d_vocab",
        lambda m, b: m.run_with_cache(b.tokens + 1000, names_filter="**"),
    ),
    "add_hook, name": (
        KeyError,
        "nowhere",
        lambda m, b: m.add_hook(["hook_embed", "loops.0.nowhere"], nothing),
    ),
    "logit_lens, tokens": (
        ValueError,
        "d_vocab",
        lambda m, b: logit_lens(m, replace(b, tokens=b.tokens + 1000)),
    ),
    "logit_lens, column": (
        ValueError,
        "the readout column must be within the 7 positions",
        lambda m, b: logit_lens(m, replace(b, readout=b.readout + 1000)),
    ),
    "readout_lens, tokens": (
        ValueError,
        "d_vocab",
        lambda m, b: readout_lens(m, replace(b, tokens=b.tokens + 1000)),
    ),
    "halting, tokens": (
        ValueError,
        "d_vocab",
        lambda m, b: halting(
            m, replace(b, tokens=b.tokens + 1000), HaltingRule(inject_input=False)
        ),
    ),
    "activation_patch, metric": (
        RuntimeError,
        "a metric failed",
        lambda m, b: activation_patch(m, b, b, failing_metric),
    ),
    "activation_patch, site": (
        KeyError,
        "nowhere",
        lambda m, b: activation_patch(m, b, b, projection(), sites=["z", "nowhere"]),
    ),
    "gradients, metric": (
        RuntimeError,
        "a metric failed",
        lambda m, b: gradients(m, b, failing_metric, "**"),
    ),
    "gradients, name": (
        KeyError,
        "nowhere",
        lambda m, b: gradients(m, b, projection(), ["hook_embed", "loops.0.nowhere", "**"]),
    ),
}


@pytest.mark.parametrize("injection", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_leaves_the_hook_count_as_it_was(failure: str, injection: bool) -> None:
    model, batch = toy(injection=injection), full()
    error, message, call = FAILURES[failure]
    model.add_hook("loops.1.blocks.1.hook_mlp_out", nothing)
    model.add_perma_hook("hook_embed", nothing)
    before, logits = hook_count(model), run(model, batch)
    with pytest.raises(error, match=message):
        call(model, batch)
    assert hook_count(model) == before > 0
    assert model.context_level == 0
    assert torch.equal(run(model, batch), logits)


METHODS: dict[str, Callable[[LoopedModel, Batch], object]] = {
    "run_with_hooks": lambda m, b: run_hooked(m, b, "**.hook_z", nothing),
    "run_with_cache": lambda m, b: cached(m, b),
    "logit_lens": lambda m, b: logit_lens(m, b, LOOPS),
    "readout_lens": lambda m, b: readout_lens(m, b, LOOPS),
    "halting": lambda m, b: halting(m, b, HaltingRule(), LOOPS),
    "halting without injection": lambda m, b: halting(m, b, HaltingRule(inject_input=False), LOOPS),
    "activation_patch": lambda m, b: activation_patch(
        m, b, b, projection(), LOOPS, sites=["z", "embed"]
    ),
    "gradients": lambda m, b: gradients(m, b, projection(), "**", LOOPS),
}


@pytest.mark.parametrize("calls_before_it_fails", [0, 1, 4])
@pytest.mark.parametrize("method", METHODS)
def test_failing_hook_of_the_users_leaves_the_hook_count_as_it_was(
    method: str, calls_before_it_fails: int
) -> None:
    model, batch = toy(injection=True), full()
    countdown = itertools.count(calls_before_it_fails, -1)

    def fail_later(value: Tensor, hook: object) -> None:
        if next(countdown) <= 0:
            raise RuntimeError("a hook failed")

    model.add_hook("loops.*.blocks.*.hook_mlp_out", fail_later, n_loops=LOOPS)
    before = hook_count(model)
    with pytest.raises(RuntimeError, match="a hook failed"):
        METHODS[method](model, batch)
    assert hook_count(model) == before > 0
    assert model.context_level == 0
    model.reset_hooks()
    assert hook_count(model) == 0
    assert run(model, batch).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_the_users_own_hooks_survive_and_act(method: str) -> None:
    model, batch = toy(injection=True), full()
    calls = []
    model.add_hook("loops.2.blocks.0.hook_resid_mid", lambda value, hook: calls.append(hook.name))
    before = hook_count(model)
    METHODS[method](model, batch)
    assert hook_count(model) == before > 0
    assert set(calls) == {"loops.2.blocks.0.hook_resid_mid"}
