"""Patched runs as whole sequences, continued from the base run's state before the patch; the engine
for any model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.cells import HEAD_AXIS, Cell
from loopscope.interp.common.inputs import begin_batch, rows_apart
from loopscope.interp.patching.memory import run_bytes
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.cache import site_of
from loopscope.models.core.state import State


def continued_groups(
    model: LoopedModel, base: Batch, cells: Sequence[Cell], max_bytes: int
) -> list[list[int]]:
    """The cells, by their index, that are run side by side: those of one hook point, as many as the
    memory holds.
    """
    size = max(1, max_bytes // run_bytes(model, base, cells)) if rows_apart(model) else 1
    names = groupby(range(len(cells)), key=lambda index: cells[index].name)
    at_once = [list(group) for _, group in names]
    return [group[at : at + size] for group in at_once for at in range(0, len(group), size)]


def continued_logits(
    model: LoopedModel,
    base: Batch,
    groups: Sequence[Sequence[Cell]],
    source: Mapping[str, Tensor],
    n_loops: int,
) -> Iterator[Float[Tensor, "cell batch d_vocab"]]:
    """The logits at the readout of the base run as a cell, and then with each cell of a group
    patched, group by group.

    Args:
        groups: Cells of one hook point each, in the order of the schedule; those of one group are
            run side by side.
        source: The values that are put in, by hook name, with the whole batch.
    """
    yield model.readout(model.advance(begin_batch(model, base, n_loops)), base.readout)[None]
    by_name = {name: list(own) for name, own in groupby(groups, key=lambda group: group[0].name)}
    for name, before in _starts(model, base, n_loops, list(by_name)):
        for cells in by_name[name]:
            yield _continue(model, before, base, n_loops, cells, source)


def _starts(
    model: LoopedModel, base: Batch, n_loops: int, names: list[str]
) -> Iterator[tuple[str, State | None]]:
    """Each hook point with the base run's state right before it; None where it comes before the
    first state.
    """
    before, after = model.edge_sites()
    yield from ((name, None) for name in names if name in before)
    state = begin_batch(model, base, n_loops)
    for visit in model.schedule(n_loops):
        state = model.advance(state, visit.index)
        inside = set(visit.hook_names())
        yield from ((name, state) for name in names if name in inside)
    state = model.advance(state)
    yield from ((name, state) for name in names if name in after)


def _continue(
    model: LoopedModel,
    before: State | None,
    base: Batch,
    n_loops: int,
    cells: Sequence[Cell],
    source: Mapping[str, Tensor],
) -> Float[Tensor, "cell batch d_vocab"]:
    """Logits at the readout of the base run with each cell patched."""
    times = len(cells)
    columns = repeat(base.readout, "batch -> (cell batch)", cell=times)
    names = dict.fromkeys(name for cell in cells for name in cell.names)
    with model.hooks(
        [(name, partial(_put, name=name, cells=cells, source=source[name])) for name in names],
        n_loops=n_loops,
    ):
        if before is None:
            state = begin_batch(model, base.repeat(times), n_loops)
        else:
            state = before.map(lambda x: repeat(x, "batch ... -> (cell batch) ...", cell=times))
        logits = at_columns(model.readout(model.advance(state)), columns)
    by_cell: Tensor = logits.unflatten(0, (times, len(base)))
    return by_cell


def _put(
    value: Tensor, hook: HookPoint, name: str, cells: Sequence[Cell], source: Tensor
) -> Tensor:
    """The value with the part of each cell that patches this point taken from the source run."""
    head_axis = HEAD_AXIS.get(site_of(name))
    patched = rearrange(value.clone(), "(cell batch) ... -> cell batch ...", cell=len(cells))
    for row, cell in zip(patched, cells, strict=True):
        for column in cell.columns if name in cell.names else ():
            head = slice(None) if cell.head is None else cell.head
            index: tuple[slice | int, ...] = (slice(None), column)
            if head_axis is not None:
                index = (
                    (slice(None), column, head) if head_axis == 2 else (slice(None), head, column)
                )
            row[index] = source[index]
    flat: Tensor = rearrange(patched, "cell batch ... -> (cell batch) ...")
    return flat
