"""What a patching sweep found, with its statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.cells import Cell
from loopscope.interp.common.pairs import Direction


class Interval(NamedTuple):
    """A confidence interval for each cell.

    Attributes:
        low, high: Float[Tensor, " cell"].
    """

    low: Float[Tensor, " cell"]
    high: Float[Tensor, " cell"]


@dataclass(frozen=True)
class Grid:
    """The cells of one site on named axes.

    Attributes:
        values: Float[Tensor, "loop layer position head"], NaN where the sweep has no such cell.
        loops, layers, positions, heads: What each index stands for; a single None where the site or
            the sweep has no such axis.
    """

    values: Float[Tensor, "loop layer position head"]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    positions: tuple[int | None, ...]
    heads: tuple[int | None, ...]


@dataclass(frozen=True)
class Sweep:
    """The metric for every patch.

    Attributes:
        cells: One per patch, in the order of the schedule.
        values: Float[Tensor, "cell batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        also: Sweeps of other metrics of the same runs, by name.
    """

    cells: tuple[Cell, ...]
    values: Float[Tensor, "cell batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str
    direction: Direction
    also: Mapping[str, Sweep] = field(default_factory=dict)

    def normalized(self) -> Float[Tensor, " cell"]:
        """Mean over the batch, on the scale where 0 is the corrupted run and 1 the clean one.

        Raises:
            ValueError: Both runs have the same mean metric, so there is no scale.
        """
        low, high = self._scale()
        share: Tensor = (self.values.mean(1) - low) / (high - low)
        return share

    def standard_error(self) -> Float[Tensor, " cell"]:
        """Standard error over the batch of the mean metric, in the metric's unit; NaN for a single
        example.
        """
        if self.values.shape[1] < 2:
            return torch.full_like(self.values[:, 0], torch.nan)
        error: Tensor = self.values.std(1) / self.values.shape[1] ** 0.5
        return error

    def bootstrap(self, level: float = 0.95, resamples: int = 1000, seed: int = 0) -> Interval:
        """Percentile intervals of `normalized`, over examples drawn again with replacement (pairs
        stay together).

        Raises:
            ValueError: A level outside 0 to 1, or no scale.
        """
        if not 0.0 < level < 1.0 or resamples < 1:
            raise ValueError(
                f"level is between 0 and 1 and resamples at least 1, got {level} and {resamples}"
            )
        self._scale()
        count = self.values.shape[1]
        generator = torch.Generator().manual_seed(seed)
        weights = torch.nn.functional.one_hot(
            torch.randint(count, (resamples, count), generator=generator), count
        ).sum(1)
        weights = weights.to(self.values) / count
        low, high = weights @ self.corrupted, weights @ self.clean
        drawn = (weights @ self.values.T - low[:, None]) / (high - low)[:, None]
        edges = drawn.nanquantile(torch.tensor([(1 - level) / 2, (1 + level) / 2]).to(drawn), dim=0)
        return Interval(edges[0], edges[1])

    def frame(self) -> pd.DataFrame:
        """One row per cell: site, loop, layer, position, head, metric, value (mean over the batch),
        standard_error; `also` below.
        """
        rows = [(cell.site, cell.loop, cell.layer, cell.position, cell.head) for cell in self.cells]
        frame = pd.DataFrame(rows, columns=["site", "loop", "layer", "position", "head"])
        frame["metric"] = self.metric
        frame["value"] = self.values.mean(1).cpu().numpy()
        frame["standard_error"] = self.standard_error().cpu().numpy()
        frame = frame.astype({column: "Int64" for column in ("loop", "layer", "position", "head")})
        return pd.concat(
            [frame, *(sweep.frame() for sweep in self.also.values())], ignore_index=True
        )

    def grid(self, site: str | None = None, *, normalized: bool = True) -> Grid:
        """The cells of one site on named axes.

        Args:
            site: As in `frame`; None where the sweep has only one.
            normalized: Values as `normalized` gives them, or the mean metric.

        Raises:
            ValueError: The sweep has no such site, or several and none is named.
        """
        sites = list(dict.fromkeys(cell.site for cell in self.cells))
        if site not in sites and (site is not None or len(sites) > 1):
            raise ValueError(
                f"this sweep has the sites {', '.join(sites)}; name one of them, got {site!r}"
            )
        values = self.normalized() if normalized else self.values.mean(1)
        chosen = [
            (cell, value)
            for cell, value in zip(self.cells, values, strict=True)
            if site in (None, cell.site)
        ]
        axes = [
            _sorted({getattr(cell, axis) for cell, _ in chosen})
            for axis in ("loop", "layer", "position", "head")
        ]
        table = values.new_full(tuple(map(len, axes)), torch.nan)
        for cell, value in chosen:
            place = (cell.loop, cell.layer, cell.position, cell.head)
            table[tuple(axis.index(at) for axis, at in zip(axes, place, strict=True))] = value
        return Grid(table, axes[0], axes[1], axes[2], axes[3])

    def _scale(self) -> tuple[Tensor, Tensor]:
        low, high = self.corrupted.mean(), self.clean.mean()
        if low == high:
            raise ValueError(
                f"the clean and the corrupted run have the same mean {self.metric} ({high:.4g}), so"
                " effects have no scale"
            )
        return low, high


def _sorted(values: set[int | None]) -> tuple[int | None, ...]:
    return tuple(sorted(values, key=lambda value: (value is not None, value or 0)))
