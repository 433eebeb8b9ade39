"""The results of a patching sweep, with its statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.cells import Cell, columns_of
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.pairs import Direction
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.patching.grouped import GroupedEffects, Labels, grouped
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_AXES = attrgetter("loop", "layer", "position", "head")
_TOGETHER = 1024  # cells whose resamples are held at a time


class Interval(NamedTuple):
    """A confidence interval for each cell, on the scale of `Sweep.normalized`.

    Attributes:
        low, high: Float[Tensor, " cell"], the two ends.
    """

    low: Float[Tensor, " cell"]
    high: Float[Tensor, " cell"]


@dataclass(frozen=True)
class Grid(OneScreen):
    """The cells of one site as a tensor with one axis per coordinate.

    Attributes:
        values: Float[Tensor, "loop layer position head"], NaN if the sweep has no such cell.
        loops, layers, positions, heads: The coordinate of each index; a single None if the site or
            the sweep has no such axis.
    """

    values: Float[Tensor, "loop layer position head"]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    positions: tuple[int | None, ...]
    heads: tuple[int | None, ...]


@dataclass(frozen=True)
class Sweep(OneScreen):
    """The metric of every patch of a sweep.

    Attributes:
        cells: The place of each patch, in the order in which the places run.
        values: Float[Tensor, "cell batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        also: The sweeps of other metrics of the same runs, by name.
        present: Bool[Tensor, "cell batch"], False if an example does not have the cell's place,
            because the column is padding or comes after the answer position. None if all examples
            have all places. Means are over the examples that have the place.
        groups: A label for each column, or for each example and column; None if none was given.
    """

    cells: tuple[Cell, ...]
    values: Float[Tensor, "cell batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str
    direction: Direction
    also: Mapping[str, Sweep] = field(default_factory=dict)
    present: Bool[Tensor, "cell batch"] | None = None
    groups: Labels | None = None

    def examples(self) -> Int[Tensor, " cell"]:
        """How many examples have the place of each cell."""
        return self._present().sum(1)

    def mean(self, values: Float[Tensor, "cell batch"] | None = None) -> Float[Tensor, " cell"]:
        """The mean of each cell over the examples that have its place; NaN if no example has it.

        Args:
            values: The numbers to average; None means the metric of the patched runs.
        """
        shown = self._present()
        kept = torch.where(shown, self.values if values is None else values, 0.0)
        return kept.sum(1) / shown.sum(1)

    def normalized(self) -> Float[Tensor, " cell"]:
        """The normalised effect of each cell: the mean metric on a scale where 0 is the corrupted
        run and 1 the clean run. Only examples that have the cell's place count.

        Raises:
            ValueError: Both runs have the same mean metric, so there is no scale.
        """
        self._require_scale()
        whole = (self.clean - self.corrupted).expand_as(self.values)
        return self.mean(self.values - self.corrupted) / self.mean(whole)

    def standard_error(self) -> Float[Tensor, " cell"]:
        """The standard error of each cell's mean metric over the examples, in the metric's unit;
        NaN for a single example.
        """
        off, count = (self.values - self.mean()[:, None]) ** 2, self.examples()
        spread = torch.where(self._present(), off, 0.0).sum(1) / (count - 1).clamp(min=0)
        return (spread / count).sqrt()

    def bootstrap(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
        """Percentile intervals of `normalized`, from examples drawn again with replacement.

        Pairs stay together. A draw in which the clean and the corrupted mean are equal is left out.

        Args:
            level: The share of the draws inside the interval, between 0 and 1.
            resamples: The number of draws.
            seed: The seed of the draws.

        Raises:
            ValueError: The level is outside 0 to 1, there is one example only, or there is no
                scale.
        """
        self._check_bootstrap(level, resamples)
        drawn = _drawn(self.values.shape[1], resamples, seed).to(self.values)
        edges = self.values.new_tensor([(1 - level) / 2, (1 + level) / 2])
        effect, whole = self.values - self.corrupted, self.clean - self.corrupted
        shown = self._present().to(self.values)
        found = []
        for part, own in zip(effect.split(_TOGETHER), shown.split(_TOGETHER), strict=True):
            ratio = drawn @ (part * own).T / (drawn @ (whole * own).T)
            finite = ratio.masked_fill(~ratio.isfinite(), torch.nan)
            found.append(finite.nanquantile(edges, dim=0))
        low, high = torch.cat(found, dim=1)
        return Interval(low, high)

    def _check_bootstrap(self, level: float, resamples: int) -> None:
        checked_number(level, "level", above=0, below=1)
        checked_count(resamples, "resamples")
        if self.values.shape[1] < 2:
            raise ValueError(
                "an interval needs at least two examples, but this sweep has one example"
            )
        self._require_scale()

    def by_group(
        self,
        labels: Labels | None = None,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> GroupedEffects:
        """The mean effect of all places that share a label, with percentile intervals over
        examples.

        Args:
            labels: One label per column, or for each example a list of labels, such as the index of
                the relation or the distance in a graph. The label None leaves a place out. Without
                `labels`, those of `activation_patch(..., group_by=)` are used.
            level, resamples, seed: The intervals, as `bootstrap` describes them.

        Raises:
            ValueError: There are no labels, not one per column or per example and column, or a cell
                has several columns; or `bootstrap` would refuse the call.
        """
        labels = self.groups if labels is None else labels
        if labels is None:
            raise ValueError(
                "effects by group need labels; pass them here, or as group_by= of the sweep"
            )
        self._check_bootstrap(level, resamples)
        values = widened(self.values)
        drawn = _drawn(values.shape[1], resamples, seed).to(values)
        shown = self._present().to(values)
        effect, whole = values - self.corrupted, (self.clean - self.corrupted) * shown
        return grouped(self.cells, (effect * shown, whole, shown), labels, drawn, level)

    def frame(self) -> pd.DataFrame:
        """One row per cell. The columns are site, visit, loop, layer, position, head, metric (its
        name), value (a mean over the examples that have the place), standard_error and examples
        (how many have the place). The rows of `also` follow below.
        """
        rows = [
            (cell.site, cell.visit, cell.loop, cell.layer, cell.position, cell.head)
            for cell in self.cells
        ]
        columns = ["site", "visit", "loop", "layer", "position", "head"]
        frame = pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:], "Int64"))
        frame["metric"] = self.metric
        frame["value"] = widened(self.mean()).cpu().numpy()
        frame["standard_error"] = widened(self.standard_error()).cpu().numpy()
        frame["examples"] = self.examples().cpu().numpy()
        return pd.concat(
            [frame, *(sweep.frame() for sweep in self.also.values())], ignore_index=True
        )

    def grid(self, site: str | None = None, *, normalized: bool = True) -> Grid:
        """The cells of one site as a tensor with the axes loop, layer, position and head.

        Args:
            site: The site, as `frame` names it; None if the sweep has only one.
            normalized: True gives the values of `normalized`, False the mean metric.

        Raises:
            ValueError: The sweep has no such site, or it has several and none is named.
        """
        site = self._one_site(site)
        values = self.normalized() if normalized else self.mean()
        chosen = [i for i, cell in enumerate(self.cells) if cell.site == site]
        places = [_AXES(self.cells[i]) for i in chosen]
        axes = [_sorted(set(axis)) for axis in zip(*places, strict=True)]
        table = values.new_full(tuple(map(len, axes)), torch.nan)
        for i, place in zip(chosen, places, strict=True):
            table[tuple(map(tuple.index, axes, place))] = values[i]
        return Grid(table, *axes)

    def _one_site(self, site: str | None) -> str:
        sites = list(dict.fromkeys(cell.site for cell in self.cells))
        found = sites[0] if site is None and len(sites) == 1 else site
        if found not in sites:
            raise ValueError(
                f"this sweep has the sites {', '.join(sites)}; name one of them, got {site!r}"
            )
        return found

    def _present(self) -> Bool[Tensor, "cell batch"]:
        if self.present is None:
            return torch.ones_like(self.values, dtype=torch.bool)
        return self.present

    def _require_scale(self) -> None:
        low, high = self.corrupted.mean(), self.clean.mean()
        if low == high:
            raise ValueError(
                f"the clean and the corrupted run have the same mean {self.metric} ({high:.4g}), so"
                " effects have no scale"
            )

    def plot(self, site: str | None = None, title: str = "") -> go.Figure:
        """A picture: for each site a map of visits by positions or heads, on the scale of
        `normalized` if the two runs differ.

        Args:
            site: The site to draw; None draws all of them.
            title: The title of the figure; empty for none.
        """
        from loopscope.interp.drawing.effects import sweep

        return sweep(self, site, title)


def present(model: LoopedModel, batch: Batch, cells: Sequence[Cell]) -> Bool[Tensor, "cell batch"]:
    """Whether each example has a cell's place: one of its columns holds a token or is read, and in
    a causal model does not come after the readout.
    """
    has = used_columns(batch)
    if model.causal:
        has &= torch.arange(has.shape[1], device=has.device) <= batch.readout[:, None]
    patched = columns_of(cells, batch.tokens.shape[1]).to(has.device)
    return (patched.float() @ has.float().T) > 0


def _drawn(count: int, resamples: int, seed: int) -> Int[Tensor, "resample example"]:
    """How often each example is drawn in each resample."""
    generator = seeded(seed)
    draws = torch.randint(count, (resamples, count), generator=generator, device="cpu")
    return torch.stack([draw.bincount(minlength=count) for draw in draws])


def _sorted(values: set[int | None]) -> tuple[int | None, ...]:
    return tuple(sorted(values, key=lambda value: (value is not None, value or 0)))
