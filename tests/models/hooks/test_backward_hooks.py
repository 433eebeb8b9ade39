"""Backward hooks see the gradients of their iteration, or are refused with the way to get them."""

from __future__ import annotations

import pytest
import torch

from loopscope.interp.attribution.gradients import gradients
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, D_MODEL, LATE, POS, full, hook_count, nothing, random_tokens


@pytest.mark.parametrize("method", ["run_with_cache", "add_caching_hooks", "get_caching_hooks"])
def test_caching_gradients_is_refused_with_the_way_to_get_them(
    method: str, plain: RecurrentDepth
) -> None:
    arguments = (random_tokens(),) if method == "run_with_cache" else ()
    with pytest.raises(ValueError, match=r"incl_bwd is not supported.*loopscope\.gradients"):
        getattr(plain, method)(*arguments, incl_bwd=True)
    assert hook_count(plain) == 0


def test_backward_hooks_that_would_be_removed_too_early_are_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"backward hooks would be removed.*loopscope\.gradients"):
        plain.run_with_hooks(random_tokens(), bwd_hooks=[(LATE, nothing)])
    assert hook_count(plain) == 0


def test_backward_hooks_in_a_context_see_the_gradient_of_their_iteration(
    plain: RecurrentDepth,
) -> None:
    batch, seen = full(), {}
    names = "loops.*.blocks.1.hook_resid_post"
    with plain.hooks(
        bwd_hooks=[(names, lambda grad, hook: seen.update({hook.name: grad.clone()}))], n_loops=3
    ):
        plain(batch.tokens, n_loops=3)[:, -1].sum().backward()
    _, expected = gradients(plain, batch, lambda logits: logits.sum(-1), names, 3)
    assert hook_count(plain) == 0
    assert set(seen) == set(expected)
    for name, grad in seen.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-9)


def test_backward_hooks_may_stay_for_the_backward_pass(plain: RecurrentDepth) -> None:
    seen = []
    logits = plain.run_with_hooks(
        random_tokens(),
        bwd_hooks=[(LATE, lambda grad, hook: seen.append(grad.shape))],
        reset_hooks_end=False,
    )
    logits.sum().backward()
    plain.reset_hooks()
    assert seen == [(BATCH, POS, D_MODEL)]
    assert hook_count(plain) == 0
