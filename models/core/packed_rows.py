"""Rows of several sequences side by side, without padding: one sequence of all rows, which attend
only within their own.

For short sequences a call of the attention kernel costs more than its arithmetic. So `Tiles` lets
several lanes share a call; a mask keeps each row within its own lane.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.core.attention import PLAIN, KeyValues, Rows, Scoring, is_fused
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps
from loopscope.models.core.state import State

ROWS = 32  # of a tile at most: what the kernel takes at a time
_KEYS = 8  # numbers that a vector holds: rows and keys of a tile are a multiple


@dataclass(frozen=True)
class RowPlaces:
    """Where rows stand, in the shape that a block expects: one sequence of all rows."""

    positions: Int[Tensor, "one row"]
    mask: Bool[Tensor, "one row"]
    tags: Int[Tensor, "one row"] | None


@dataclass(frozen=True)
class Tiles:
    """Rows of several lanes in tiles of `size` places; a tile holds whole lanes of one example,
    and tiles are begun in the order of the lanes.

    A row sees keys of the base run before its lane's first column, and keys of its own lane.

    Attributes:
        size: Places of a tile.
        places: Int[Tensor, " row"], each row's place among those of all tiles.
        example: Int[Tensor, " tile"], the example of the lanes in each tile.
        allowed: Bool[Tensor, "tile 1 place key"], where a tile's keys are those of its places, of
            the base run's columns, and padding.
    """

    size: int
    places: Int[Tensor, " row"]
    example: Int[Tensor, " tile"]
    allowed: Bool[Tensor, "tile 1 place key"]

    @classmethod
    def make(
        cls,
        example: Int[Tensor, " lane"],
        start: Int[Tensor, " lane"],
        lengths: Int[Tensor, " lane"],
        sees: Bool[Tensor, "example 1 column column"],
    ) -> Tiles:
        """Put lanes into tiles in their order.

        Args:
            example, start, lengths: Of each lane its example, first column and number of columns.
            sees: Which columns each column sees, in each example or (one) in all; at most `ROWS`
                columns.
        """
        width = sees.shape[-1]
        size = width + -width % _KEYS
        first, of_tile = _filled(zip(lengths.tolist(), example.tolist(), strict=True), size)
        row_lane = torch.repeat_interleave(lengths)
        within = torch.arange(len(row_lane), device=row_lane.device)
        within = within - (lengths.cumsum(0) - lengths)[row_lane]
        places = torch.tensor(first, device=row_lane.device)[row_lane] + within
        tiles = torch.tensor(of_tile, device=row_lane.device)

        def spread(values: Tensor, empty: int) -> Int[Tensor, "tile place"]:
            grid = values.new_full((len(tiles) * size,), empty).index_copy(0, places, values)
            return grid.view(-1, size)

        lane, column = spread(row_lane, -1), spread(within + start[row_lane], 0)
        begins = spread(start[row_lane], 0)
        columns = torch.arange(width, device=row_lane.device)
        seen = sees[tiles if len(sees) > 1 else torch.zeros_like(tiles), 0]
        tile = torch.arange(len(tiles), device=row_lane.device)[:, None, None]
        own = lane[:, :, None] == lane[:, None, :]
        mine = own & (seen[tile, column[:, :, None], column[:, None, :]] | (lane < 0)[:, :, None])
        before = seen[tile[..., 0], column] & (columns < begins[..., None])
        padding = size - width
        return cls(
            size, places, tiles, F.pad(torch.cat([mine, before], dim=-1), (0, padding))[:, None]
        )

    def attend(
        self,
        q: Float[Tensor, "one row head d_head"],
        k: Float[Tensor, "one row kv_head d_head"],
        v: Float[Tensor, "one row kv_head d_head"],
        base: KeyValues,
        dropout: float,
        scale: float | None,
    ) -> Float[Tensor, "one row head d_head"]:
        """Attention of the first rows, as many as are given, over their own keys and those of the
        base run.
        """
        places = self.places[: q.shape[1]]
        count = int(places.max()) // self.size + 1
        example, allowed = self.example[:count], self.allowed[:count]

        def spread(x: Tensor, size: int) -> Float[Tensor, "tile place head d_head"]:
            at = places + places // self.size * (size - self.size)
            flat = x.new_zeros(count * size, x.shape[2] * x.shape[3])
            return flat.index_copy_(0, at, x[0].flatten(1)).view(count, size, *x.shape[2:])

        keys, values = spread(k, allowed.shape[-1]), spread(v, allowed.shape[-1])
        earlier = slice(self.size, self.size + base.k.shape[1])
        keys[:, earlier] = base.k.index_select(0, example)
        values[:, earlier] = base.v.index_select(0, example)
        z = F.scaled_dot_product_attention(
            spread(q, self.size).transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            attn_mask=allowed,
            dropout_p=dropout,
            scale=scale,
            enable_gqa=k.shape[2] != q.shape[2],
        )
        return (
            z.transpose(1, 2).reshape(count * self.size, *q.shape[2:]).index_select(0, places)[None]
        )


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
        tiles: The rows in tiles, for the fused kernel; None has them attend on the grid.
    """

    example: Int[Tensor, " lane"] | None = None
    slots: Int[Tensor, " row"] | None = None
    width: int = 0
    base: KeyValues | None = None
    tiles: Tiles | None = None

    def attend(
        self,
        q: Float[Tensor, "one row head d_head"],
        k: Float[Tensor, "one row kv_head d_head"],
        v: Float[Tensor, "one row kv_head d_head"],
        taps: Taps,
        dropout: float = 0.0,
        scoring: Scoring = PLAIN,
    ) -> Float[Tensor, "one row head d_head"]:
        """Attention in tiles, or on the grid of lanes and columns; what the rows do not fill is
        read from the base run, or not used.
        """
        if self.tiles is not None and self.base is not None:
            numbers = (q, k, v, self.base.k, self.base.v)
            if is_fused(numbers, taps, scoring):
                return self.tiles.attend(q, k, v, self.base, dropout, scoring.scale)
        assert self.example is not None, "packed rows belong to sequences"
        assert self.slots is not None, "packed rows have places"
        kept = (None, None) if self.base is None else (self.base.k, self.base.v)
        keys, values, queries = map(self._on_grid, (k, v, q), (*kept, None))
        allowed = self.allowed
        if allowed is not None and len(allowed) > 1:
            allowed = allowed[self.example]
        whole = Rows(self.places, allowed)
        z = whole.attend(queries, keys, values, taps, dropout, scoring)
        return z.reshape(-1, *q.shape[2:]).index_select(0, self.slots)[None]

    def _on_grid(
        self,
        new: Float[Tensor, "one row head d_head"],
        kept: Float[Tensor, "example column head d_head"] | None,
    ) -> Float[Tensor, "lane column head d_head"]:
        """The rows' own values at their places, and elsewhere those kept of their example, or 0."""
        assert self.example is not None, "packed rows belong to sequences"
        assert self.slots is not None, "packed rows have places"
        shape = (len(self.example), self.width, *new.shape[2:])
        grid = new.new_zeros(shape) if kept is None else kept.index_select(0, self.example)
        flat = grid.flatten(0, 1).flatten(1)
        return flat.index_copy_(0, self.slots, new[0].flatten(1)).view(shape)

    def within(self, window: int) -> Rows:
        near = super().within(window)
        if near is self:
            return self
        assert isinstance(near, PackedRows), "of the class of what it is made from"
        return replace(near, tiles=None)  # tiles see without a window

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


def _filled(lanes: Iterable[tuple[int, int]], size: int) -> tuple[list[int], list[int]]:
    """The first place of each lane, given its length and example, and the example of each tile; a
    lane goes into the first tile of its example that has room.
    """
    first: list[int] = []
    examples: list[int] = []
    free: dict[int, dict[int, int]] = {}  # by example and tile
    for length, example in lanes:
        rooms = free.setdefault(example, {})
        tile = next((tile for tile, room in rooms.items() if room >= length), len(examples))
        if tile == len(examples):
            examples.append(example)
        room = rooms.pop(tile, size)
        first.append((tile + 1) * size - room)
        if room > length:
            rooms[tile] = room - length
    return first, examples
