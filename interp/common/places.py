"""Places in a run, and what another run has there: shared by ablation, steering and path patching.

Axes: batch pos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.interp.common.cells import in_range
from loopscope.interp.common.inputs import Inputs, as_batch, begin_batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit
from loopscope.models.core.tokens import Batch

Picked = Literal["all"] | Sequence[int]


def checked_columns(positions: Picked) -> list[int] | None:
    """Columns to write at; None for every one."""
    if positions == "all":
        return None
    columns = [int(position) for position in positions]
    if not columns or min(columns) < 0:
        raise ValueError(
            f"positions must be 'all' or a list of columns counted from 0, got {columns}"
        )
    return columns


def at_columns_of(value: Tensor, new: Tensor, columns: list[int] | None) -> Tensor:
    """The value with some of its columns, or all of them, taken from another tensor of its
    shape.
    """
    if columns is None:
        return new
    if max(columns) >= value.shape[1]:
        raise ValueError(
            f"positions must be in 0..{value.shape[1] - 1} in this run, got {max(columns)}"
        )
    changed = value.clone()
    changed[:, columns] = new[:, columns]
    return changed


def visits_at(model: LoopedModel, n_loops: int, loops: Picked, layers: Picked) -> list[Visit]:
    """The visits inside the loop at some iterations and layers, in order."""
    inside = [visit for visit in model.schedule(n_loops) if visit.loop is not None]
    kept_loops = in_range("loops", loops, n_loops)
    kept_layers = in_range("layers", layers, 1 + max(visit.layer for visit in inside))
    return [visit for visit in inside if visit.loop in kept_loops and visit.layer in kept_layers]


@torch.no_grad()
def recorded(
    model: LoopedModel, batch: Batch, names: Sequence[str], n_loops: int
) -> dict[str, Tensor]:
    """Activations at some hook points of the visits, without computing what comes after the last of
    them.
    """
    store, hooks, _ = model.get_caching_hooks(list(names), n_loops=n_loops)
    wanted = set(names)
    last = max(visit.index for visit in model.schedule(n_loops) if wanted & set(visit.hook_names()))
    with model.hooks(hooks, n_loops=n_loops):
        model.advance(begin_batch(model, batch, n_loops), last + 1)
    return store


def reference_batch(model: LoopedModel, inputs: Inputs) -> Batch:
    """A batch of which no answer is read, so that tokens need no readout column."""
    return as_batch(model, inputs, -1 if isinstance(inputs, Tensor) else None)


def other_rows(count: int, seed: int) -> Int[Tensor, " row"]:
    """A random permutation that leaves no row in place: each row's successor on a random circle.

    Raises:
        ValueError: Fewer than two rows.
    """
    if count < 2:
        raise ValueError(f"a reference to resample from needs at least two rows, got {count}")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.empty_like(order).scatter(0, order, order.roll(-1))
