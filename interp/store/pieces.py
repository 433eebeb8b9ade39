"""Pieces of a store's work: rows that are run at once, and which of their tokens are stored.

Axes: batch pos; `k` counts the columns that are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from loopscope.interp.common.columns import checked_columns, read_columns
from loopscope.interp.common.places import Picked
from loopscope.interp.store.texts import Source
from loopscope.models.basis.tokens import Batch

Positions = Literal["all"] | list[int] | None


@dataclass(frozen=True)
class Piece:
    """Some rows that are run at once.

    Attributes:
        first: The first of their reads among those of the file.
        example: The first row's example.
        shown: Bool[Tensor, "batch k"], the reads at `columns` that are stored.
    """

    batch: Batch
    columns: Int[Tensor, "batch k"]
    shown: Bool[Tensor, "batch k"]
    first: int
    example: int

    def at_reads(self, value: Tensor) -> Tensor:
        """The entries "batch pos ..." of the reads, example by example."""
        row, k = self.shown.nonzero(as_tuple=True)
        return value[row, self.columns[row, k]]


def checked_positions(source: Source, positions: Picked | int | None, batch_size: int) -> Positions:
    """The positions to store; examples are read until each of these columns was in one of them."""
    if positions is None:
        return None
    columns = checked_columns(positions)
    if columns is None:
        return "all"
    absent, longest = set(columns), 0
    for start in range(0, source.count, batch_size):
        batch = source.batches(range(start, min(start + batch_size, source.count)))
        real = batch.mask.bool().any(0).nonzero().flatten().tolist()
        absent, longest = absent.difference(real), max([longest, *real])
        if not absent:
            return sorted(columns)
    raise ValueError(
        f"positions must be in 0..{longest}, the columns of the longest example, got {min(absent)}"
    )


def reads_of(
    batch: Batch, positions: Positions
) -> tuple[Int[Tensor, "batch k"], Bool[Tensor, "batch k"]]:
    """Columns of each row, and which of them are stored."""
    if positions is None:
        return batch.readout[:, None], torch.ones_like(batch.readout[:, None], dtype=torch.bool)
    columns, real = read_columns(batch, "all"), batch.mask.bool()
    if positions == "all":
        return columns, real
    return columns, real & torch.isin(columns, columns.new_tensor(positions))


def cut(sizes: list[int], start: int, max_bytes: int) -> Iterator[slice]:
    """Runs of rows whose sizes add up to at most `max_bytes`."""
    if max(sizes) > max_bytes:
        example = start + sizes.index(max(sizes))
        raise ValueError(
            f"max_bytes must hold the activations of one example, but example {example} has"
            f" {max(sizes)} bytes, got {max_bytes}; store fewer sites or visits, cut texts"
            " with context=, or allow more"
        )
    first, held = 0, 0
    for row, size in enumerate(sizes):
        if held + size > max_bytes:
            yield slice(first, row)
            first, held = row, 0
        held += size
    yield slice(first, len(sizes))
