"""Effects of a sweep by a label of the place: the relation's index, the distance in a graph, the
row of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.cells import Cell
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen

if TYPE_CHECKING:
    import plotly.graph_objects as go

Label = str | int | float
Labels = (
    Sequence[Label | None]
    | Sequence[Sequence[Label | None]]
    | Sequence[Tensor]
    | Sequence[np.ndarray]
    | Tensor
    | np.ndarray
)
Key = tuple[str, str, int | None, int | None, int | None]
Terms = tuple[Float[Tensor, "cell batch"], Float[Tensor, "cell batch"], Float[Tensor, "cell batch"]]


@dataclass(frozen=True)
class GroupedEffects(OneScreen):
    """The mean effect of all places that share a site, a visit, a head and a label.

    Effects are on a scale where 0 is the corrupted run and 1 the clean run of the same examples.
    Each place of each example counts once.

    Attributes:
        keys: Site, visit, loop, layer and head of each group.
        labels: The label of each group.
        value: Float[Tensor, " group"], the mean effect.
        low, high: Float[Tensor, " group"], the ends of its interval over examples.
        places: Int[Tensor, " group"], how many pairs of an example and a position are averaged.
    """

    keys: tuple[Key, ...]
    labels: tuple[Label, ...]
    value: Float[Tensor, " group"]
    low: Float[Tensor, " group"]
    high: Float[Tensor, " group"]
    places: Int[Tensor, " group"]

    def frame(self) -> pd.DataFrame:
        """One row per group. The columns are site, visit, loop, layer, head, group (the label),
        value, low, high and places.
        """
        frame = pd.DataFrame(self.keys, columns=["site", "visit", "loop", "layer", "head"])
        frame = frame.astype(dict.fromkeys(("loop", "layer", "head"), "Int64"))
        numbers = {name: getattr(self, name) for name in ("value", "low", "high")}
        return frame.assign(
            group=list(self.labels),
            **{name: widened(x).cpu().numpy() for name, x in numbers.items()},
            places=self.places.cpu().numpy(),
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the effect of each label over visits, with its interval."""
        from loopscope.interp.drawing.effects import by_group

        return by_group(self, title)


def grouped(
    cells: Sequence[Cell],
    terms: Terms,
    labels: Labels,
    drawn: Float[Tensor, "resample batch"],
    level: float,
) -> GroupedEffects:
    """Average the effects of a sweep over the places of each label; a label that no example has a
    place for is left out.

    Args:
        cells: Of the sweep, each with one column.
        terms: For each cell and example the effect, the clean minus the corrupted metric, and 1;
            all of them 0 where the example has no such place.
        labels: As for `Sweep.by_group`.
        drawn: How often each example is drawn in each resample.
        level: Of the interval.
    """
    count = drawn.shape[1]
    if any(cell.position is None for cell in cells):
        raise ValueError(
            "effects by group need cells of one column each, but this sweep patches several"
            " together; leave positions out of together="
        )
    width = 1 + max((cell.position for cell in cells if cell.position is not None), default=0)
    table = checked_labels(labels, (count, width))
    members: dict[tuple[Key, Label], dict[int, list[int]]] = {}
    for i, cell in enumerate(cells):
        key = (cell.site, cell.visit, cell.loop, cell.layer, cell.head)
        assert cell.position is not None, "cells of several columns are refused above"
        for row, own in enumerate(table):
            label = own[cell.position]
            if label is not None:
                members.setdefault((key, label), {}).setdefault(i, []).append(row)
    sums = {group: _sums(terms, cells_of) for group, cells_of in members.items()}
    sums = {group: own for group, own in sums.items() if own[2].any()}
    if not sums:
        raise ValueError("no place of this sweep has a label other than None")
    edges = drawn.new_tensor([(1 - level) / 2, (1 + level) / 2])
    values, ends, places = [], [], []
    for effect, whole, shown in sums.values():
        values.append(effect.sum() / whole.sum())
        shares = (drawn @ effect) / (drawn @ whole)
        shares = shares.masked_fill(~shares.isfinite(), torch.nan)  # draws without any difference
        ends.append(shares.nanquantile(edges))
        places.append(shown.sum().long())
    keys, names = zip(*sums, strict=True)
    low, high = torch.stack(ends, dim=1)
    return GroupedEffects(keys, names, torch.stack(values), low, high, torch.stack(places))


def _sums(terms: Terms, rows: dict[int, list[int]]) -> list[Float[Tensor, " batch"]]:
    """Each term summed over the cells of a group, example by example."""
    member = terms[0].new_zeros(len(rows), terms[0].shape[1])
    for i, own in enumerate(rows.values()):
        member[i, own] = 1.0
    chosen = list(rows)
    return [(term.expand(len(terms[0]), -1)[chosen] * member).sum(0) for term in terms]


def checked_labels(labels: Labels, shape: tuple[int, ...]) -> list[list[Label | None]]:
    """The label of every example and column, of a batch of a shape of at least these columns.

    Raises:
        ValueError: Not one label per column, or per example and column.
    """
    rows, columns = shape
    given = plain_labels(labels)
    lists: list[list[Label | None]] = [
        list(row) for row in given if isinstance(row, Sequence) and not isinstance(row, str)
    ]
    table: list[list[Label | None]] = lists or [given] * rows
    short = min((len(row) for row in table), default=0)
    if len(table) != rows or short < columns:
        raise ValueError(
            "labels must be one per column, or one list of them per example: there are"
            f" {rows} examples and {columns} columns, got {len(table)} rows of at least"
            f" {short} labels"
        )
    return table


def plain_labels(labels: Labels) -> list[Any]:
    """Labels, or lists of them, as values of Python.

    Raises:
        TypeError: A label that is no word, number or None.
    """
    return [_plain(label) for label in labels]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if not isinstance(value, str | int | float | None):
        raise TypeError(f"a label must be a word, a number or None, got {value!r}")
    return value
