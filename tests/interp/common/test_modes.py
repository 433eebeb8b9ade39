"""Methods run in evaluation mode, with gradients where they need them, whatever the caller's modes
are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.circuits.edge_attribution import edge_attribution
from loopscope.interp.common import modes
from loopscope.interp.common.modes import evaluating
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.injection import swap_input
from loopscope.interp.edit.steering import steering_vector
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.interp.patching.tracing import causal_tracing, denoising_map, noising_map
from loopscope.models.core.base import LoopedModel
from toy import padded, projection, toy

METRIC, ANSWERS, READ = projection(), [3, 5, 7], Receiver("readout")


def ablated(model: LoopedModel) -> Tensor:
    """The answers without MLPs, whose means are taken where the caller's mode holds."""
    ablation = ablate(model, Component("mlp"), how="mean", reference=padded(3), n_loops=2)
    with ablation, evaluating(model):
        return model(padded(1).tokens, n_loops=2, mask=padded(1).mask)


METHODS: dict[str, Callable[[LoopedModel], Any]] = {
    "activation_patch": lambda m: activation_patch(m, padded(1), padded(2), METRIC, 2).values,
    "attribution_patch": lambda m: attribution_patch(m, padded(1), padded(2), METRIC, 2).values,
    "steps": lambda m: attribution_patch(m, padded(1), padded(2), METRIC, 2, steps=2).values,
    "gradients": lambda m: gradients(m, padded(1), METRIC, "hook_embed", 2)[1]["hook_embed"],
    "causal_tracing": lambda m: causal_tracing(m, padded(1), padded(2), ANSWERS, 1, 2).effect,
    "denoising_map": lambda m: denoising_map(m, padded(1), padded(2), ANSWERS, [1], 2).effect,
    "noising_map": lambda m: noising_map(m, padded(1), padded(2), ANSWERS, [1], 2).effect,
    "path_patch": lambda m: (
        path_patch(m, padded(1), padded(2), METRIC, Sender("mlp", 0, 0), READ, 2).values
    ),
    "path_patch_sweep": lambda m: torch.tensor(
        path_patch_sweep(m, padded(1), padded(2), METRIC, READ, 2)["value"].to_numpy()
    ),
    "steering_vector": lambda m: steering_vector(m, padded(1), padded(2), "resid_post", 1, 0, 2),
    "ablate": lambda m: ablated(m),
}
ADDITIVE: dict[str, Callable[[LoopedModel], Any]] = {
    "direct_logit_attribution": lambda m: (
        direct_logit_attribution(m, padded(1), ANSWERS, n_loops=2).values
    ),
    "edge_attribution": lambda m: edge_attribution(m, padded(1), padded(2), METRIC, 2).values,
}


def dropping() -> LoopedModel:
    """A model that drops most of every residual stream while it is trained."""
    model = toy()
    for block in model.blocks:
        block.register_forward_hook(
            lambda module, args, out: nn.functional.dropout(out, 0.6, training=module.training)
        )
    return model


@pytest.mark.parametrize("method", [*METHODS, *ADDITIVE])
def test_methods_run_in_evaluation_mode_and_put_the_mode_back(method: str) -> None:
    model, call = dropping(), (METHODS | ADDITIVE)[method]
    expected = call(model.eval())
    model.train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.testing.assert_close(call(model), expected)
    after = {name: module.training for name, module in model.named_modules()}
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after.keys() - before.keys())


def test_the_mode_comes_back_after_an_error() -> None:
    model = dropping().train()

    def broken(logits: Tensor) -> Tensor:
        raise RuntimeError("the metric failed")

    with pytest.raises(RuntimeError, match="the metric failed"):
        activation_patch(model, padded(1), padded(2), broken, 2)
    assert model.training
    assert all(block.training for block in model.blocks)


@pytest.mark.parametrize("method", [*METHODS, *ADDITIVE])
def test_methods_run_inside_inference_mode(method: str) -> None:
    model, call = toy(), (METHODS | ADDITIVE)[method]
    expected = call(model)
    with torch.inference_mode():
        found = call(model)
    torch.testing.assert_close(found.clone(), expected)


def test_inputs_made_inside_inference_mode_have_gradients(plain: LoopedModel) -> None:
    expected = METHODS["attribution_patch"](plain)
    with torch.inference_mode():
        clean, corrupted = padded(1), padded(2)
    torch.testing.assert_close(
        attribution_patch(plain, clean, corrupted, METRIC, 2).values, expected
    )


def test_a_model_made_inside_inference_mode_has_no_gradients() -> None:
    with torch.inference_mode():
        model = toy()
    with pytest.raises(ValueError, match="attribution_patch needs gradients, but this model was"):
        attribution_patch(model, padded(1), padded(2), METRIC, 2)


def test_the_injected_input_of_another_question_is_taken_in_evaluation_mode() -> None:
    model = toy(injection=True).train()
    seen: list[bool] = []
    model.blocks[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    with swap_input(model, padded(2), n_loops=2):
        assert set(seen) == {False}
    assert model.blocks[0].training


class WatchedTurn:
    """The turn of a model, which tells when a thread must wait for it."""

    def __init__(self) -> None:
        self.lock, self.awaited = threading.RLock(), threading.Event()

    def acquire(self, timeout: float = -1) -> bool:
        if self.lock.acquire(blocking=False):
            return True
        self.awaited.set()
        return self.lock.acquire(timeout=timeout)

    def release(self) -> None:
        self.lock.release()


def test_methods_of_one_model_take_turns_in_threads(
    plain: LoopedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread waits in the middle of its run; the second one must not run meanwhile."""
    turn, entered, go = WatchedTurn(), threading.Event(), threading.Event()
    monkeypatch.setitem(modes._TURNS, plain, turn)
    found, reached = {}, []

    def lens(number: int) -> None:
        found[number] = logit_lens(plain, padded(number), 2).prob(ANSWERS)

    def wait(value: Tensor, hook: object) -> None:
        reached.append(threading.current_thread())
        if reached == threads[:1]:
            entered.set()
            go.wait(20)

    threads = [threading.Thread(target=lens, args=(number,), daemon=True) for number in range(2)]
    with plain.hooks([("loops.1.blocks.0.hook_resid_pre", wait)], n_loops=2):
        threads[0].start()
        assert entered.wait(20)
        threads[1].start()
        assert turn.awaited.wait(20)
        assert threads[1].is_alive()
        assert reached == threads[:1]
        go.set()
        for thread in threads:
            thread.join(20)
    assert list(dict.fromkeys(reached)) == threads
    assert set(found) == {0, 1}
    for number, answers in found.items():
        assert torch.equal(answers, logit_lens(plain, padded(number), 2).prob(ANSWERS))


def test_a_method_inside_a_method_of_the_same_thread_has_the_turn(plain: LoopedModel) -> None:
    found: list[Tensor] = []

    def asking(logits: Tensor) -> Tensor:
        found.append(logit_lens(plain, padded(0), 2).prob(ANSWERS))
        return METRIC(logits)

    def patch() -> None:
        activation_patch(plain, padded(1), padded(2), asking, 1, positions=[2])

    thread = threading.Thread(target=patch, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert torch.equal(found[0], logit_lens(plain, padded(0), 2).prob(ANSWERS))


def test_a_thread_that_waits_for_long_says_why(
    plain: LoopedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warning is an error here, so that the thread for which the metric waits ends."""
    monkeypatch.setattr(modes, "PATIENCE", 0.01)

    def asking(logits: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(logit_lens, plain, padded(0), 2).result(20)
        return METRIC(logits)

    with pytest.raises(UserWarning, match=r"waited 0.01 s for its turn, .* waits for this thread"):
        activation_patch(plain, padded(1), padded(2), asking, 1, positions=[2])
    assert torch.isfinite(logit_lens(plain, padded(0), 2).prob(ANSWERS)).all()
