"""Columns of the inputs: those that a method reads, and the activations that stand there.

Axes: batch pos d_model; `k` counts the columns that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.core.tokens import Batch

Shown = Literal["real", "readout", "all"] | Sequence[int]
Spots = tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]


def read_columns(
    batch: Batch, positions: Literal["all"] | Sequence[int] | None
) -> Int[Tensor, "batch k"]:
    """The columns of each row that are read: the readout, or the positions asked for."""
    if positions is None:
        return batch.readout[:, None]
    width = batch.tokens.shape[1]
    chosen = torch.arange(width) if positions == "all" else torch.as_tensor(list(positions))
    if bool(((chosen < 0) | (chosen >= width)).any()):
        raise ValueError(f"positions must be in 0..{width - 1}, got {chosen.tolist()}")
    return chosen.to(batch.tokens.device).expand(len(batch), -1)


def at_positions(
    resid: Float[Tensor, "batch pos d_model"], columns: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k d_model"]:
    """Some columns of each row."""
    return resid.gather(1, columns[..., None].expand(-1, -1, resid.shape[-1]))


def shown_spots(batch: Batch, positions: Shown) -> Spots:
    """The columns to show, and which of them are no padding or were asked for all the same."""
    if positions == "real":
        longest = int(batch.mask.sum(1).max())
        return read_columns(batch, range(longest)), batch.mask[:, :longest].bool()
    if isinstance(positions, str) and positions not in ("readout", "all"):
        raise ValueError(
            f"positions must be 'real', 'readout', 'all' or columns, got {positions!r}"
        )
    columns = read_columns(batch, None if positions == "readout" else positions)
    return columns, torch.ones_like(columns, dtype=torch.bool)
