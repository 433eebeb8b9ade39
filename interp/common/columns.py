"""Columns of the inputs: those that a method reads, and the activations that stand there.

Axes: batch pos d_model; `k` counts the columns that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.places import Picked, in_range, whole_numbers
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.state import running_rows

Shown = Literal["real", "readout", "all"] | Sequence[int] | int
ShownColumns = tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]


def read_columns(batch: Batch, positions: Picked | int | None) -> Int[Tensor, "batch k"]:
    """The columns of each row that are read: the readout, or the positions asked for."""
    if positions is None:
        return batch.readout[:, None]
    asked = in_range("positions", positions, batch.tokens.shape[1])
    chosen = torch.tensor(asked, device=batch.tokens.device)
    if not len(chosen):
        raise ValueError("positions must name at least one column, got none")
    return chosen.expand(len(batch), -1)


def used_columns(batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Where a row holds a token or is read: an answer may be read at a column of padding."""
    column = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    return batch.mask.bool() | (column == batch.readout[:, None])


def at_positions(
    resid: Float[Tensor, "batch pos d_model"], columns: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k d_model"]:
    """Some columns of each row."""
    return resid.gather(1, columns[..., None].expand(-1, -1, resid.shape[-1]))


def shown_columns(batch: Batch, positions: Shown) -> ShownColumns:
    """The columns to show, and which of them are no padding or were asked for all the same."""
    if not isinstance(positions, str):
        columns = read_columns(batch, positions)
    elif positions == "real":
        longest = int(batch.mask.sum(1).max())
        return read_columns(batch, range(longest)), batch.mask[:, :longest].bool()
    elif positions in ("readout", "all"):
        columns = read_columns(batch, None if positions == "readout" else "all")
    else:
        raise ValueError(
            f"positions must be 'real', 'readout', 'all' or columns, got {positions!r}"
        )
    return columns, torch.ones_like(columns, dtype=torch.bool)


def checked_columns(positions: Picked | int) -> list[int] | None:
    """Columns to write at, each once; None for every one.

    Raises:
        TypeError: Something else than integers.
        ValueError: No column, or one below 0.
    """
    if isinstance(positions, str) and positions == "all":
        return None
    columns = whole_numbers("positions", positions)
    if not columns or min(columns) < 0:
        raise ValueError(
            f"positions must be 'all' or a list of columns counted from 0, got {columns}"
        )
    return columns


def at_columns_of(
    value: Float[Tensor, "batch row ..."],
    new: Float[Tensor, "batch row ..."],
    columns: list[int] | None,
) -> Float[Tensor, "batch row ..."]:
    """The value with some columns of the text, or all of them, taken from another tensor of its
    shape.

    A run may hold some rows of the text only, as a step of a generation does; a column that it does
    not hold is left alone.

    Raises:
        ValueError: A run that starts at column 0 and ends before one of the columns.
    """
    if columns is None:
        return new
    running = running_rows()
    if running is None:
        here = whole = torch.arange(value.shape[1], device=value.device)[None]
    else:
        here, whole = running
    last = int(whole.max())
    if max(columns) > last and int(whole.min()) == 0:
        raise ValueError(f"positions must be in 0..{last} in this run, got {max(columns)}")
    written = torch.isin(here, torch.tensor(columns, device=here.device))
    return torch.where(written.view(*written.shape, *[1] * (value.ndim - 2)), new, value)
