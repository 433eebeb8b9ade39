"""Gradients belong to one hook point each, also where several points hold the same tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, POS, SHORT, padded, projection, run_hooked


def effect(model: RecurrentDepth, name: str, change: Tensor, step: float) -> Tensor:
    batch = padded()
    logits = run_hooked(model, batch, name, lambda value, hook: value + step * change, SHORT)
    return projection()(logits[torch.arange(BATCH), batch.readout])


def test_gradients_are_derivatives_at_each_point_alone(model: RecurrentDepth) -> None:
    if model.embedding.dtype != torch.float64:
        return
    names = [
        name
        for name in model.hook_names(SHORT)
        if name.endswith(("hook_input", "hook_state_in", "hook_resid_pre", "hook_embed"))
    ]
    _, grads = gradients(model, padded(), projection(), names, SHORT)
    change = torch.randn(
        BATCH,
        POS,
        model.cfg.d_model,
        generator=torch.Generator().manual_seed(1),
        dtype=torch.float64,
    )
    for name in names:
        slope = (effect(model, name, change, 1e-5) - effect(model, name, change, -1e-5)) / 2e-5
        torch.testing.assert_close(
            (grads[name] * change).sum((1, 2)), slope, rtol=1e-5, atol=1e-6, msg=name
        )
