"""Rows of several sequences side by side, without padding: one sequence of all rows, which attend
only within their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.core.attention import PLAIN, KeyValues, Rows, Scoring
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps
from loopscope.models.core.state import State


@dataclass(frozen=True)
class RowPlaces:
    """Where rows stand, in the shape that a block expects: one sequence of all rows."""

    positions: Int[Tensor, "one row"]
    mask: Bool[Tensor, "one row"]
    tags: Int[Tensor, "one row"] | None


@dataclass(frozen=True)
class PackedRows(Rows):
    """Rows of several lanes, "one row ..."; a lane is a whole sequence of which some columns are
    run.

    `allowed` is that of the sequences, "example 1 query key", or one for all of them.

    Attributes:
        example: Int[Tensor, " lane"], the sequence of each lane.
        slots: Int[Tensor, " row"], each row's place in the (lane, column) grid.
        width: Columns of the grid.
        base: Keys and values of the columns that are not run, by example; None where nothing that
            is run reads them.
    """

    example: Int[Tensor, " lane"] | None = None
    slots: Int[Tensor, " row"] | None = None
    width: int = 0
    base: KeyValues | None = None

    def attend(
        self,
        q: Float[Tensor, "one row head d_head"],
        k: Float[Tensor, "one row kv_head d_head"],
        v: Float[Tensor, "one row kv_head d_head"],
        taps: Taps,
        dropout: float = 0.0,
        scoring: Scoring = PLAIN,
    ) -> Float[Tensor, "one row head d_head"]:
        """Attention on the grid of lanes and columns; what the rows do not fill is read from the
        base run, or not used.
        """
        assert self.example is not None, "packed rows belong to sequences"
        assert self.slots is not None, "packed rows have places"
        grid = (len(self.example), self.width)
        keys, values = (
            (self.base.k[self.example], self.base.v[self.example])
            if self.base
            else (k.new_zeros(*grid, *k.shape[2:]),) * 2
        )
        keys, values = (
            x.flatten(0, 1).index_put((self.slots,), new[0]).view(*grid, *new.shape[2:])
            for x, new in ((keys, k), (values, v))
        )
        queries = (
            q.new_zeros(grid[0] * grid[1], *q.shape[2:])
            .index_put((self.slots,), q[0])
            .view(*grid, *q.shape[2:])
        )
        allowed = self.allowed
        if allowed is not None and len(allowed) > 1:
            allowed = allowed[self.example]
        whole = Rows(self.places, allowed)
        z = whole.attend(queries, keys, values, taps, dropout, scoring)
        return z.reshape(-1, *q.shape[2:])[self.slots][None]

    def _distances(self) -> Int[Tensor, "batch query key"]:
        columns = torch.arange(self.width, device=self.places.positions.device)
        return (columns[:, None] - columns)[None]


def advance_unpadded(model: LoopedModel, state: State, readout: Int[Tensor, " batch"]) -> State:
    """Run a state to the end of its schedule, computing only real tokens and each sequence's
    readout.

    For models whose rows can be run side by side (`rowwise`, `causal`); gradients flow.

    Returns:
        The final state at the readouts, one position per sequence.
    """
    width = state.resid.shape[1]
    read = torch.arange(len(readout), device=readout.device) * width + readout
    kept = state.mask.flatten().index_fill(0, read, True)
    slots = kept.nonzero()[:, 0]

    def pick(x: Tensor, places: Tensor) -> Tensor:
        return x.flatten(0, 1)[places]

    tags = None if state.tags is None else pick(state.tags, slots)[None]
    where = RowPlaces(pick(state.positions, slots)[None], pick(state.mask, slots)[None], tags)
    allowed = Rows.make(state, type(model).visible).allowed
    example = torch.arange(len(readout), device=readout.device)
    resid = pick(state.resid, slots)[None]
    parts: Mapping[str, Tensor] = {
        name: pick(part, slots)[None] for name, part in state.parts.items()
    }
    for visit in model.schedule(state.n_loops)[state.visit :]:
        rows = PackedRows(
            where, allowed, visit=visit.name, example=example, slots=slots, width=width
        )
        resid, parts = model.run_visit(visit, resid, parts, rows, hooked=False)
    last = torch.searchsorted(slots, read)
    return replace(
        state,
        visit=len(model.schedule(state.n_loops)),
        resid=resid[0, last][:, None],
        positions=pick(state.positions, read)[:, None],
        mask=pick(state.mask, read)[:, None],
        parts={name: part[0, last][:, None] for name, part in parts.items()},
    )
