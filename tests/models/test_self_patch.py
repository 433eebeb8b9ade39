"""Identity 2: a patch with a point's own value changes nothing, and one with another value in the
same place does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    HEAD,
    POSITION,
    SHORT,
    expected_shape,
    full,
    index_at,
    is_close,
    padded,
    put,
    run,
    run_hooked,
)


def noise_at(index: tuple[slice | int, ...]) -> Callable[..., Tensor]:
    """A hook that adds noise at one place."""

    def disturb(value: Tensor, hook: object) -> Tensor:
        changed = value.clone()
        changed[index] += torch.randn(
            value[index].shape, generator=torch.Generator().manual_seed(3), dtype=value.dtype
        )
        return changed

    return disturb


def seen_at(model: LoopedModel, batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    """What a hook that returns None sees at one point, and the logits of that run."""
    seen: list[Tensor] = []
    logits = run_hooked(model, batch, name, lambda value, hook: seen.append(value.clone()), SHORT)
    assert len(seen) == 1, name
    return seen[0], logits


def test_self_patch_at_one_position_and_head_changes_nothing(model: RecurrentDepth) -> None:
    batch = padded()
    for name in model.hook_names(SHORT):
        own, logits = seen_at(model, batch, name)
        assert own.shape == expected_shape(name), name
        patched = run_hooked(model, batch, name, put(own, index_at(name, POSITION, HEAD)), SHORT)
        assert torch.equal(patched, logits), name


def test_the_same_place_with_another_value_changes_the_logits(model: RecurrentDepth) -> None:
    batch = full()
    logits = run(model, batch, SHORT)
    for name in model.hook_names(SHORT):
        disturbed = run_hooked(model, batch, name, noise_at(index_at(name, POSITION, HEAD)), SHORT)
        assert not is_close(disturbed, logits), name
