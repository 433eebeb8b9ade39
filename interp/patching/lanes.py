"""Lanes: patched copies of single examples, and the run that they all start from.

A *lane* is one patched copy of one example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.cells import Cell, columns_of
from loopscope.interp.common.inputs import begin_batch
from loopscope.models.basis.tokens import Batch
from loopscope.models.check import check_attends
from loopscope.models.core.attention import KeyValueStore
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State

BEFORE = -1  # joins before the first visit


@dataclass(frozen=True)
class Lanes:
    """Lanes in the order in which they join, and their rows.

    Attributes:
        cell, example: Int[Tensor, " lane"], which patch of which example.
        start, stop: Int[Tensor, " lane"], its first column and its readout.
        visit: Int[Tensor, " lane"], where it joins: -1 before the first visit, the schedule's
            length after the last.
    """

    cell: Int[Tensor, " lane"]
    example: Int[Tensor, " lane"]
    start: Int[Tensor, " lane"]
    stop: Int[Tensor, " lane"]
    visit: Int[Tensor, " lane"]

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, lanes: slice | Tensor) -> Lanes:
        return Lanes(
            *(x[lanes] for x in (self.cell, self.example, self.start, self.stop, self.visit))
        )

    @property
    def lengths(self) -> Int[Tensor, " lane"]:
        """Rows of each lane."""
        return self.stop - self.start + 1

    @property
    def offsets(self) -> Int[Tensor, " lane"]:
        """The first row of each lane among all rows."""
        return self.lengths.cumsum(0) - self.lengths


@dataclass(frozen=True)
class BaseRun:
    """The run that patches change, kept for every lane to start from.

    Attributes:
        model: The model.
        batch: The inputs.
        states: The state before each visit at which a lane can join.
        end: The state after the last visit.
        store: Keys and values of every visit.
        logits: Float[Tensor, "batch d_vocab"] at the readout.
    """

    model: LoopedModel
    batch: Batch
    states: Mapping[int, State]
    end: State
    store: KeyValueStore
    logits: Float[Tensor, "batch d_vocab"]

    @classmethod
    def of(cls, model: LoopedModel, batch: Batch, n_loops: int, joins: set[int]) -> BaseRun:
        """Run once and keep the states at `joins`."""
        state = begin_batch(model, batch, n_loops)
        states: dict[int, State] = {0: state}
        store: KeyValueStore = {}
        for index in sorted(joins - {BEFORE}):
            state = model.advance(state, index, store=store)
            states[index] = state
        end = model.advance(state, store=store)
        check_attends(model, store, n_loops)
        return cls(model, batch, states, end, store, model.readout(end, batch.readout))


def lanes_of(model: LoopedModel, batch: Batch, cells: Sequence[Cell], n_loops: int) -> Lanes:
    """The lanes of all cells that can reach an example's answer, in the order in which they join;
    those that join together are in the order of their examples.
    """
    joins = _joins(model, n_loops)
    last = len(model.schedule(n_loops))
    of_cells = [[joins[cell.name], min(cell.columns)] for cell in cells]
    visit, first = torch.tensor(of_cells, dtype=torch.int64, device="cpu").view(-1, 2, 1).unbind(1)
    stop = batch.readout.cpu()[None, :].expand(len(cells), -1)
    read = columns_of(cells, batch.tokens.shape[1])[:, batch.readout.cpu()]
    reached = torch.where(visit == last, read, first <= stop)
    start = torch.where(visit == last, stop, first.expand_as(stop))
    counts = (torch.arange(size, device="cpu") for size in stop.shape)
    cell, example = torch.meshgrid(*counts, indexing="ij")
    kept = [x.expand_as(stop)[reached] for x in (cell, example, start, stop, visit)]
    order = (kept[4] * len(batch) + kept[1]).argsort(stable=True)
    return Lanes(*(x[order].to(batch.tokens.device) for x in kept))


def _joins(model: LoopedModel, n_loops: int) -> dict[str, int]:
    """The visit at which a patch of each hook point joins."""
    schedule = model.schedule(n_loops)
    before, after = model.edge_sites()
    found = dict.fromkeys(before, BEFORE) | dict.fromkeys(after, len(schedule))
    return found | {name: visit.index for visit in schedule for name in visit.hook_names()}
