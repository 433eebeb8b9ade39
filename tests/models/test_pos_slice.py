"""pos_slice cuts the position axis of every site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BATCH, POS, random_tokens


def manual_slice(name: str, value: Tensor, window: slice) -> Tensor:
    if name.endswith(("hook_attn_scores", "hook_pattern")):
        return value[:, :, window]
    return value[:, window]


@pytest.mark.parametrize(
    "window", [slice(2, 5), slice(-3, None), slice(None, None, 2), slice(4, 5)]
)
def test_pos_slice_cuts_the_position_axis_of_every_site(
    window: slice, model: RecurrentDepth
) -> None:
    """Python's own slice is taken, as TransformerLens's Slice takes it."""
    tokens = random_tokens()
    _, whole = model.run_with_cache(tokens, n_loops=2, names_filter="**")
    logits, cut = model.run_with_cache(tokens, n_loops=2, names_filter="**", pos_slice=window)
    assert list(cut) == model.hook_names(2)
    assert logits.shape == (BATCH, POS, model.cfg.d_vocab)
    for name, value in whole.items():
        assert torch.equal(cut[name], manual_slice(name, value, window)), name


@pytest.mark.parametrize(
    ("form", "window"),
    [(3, slice(3, 4)), (-1, slice(-1, None)), ((2, 5), slice(2, 5)), ([1, 4], slice(1, 5, 3))],
)
def test_pos_slice_takes_transformer_lens_forms_at_every_site(
    form: object, window: slice, plain: RecurrentDepth
) -> None:
    """One position keeps an axis of one, as TransformerLens's own run_with_cache does."""
    tokens = random_tokens()
    _, whole = plain.run_with_cache(tokens, n_loops=2, names_filter="**")
    _, cut = plain.run_with_cache(tokens, n_loops=2, names_filter="**", pos_slice=form)
    for name, value in whole.items():
        assert torch.equal(cut[name], manual_slice(name, value, window)), name
