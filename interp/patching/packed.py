"""Many patched runs side by side, each only from where its patch begins.

A lane (see `lanes.py`) joins the pass over the schedule at the visit of its
first patch, with the rows from its first patched column to its readout; earlier rows and visits are
those of the base run. The live rows of all lanes lie flat, so that projections and MLPs see no
padding; attention reads the base run's earlier keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.cells import HEAD_AXIS, Cell
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.patching.lanes import BEFORE, BaseRun, Lanes, lanes_of
from loopscope.interp.patching.memory import answer_bytes, cut, lane_bytes
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.hooks import live
from loopscope.models.core.packed_rows import ROWS, PackedRows, RowPlaces, Tiles

_GROUPS = 32  # groups that a sweep is cut into, where each still has
_LEAST = 2048  # so many rows


def packable(model: LoopedModel, batch: Batch) -> bool:
    """Whether rows of this batch can be run side by side: causal, row by row, and nothing hooked
    that expects whole sequences.

    Where a mask depends on more than positions (a prefix that is read in both directions), it is
    not causal.
    """
    if model.any_hook() or not (model.causal and model.batch_independent and model.rowwise):
        return False
    return begin_batch(model, batch[:1], 1).tags is None


def packed_groups(
    model: LoopedModel, base: Batch, cells: Sequence[Cell], n_loops: int, max_bytes: int
) -> list[list[int]]:
    """The cells, by their index, that are run side by side: neighbours in the order of the
    schedule, as many as the memory holds, but not so many that nothing is left to share. A sweep
    below `_LEAST` rows is one group.

    A cell's logits depend to the last bit on the cells of its group, and on no other.
    """
    lanes, width = lanes_of(model, base, cells, n_loops), base.tokens.shape[1]
    own = torch.stack([lanes.lengths, lane_bytes(model, lanes, cells, width)], 1)
    each = own.new_tensor([[0, answer_bytes(model, base)]]).repeat(len(cells), 1)
    costs = each.index_add(0, lanes.cell, own).tolist()
    most = max(_LEAST, sum(rows for rows, _ in costs) // _GROUPS), max_bytes
    groups: list[list[int]] = [[]]
    held = 0, 0
    for index, (rows, size) in enumerate(costs):
        now = held[0] + rows, held[1] + size
        if groups[-1] and (now[0] > most[0] or now[1] > most[1]):
            groups.append([])
            now = rows, size
        groups[-1].append(index)
        held = now
    return groups


def packed_logits(
    model: LoopedModel,
    base: Batch,
    groups: Sequence[Sequence[Cell]],
    source: Mapping[str, Tensor],
    n_loops: int,
    max_bytes: int,
) -> Iterator[Float[Tensor, "cell batch d_vocab"]]:
    """The logits at the readout of the base run as a cell, and then with each cell of a group
    patched, group by group.

    Args:
        groups: Cells in the order of the schedule; those of one group are run side by side.
        source: The values that are put in, by hook name, with the whole batch.
        max_bytes: How much memory the patched runs may take; a group that takes more is cut.
    """
    packed = [lanes_of(model, base, cells, n_loops) for cells in groups]
    joins = {visit for lanes in packed for visit in lanes.visit.tolist()}
    run = BaseRun.of(model, base, n_loops, joins)
    yield run.logits[None]
    for cells, lanes in zip(groups, packed, strict=True):
        logits = run.logits.repeat(len(cells), 1, 1)
        for part in cut(lane_bytes(model, lanes, cells, base.tokens.shape[1]), max_bytes):
            chunk = lanes[part]
            logits[chunk.cell, chunk.example] = run_lanes(run, cells, source, chunk)
        yield logits


def run_lanes(
    base: BaseRun, cells: Sequence[Cell], source: Mapping[str, Tensor], lanes: Lanes
) -> Float[Tensor, "lane d_vocab"]:
    """Logits at the readout of each lane, from one pass over the schedule.

    Args:
        source: The values that are put in, by hook name, with the whole batch.
    """
    model, n_loops = base.model, base.end.n_loops
    with model.hooks(_patches(base, cells, source, lanes), n_loops=n_loops):
        return _pass(base, lanes)


def _pass(base: BaseRun, lanes: Lanes) -> Tensor:
    """Logits of all lanes from one pass over the schedule, with the patches attached as hooks.

    The rows of all lanes lie one after another, in the order in which the lanes join; `rows` of
    them have joined so far. At each visit the rows of the lanes that join there are taken from the
    base run's state before it and put behind the others; then the visit runs on all of them at
    once. Attention sees the rows of a lane's own, and for the columns before them the base run's
    keys and values.
    """
    model, schedule = base.model, base.model.schedule(base.end.n_loops)
    allowed = Rows.make(base.end, type(model).visible).allowed
    width = base.batch.tokens.shape[1]
    row_lane = torch.repeat_interleave(lanes.lengths)
    row_column = (
        torch.arange(len(row_lane), device=row_lane.device)
        - (lanes.offsets - lanes.start)[row_lane]
    )
    row_example = lanes.example[row_lane]
    places = [x[row_example, row_column][None] for x in (base.end.positions, base.end.mask)]
    tags = None if base.end.tags is None else base.end.tags[row_example, row_column][None]
    tiles = _tiles(lanes, allowed, width)
    counts = _counts(lanes, len(schedule))
    joined, rows = counts[BEFORE]
    running = _embedded(base, row_example[:rows], row_column[:rows]) if rows else None
    resid, parts = running or (base.end.resid[:1, :0], {})
    for visit in schedule[max(0, int(lanes.visit[0])) :]:
        new = slice(rows, counts[visit.index][1])
        if new.stop > new.start:
            state = base.states[visit.index]
            at = (row_example[new], row_column[new])
            resid = torch.cat([resid, state.resid[at][None]], dim=1)
            joining = {name: part[at][None] for name, part in state.parts.items()}
            parts = {
                name: torch.cat([parts[name], part], dim=1) if rows else part
                for name, part in joining.items()
            }
        joined, rows = counts[visit.index]
        here = RowPlaces(
            places[0][:, :rows], places[1][:, :rows], None if tags is None else tags[:, :rows]
        )
        packed = PackedRows(
            here,
            allowed,
            visit=visit.name,
            example=lanes.example[:joined],
            slots=row_lane[:rows] * width + row_column[:rows],
            width=width,
            base=base.store[visit.name],
            tiles=tiles,
        )
        resid, parts = model.run_visit(visit, resid, parts, packed, hooked=True)
    return _read(base, lanes, joined, resid, parts)


def _tiles(
    lanes: Lanes, allowed: Bool[Tensor, "example 1 column column"] | None, width: int
) -> Tiles | None:
    """The rows in tiles; None where a lane may be too long for one."""
    if width > ROWS:
        return None
    if allowed is None:
        one = torch.ones(1, 1, width, width, dtype=torch.bool, device=lanes.cell.device)
        allowed = one.tril()
    return Tiles.make(lanes.example, lanes.start, lanes.lengths, allowed)


def _counts(lanes: Lanes, n_visits: int) -> dict[int, tuple[int, int]]:
    """Lanes and rows that have joined when each visit is run."""
    ends = torch.cat([lanes.lengths.new_zeros(1), lanes.lengths.cumsum(0)])
    joined = torch.searchsorted(
        lanes.visit.contiguous(), torch.arange(BEFORE, n_visits, device=ends.device), right=True
    )
    return dict(
        zip(
            range(BEFORE, n_visits),
            zip(joined.tolist(), ends[joined].tolist(), strict=True),
            strict=True,
        )
    )


def _embedded(
    base: BaseRun, example: Tensor, column: Tensor
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """The residual stream of the lanes that a patch of the embedding begins."""
    where = (example, column)
    taps = live(base.model.edge_points())
    options = {name: _of_rows(value, example, column) for name, value in base.batch.options.items()}
    return base.model.embed(
        base.batch.tokens[where][None], base.end.positions[where][None], taps, **options
    )


def _of_rows(value: Any, example: Tensor, column: Tensor) -> Any:
    """An option of `begin` for some rows; one that is given once for all sequences has a single
    one.
    """
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    return value[example if len(value) > 1 else 0, column][None]


def _read(
    base: BaseRun, lanes: Lanes, joined: int, resid: Tensor, parts: Mapping[str, Tensor]
) -> Tensor:
    """Logits of every lane, each at its last row; lanes that join after the last visit read the
    base run's.
    """
    late = (lanes.example[joined:], lanes.stop[joined:])
    last = (lanes.offsets + lanes.lengths - 1)[:joined]

    def pick(mine: Tensor | None, whole: Tensor) -> Tensor:
        return torch.cat([*([] if mine is None else [mine[0, last]]), whole[late]])[:, None]

    where = (lanes.example, lanes.stop)
    state = replace(
        base.end,
        resid=pick(resid, base.end.resid),
        positions=base.end.positions[where][:, None],
        mask=base.end.mask[where][:, None],
        parts={name: pick(parts.get(name), whole) for name, whole in base.end.parts.items()},
    )
    return base.model.readout(state, torch.zeros_like(lanes.cell))


def _patches(
    base: BaseRun, cells: Sequence[Cell], source: Mapping[str, Tensor], lanes: Lanes
) -> list[tuple[str, partial[Tensor]]]:
    """A hook for each hook point that some lane patches."""
    wanted: dict[str, list[tuple[int, int, int]]] = {}
    rows = zip(lanes.cell.tolist(), lanes.start.tolist(), lanes.stop.tolist(), strict=True)
    for lane, (cell, start, stop) in enumerate(rows):
        for name in cells[cell].names:
            places = [
                (lane, column, cells[cell].head)
                for column in cells[cell].columns
                if start <= column <= stop
            ]
            wanted.setdefault(name, []).extend(
                (lane, column, -1 if head is None else head) for lane, column, head in places
            )
    return [
        (
            name,
            _patch(base, name, found, source[name], lanes),
        )
        for name, found in wanted.items()
    ]


def _patch(
    base: BaseRun, name: str, found: list[tuple[int, int, int]], source: Tensor, lanes: Lanes
) -> partial[Tensor]:
    """The hook of one point; `found` holds the lane, the column and the head (-1 for all) of each
    of its patches.
    """
    lane, column, head = torch.tensor(found, device=lanes.cell.device).T
    heads: slice | Tensor = slice(None) if found[0][2] < 0 else head
    example = lanes.example[lane]
    if HEAD_AXIS.get(site_of(name)) == 1:
        return partial(_put, index=(lane, heads, column), values=source[example, heads, column])
    if name in base.model.edge_sites()[1]:
        rows = (lane, torch.zeros_like(lane))
    else:
        rows = (torch.zeros_like(lane), lanes.offsets[lane] + column - lanes.start[lane])
    more = (heads,) if HEAD_AXIS.get(site_of(name)) == 2 else ()
    return partial(_put, index=(*rows, *more), values=source[(example, column, *more)])


def _put(
    value: Tensor, hook: HookPoint, index: tuple[Tensor | slice, ...], values: Tensor
) -> Tensor:
    patched = value.clone()
    patched[index] = values
    return patched
