"""Identity 6: a lens on the residual stream is the model's own answer; and what that stream is a
sum of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import LAYERS, LOOPS, assert_close, cached, full, is_close, padded, run


def at_readout(logits: Tensor, batch: Batch) -> Tensor:
    return logits[torch.arange(len(batch)), batch.readout]


def test_last_visit_of_the_logit_lens_is_the_models_answer(model: RecurrentDepth) -> None:
    batch = padded()
    lens = logit_lens(model, batch, LOOPS, keep_logits=True)
    assert lens.names[-1] == model.schedule(LOOPS)[-1].name
    assert_close(lens.logits[-1], at_readout(run(model, batch), batch))


def test_logit_lens_is_norm_and_head_of_every_residual(model: RecurrentDepth) -> None:
    batch = padded()
    lens = logit_lens(model, batch, LOOPS, keep_logits=True)
    cache = cached(model, batch)
    for visit, (loop, layer) in enumerate(itertools.product(range(LOOPS), range(LAYERS))):
        resid = at_readout(cache[f"loops.{loop}.blocks.{layer}.hook_resid_post"], batch)
        normed = torch.nn.functional.layer_norm(
            resid, resid.shape[-1:], model.final_norm.w, model.final_norm.b, model.cfg.eps
        )
        assert_close(lens.logits[visit], normed @ model.W_U + model.b_U)


def prefixes_agree(model: LoopedModel, batch: Batch) -> list[bool]:
    lens = readout_lens(model, batch, LOOPS, keep_logits=True)
    return [
        is_close(lens.logits[t], at_readout(run(model, batch, t + 1), batch)) for t in range(LOOPS)
    ]


def test_readout_lens_is_a_call_of_that_length_where_declared(model: RecurrentDepth) -> None:
    assert model.prefix_readout
    assert prefixes_agree(model, padded()) == [True] * LOOPS


def test_prefix_readout_is_declared_as_it_is(odd_model: LoopedModel) -> None:
    batch = full()
    state = odd_model.begin(batch.tokens, batch.mask, n_loops=LOOPS)
    for t in range(LOOPS - 1):
        state = odd_model.advance(state, f"loops.{t + 1}")
        assert (
            is_close(odd_model.readout(state), run(odd_model, batch, t + 1))
            == odd_model.prefix_readout
        )


@pytest.mark.parametrize("make_batch", [full, padded])
def test_residual_is_the_sum_of_components_exactly_where_declared(
    model: RecurrentDepth, make_batch: Callable[[], Batch]
) -> None:
    cache = cached(model, make_batch())
    parts = [
        name
        for name in cache
        if name in ("hook_embed", "hook_pos_embed")
        or name.endswith(("hook_attn_out", "hook_mlp_out"))
    ]
    assert len(parts) == 2 * LOOPS * LAYERS + 1 + model.positional
    total = torch.stack([cache[name].expand_as(cache["hook_embed"]) for name in parts]).sum(0)
    final = cache[f"loops.{LOOPS - 1}.hook_state_out"]
    assert is_close(total, final) == model.additive_residual == (not model.cfg.input_injection)
