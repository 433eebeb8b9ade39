"""The hook that keeps activations, and what `run_with_cache` keeps by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice, SliceInput

from loopscope.models.core.cache import position_axis
from loopscope.models.core.hooks import only_reads

PosSlice = Slice | SliceInput | slice
RESIDUAL_STREAM = ["hook_embed", "**.hook_resid_*"]


def keeping(
    store: dict[str, Tensor],
    device: torch.device | str | None = None,
    pos_slice: PosSlice = None,
    remove_batch_dim: bool = False,
) -> Callable[[Tensor, HookPoint], None]:
    """A hook that keeps each value under the name of its point.

    Args:
        store: Is given the values, detached.
        device: Where to keep them; None leaves them where they are.
        pos_slice: Positions to keep, in any form of TransformerLens's Slice.
        remove_batch_dim: Drop the batch axis of a batch of one.
    """

    @only_reads
    def keep(value: Tensor, hook: HookPoint) -> None:
        assert hook.name is not None, "every hook point is named when it is made"
        kept = value.detach()
        if pos_slice is not None:
            axis = position_axis(hook.name)
            kept = Slice.unwrap(cast(SliceInput, pos_slice)).apply(kept, dim=axis)
        if remove_batch_dim:
            kept = kept.squeeze(0)
        store[hook.name] = kept if device is None else kept.to(device)

    return keep
