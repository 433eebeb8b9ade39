"""Gradients of shared weights from one product are those that autograd adds up."""

from __future__ import annotations

import pytest
import torch

from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.training.shared_gradients import SharedGradients
from toy import BATCH, LOOPS, padded, projection


def gradients(model: RecurrentDepth, shared: SharedGradients | None) -> list[torch.Tensor]:
    batch = padded()
    if shared is None:
        logits = model(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    else:
        with shared:
            logits = model(batch.tokens, n_loops=LOOPS, mask=batch.mask)
    return list(
        torch.autograd.grad(
            projection()(logits[torch.arange(BATCH), batch.readout]).sum(), list(model.parameters())
        )
    )


def test_gradients_equal_those_of_autograd(model: RecurrentDepth) -> None:
    shared = SharedGradients()
    ours, theirs = gradients(model, shared), gradients(model, None)
    shared.check()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            a,
            b,
            rtol=1e-9 if a.dtype == torch.float64 else 1e-3,
            atol=1e-9 if a.dtype == torch.float64 else 1e-3,
        )


def test_each_weight_is_multiplied_once(plain: RecurrentDepth) -> None:
    made: list[tuple[int, ...]] = []
    for block in plain.blocks:
        block.mlp.W_in.register_hook(lambda grad: made.append(tuple(grad.shape)))
    with SharedGradients():
        total = plain(padded().tokens, n_loops=LOOPS).sum()
    rows: list[int] = []
    original = torch.cat
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            torch,
            "cat",
            lambda tensors, *rest, **more: (
                rows.append(len(tensors)) or original(tensors, *rest, **more)
            ),
        )
        total.backward()
    assert made == [tuple(plain.blocks[0].mlp.W_in.shape)] * len(plain.blocks)
    assert set(rows) == {LOOPS}


def test_a_product_that_the_loss_does_not_depend_on_is_noticed(plain: RecurrentDepth) -> None:
    shared = SharedGradients()
    with shared:
        early = plain.advance(plain.begin(padded().tokens, n_loops=LOOPS), "loops.2")
        plain.advance(early)
    early.resid.sum().backward()
    with pytest.raises(
        RuntimeError, match="not on the way to the loss, so a weight's gradient is incomplete"
    ):
        shared.check()


def test_nothing_is_intercepted_without_gradients(plain: RecurrentDepth) -> None:
    tokens = padded().tokens
    with torch.no_grad(), SharedGradients():
        inside = plain(tokens, n_loops=2)
    with torch.no_grad():
        assert torch.equal(inside, plain(tokens, n_loops=2))
