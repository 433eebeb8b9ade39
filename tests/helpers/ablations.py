"""Runs of the toy models with some components ablated or left out."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from loopscope.interp.edit.ablation import Component, ablate
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from toy import LOOPS

ATTN, MLP = Component("attn", [1], [0]), Component("mlp", [2], [1])
Z, ATTN_OUT, MLP_OUT = (
    "loops.1.blocks.0.attn.hook_z",
    "loops.1.blocks.0.hook_attn_out",
    "loops.2.blocks.1.hook_mlp_out",
)
SITES = [
    "hook_embed",
    "**.hook_z",
    "**.hook_attn_out",
    "**.hook_mlp_out",
    "**.hook_resid_pre",
    "**.hook_resid_post",
]


def ablated(
    model: LoopedModel, what: Component | list[Component], batch: Batch, **options: object
) -> dict[str, Tensor]:
    """Some activations of a run with an ablation, and its logits as "logits"."""
    with ablate(model, what, n_loops=LOOPS, **options):
        logits, cache = model.run_with_cache(
            batch.tokens, n_loops=LOOPS, mask=batch.mask, names_filter=SITES
        )
    return {**cache, "logits": logits}


def without(model: LoopedModel, batch: Batch, skipped: set[int], n_loops: int = LOOPS) -> Tensor:
    """Logits of a run whose visits with these indices are left out, iteration boundaries
    included.
    """
    state = model.begin(batch.tokens, batch.mask, n_loops=n_loops)
    for visit in model.schedule(n_loops):
        state = (
            replace(state, visit=visit.index + 1)
            if visit.index in skipped
            else model.advance(state, visit.index + 1)
        )
    return model.readout(state)
