"""The states that probes read: chunk by chunk, all places from one run of each chunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from loopscope.interp.common.collecting import collect
from loopscope.interp.common.columns import at_positions, read_columns
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import checked_batch_size, rows_apart
from loopscope.interp.common.modes import ungraphed
from loopscope.interp.common.places import Picked, Place, places_of
from loopscope.interp.common.precision import widened
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.names import NamesFilter
from loopscope.models.basis.numbers import checked_number
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import position_axis

HeldOut = float | Sequence[bool] | Bool[Tensor, " batch"] | Bool[np.ndarray, " batch"]
States = dict[str, Float[Tensor, "read _d"]]


class Side(NamedTuple):
    """One side of a split, fitted or held out.

    Attributes:
        reads: Int[Tensor, " read"], the reads of its rows.
        pieces: Which reads, and their states at each place, piece by piece; gone through once.
    """

    reads: Int[Tensor, " read"]
    pieces: Iterable[tuple[Int[Tensor, " read"], States]]


@dataclass(frozen=True)
class ReadStates:
    """The activations of a batch at some places, at some columns of each row.

    A read is one column of one example; reads are counted example by example, and those of padding
    are counted but left out where "all" columns are asked for.

    Attributes:
        places: The places, in the order of the run.
        columns: Int[Tensor, "batch k"].
        shown: Bool[Tensor, "batch k"], the reads that are not left out.
        n_loops: Iterations.
        batch_size: Rows run at a time; all at once where rows may depend on each other.
    """

    model: LoopedModel
    batch: Batch
    places: tuple[Place, ...]
    columns: Int[Tensor, "batch k"]
    shown: Bool[Tensor, "batch k"]
    n_loops: int
    batch_size: int

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        batch: Batch,
        names: NamesFilter | None,
        positions: Picked | int | None,
        n_loops: int,
        batch_size: int,
    ) -> ReadStates:
        """The states at some hook points, by default the residual after every visit.

        Raises:
            KeyError: A name that the call does not have.
            ValueError: A place after the last visit, a column out of range, or a size below 1.
        """
        if names is None:
            names = [f"{visit.name}.{model.lens_site}" for visit in model.schedule(n_loops)]
        chosen = set(model.resolve_names(names, n_loops))
        places = tuple(place for place in places_of(model, n_loops) if place.name in chosen)
        late = [place.name for place in places if place.name in model.edge_sites()[1]]
        if late:
            raise ValueError(
                f"probes read a run up to its last visit, but {late[0]!r} comes after it; name"
                " places in the visits"
            )
        columns = read_columns(batch, positions)
        every = isinstance(positions, str) and positions == "all"
        shown = batch.mask.bool() if every else torch.ones_like(columns, dtype=torch.bool)
        return cls(model, batch, places, columns, shown, n_loops, checked_batch_size(batch_size))

    @property
    def names(self) -> tuple[str, ...]:
        """The hook point of each place."""
        return tuple(place.name for place in self.places)

    def reads(self, rows: Int[Tensor, " row"]) -> Int[Tensor, " read"]:
        """The reads of some rows."""
        count = self.columns.shape[1]
        reads = rows[:, None] * count + torch.arange(count, device=rows.device)
        return reads[self.shown.to(rows.device)[rows]]

    def filled(self, values: Shaped[Tensor, "batch k"]) -> Shaped[Tensor, " read"]:
        """Values of all reads, in which those that are left out repeat the others of their row, so
        that they add no value of their own.
        """
        lengths = self.shown.sum(1, keepdim=True).to(values.device)
        turns = torch.arange(values.shape[1], device=values.device)
        return values.gather(1, turns % lengths).flatten()

    def chunks(self, rows: Int[Tensor, " row"]) -> Iterator[tuple[Int[Tensor, " read"], States]]:
        """Some rows in pieces: which reads, and their states at each place, in float32 or wider.

        Raises:
            ValueError: States that are not finite.
        """
        for part in self.pieces(rows):
            yield self.reads(part), self.run(part)

    def pieces(self, rows: Int[Tensor, " row"]) -> tuple[Int[Tensor, " _"], ...]:
        """The rows that are run at a time."""
        size = self.batch_size if rows_apart(self.model) else len(rows)
        parts: tuple[Tensor, ...] = rows.split(size)
        return parts

    def run(self, rows: Int[Tensor, " row"]) -> States:
        """The states of some rows at each place."""
        alone = rows_apart(self.model)
        run = rows if alone else torch.arange(len(self.batch), device=rows.device)
        columns, shown = self.columns[run], self.shown[rows].nonzero(as_tuple=True)

        def kept(value: Tensor, name: str) -> Tensor:
            by_column = value.movedim(position_axis(name), 1)
            read = at_positions(by_column.reshape(*by_column.shape[:2], -1), columns)
            return widened(read if alone else read[rows])[shown]

        visits = self.model.schedule(self.n_loops)
        last = max((v.index for v in visits if set(v.hook_names()) & set(self.names)), default=-1)
        with ungraphed(self.model):
            states = collect(
                self.model, self.batch[run], self.names, self.n_loops, reduce=kept, until=last + 1
            ).values
            finite = torch.stack([value.isfinite().all() for value in states.values()])
        for name in states if not bool(finite.all()) else ():
            refuse_nonfinite(f"the states at {name}", states[name])
        return states


def split_rows(
    count: int, held_out: HeldOut, seed: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """The rows that probes are fitted on, in a random order, and those that are held out.

    Args:
        held_out: A share of the rows, drawn at random; or which rows.

    Raises:
        ValueError: No row on one of the sides, or not one entry per row.
    """
    order = torch.randperm(count, generator=seeded(seed), device="cpu")
    if np.ndim(held_out) == 0:
        share = checked_number(held_out, "held_out", above=0, below=1)
        apart = torch.arange(count, device="cpu") < round(share * count)
        return _sides(order, apart, count)
    given = torch.as_tensor(held_out, device="cpu")
    if given.shape != (count,) or given.dtype != torch.bool:
        raise ValueError(
            f"held_out must be a share or one bool per row: there are {count} rows, got"
            f" {given.dtype} of the shape {list(given.shape)}"
        )
    return _sides(order, given[order], count)


def _sides(
    order: Int[Tensor, " row"], apart: Bool[Tensor, " row"], count: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """The rows of an order that are not set apart, and those that are."""
    train, test = order[~apart], order[apart]
    if not len(train) or not len(test):
        raise ValueError(
            f"a probe needs rows to fit and rows held out, got {len(train)} and {len(test)} of"
            f" {count} rows; pass another held_out"
        )
    return train, test
