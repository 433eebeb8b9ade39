"""Attribution patching: first-order estimates of patches, from two forward passes and one backward
pass.

`attribution_patch` estimates the values that `activation_patch` measures, cell by cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.gradients import activations_with_metric, gradients_with_metric
from loopscope.interp.common.cells import HEAD_AXIS, Cell, Selection, choose
from loopscope.interp.common.inputs import (
    Inputs,
    Metric,
    ReadoutColumn,
    checked_batch_size,
    runs_side_by_side,
)
from loopscope.interp.common.metrics import metric_name, row_by_row
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import Picked, VisitNames, Where
from loopscope.interp.common.precision import widened
from loopscope.interp.patching.kept import sweep_manifest, sweep_of
from loopscope.interp.patching.sweep import Sweep, present
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import run_items
from loopscope.interp.shards.share import Shard, checked_shard
from loopscope.interp.shards.work import Results, on_device
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.state import checked_loops

Values = dict[str, Tensor]


@differentiated
def attribution_patch(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    n_loops: int | None = None,
    *,
    sites: str | Sequence[str] = ("resid_pre",),
    positions: Picked | int = "all",
    heads: Picked | int | None = None,
    loops: Picked | int | None = None,
    layers: Picked | int | None = None,
    visits: VisitNames | None = None,
    direction: Direction = "denoise",
    readout: ReadoutColumn = None,
    steps: int = 0,
    batch_size: int = 256,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Sweep:
    """Estimate all values of a patching sweep from a few gradients, without running the patches.

    The estimate of a cell is a first-order one: (source activation - base activation) times the
    metric's gradient, summed over the cell. The base is the run that `activation_patch` would
    patch, and the source is the run from which it would take the activation.

    Args:
        clean, corrupted, metric, n_loops, readout: The pair of inputs, the metric and the run, as
            `activation_patch` describes them.
        sites, positions, heads, loops, layers, visits, direction: The cells, and which run is the
            base, as `activation_patch` describes them.
        steps: 0 takes the gradient in the base run. A larger number averages the gradients over so
            many points on the straight line from the base to the source activation (integrated
            gradients); the points are the midpoints of equal parts. All positions of a hook point
            move along the line together, and every hook point needs runs of its own.
        batch_size: How many rows run side by side, if `steps` is not 0.
        save_to, shard: The folder of a divided call, as `activation_patch` describes it. The cells
            of one hook point are computed together.

    Returns:
        The record of `activation_patch`. Each value is the base run's metric plus the estimated
        effect. If the rows of a batch depend on each other, the effect in a row is that of its own
        activation on the metrics of all rows.

    Raises:
        KeyError: The model does not have a site or a visit.
        ValueError: The two inputs have different shapes, a place is out of range, or `steps` is
            negative.

    Source:
        Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"; Sundararajan et
        al. 2017 (arXiv 1703.01365), equation 1, at one site as in Marks et al. 2024
        (arXiv 2403.19647).
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    steps = checked_count(steps, "steps", least=0)
    batch_size = checked_batch_size(batch_size)
    pair = Pair.of(model, clean, corrupted, readout)
    base, source = base_and_source(direction, pair.clean, pair.corrupted)
    selection = Selection(
        sites=sites, where=Where(loops, layers, visits), positions=positions, heads=heads
    )
    cells = choose(model, n_loops, base.tokens.shape[1], selection)
    job = _Estimates(model, base, source, metric, n_loops, cells, steps, batch_size)

    def manifest() -> Manifest:
        settings = {"n_loops": n_loops, "steps": steps, "batch_size": batch_size}
        named = {metric_name(metric): metric}
        return sweep_manifest(
            "attribution_patch", model, pair, cells, job.items, named, settings, direction
        )

    items, common, found = run_items(
        len(job.items), checked_shard(shard), job.compute, save_to, manifest
    )
    mine = [index for item in items for index in job.items[item]]
    device = base.tokens.device
    here = on_device({**common, "present": common["present"][mine]}, device)
    values = [on_device(each, device) for each in found]
    own = [cells[index] for index in mine]
    return sweep_of(own, [metric_name(metric)], direction, here, values)


@dataclass(frozen=True)
class _Estimates:
    """The estimates of some cells, hook point by hook point."""

    model: LoopedModel
    base: Batch
    source: Batch
    metric: Metric
    n_loops: int
    cells: list[Cell]
    steps: int
    batch_size: int

    @cached_property
    def items(self) -> list[list[int]]:
        """The cells, by their index, of each hook point."""
        found: dict[str, list[int]] = {}
        for index, cell in enumerate(self.cells):
            found.setdefault(cell.name, []).append(index)
        return list(found.values())

    def compute(self, items: list[int]) -> tuple[Results, Iterator[Results]]:
        """The metric of the two runs, and the values at some hook points."""
        names = list(dict.fromkeys(cell.name for cell in self.cells))
        given = self.metric, names, self.n_loops
        source, source_metric = activations_with_metric(self.model, self.source, *given)
        base, grads, base_metric = gradients_with_metric(self.model, self.base, *given)
        common = {
            "source": source_metric[None],
            "base": base_metric[None],
            "present": present(self.model, self.base, self.cells),
        }
        return common, self._values(items, source, base, grads, base_metric)

    def _values(
        self, items: list[int], source: Values, base: Values, grads: Values, start: Tensor
    ) -> Iterator[Results]:
        """The base run's metric plus the effects, hook point by hook point."""
        shares = self._shares()
        quiet = len(shares) * len(items) < 16
        for item in tqdm(items, desc="attribution", leave=False, disable=quiet):
            cells = [self.cells[index] for index in self.items[item]]
            name = cells[0].name
            change, grad = _change(source[name], base[name]), grads[name]
            if shares:
                line = base[name], change
                grad = _line_gradient(
                    self.model, self.base, self.metric, name, line, self.n_loops, shares
                )
            effects = _by_place(widened(change) * widened(grad), name)
            yield {"values": (start + torch.stack([_of_cell(effects, c) for c in cells]))[None]}

    def _shares(self) -> list[Tensor]:
        """The midpoints of the parts of the line, as many at a time as run side by side."""
        if not self.steps:
            return []
        together = runs_side_by_side(self.model, self.base, self.batch_size)
        middle = (torch.arange(self.steps, dtype=torch.float64, device="cpu") + 0.5) / self.steps
        return list(middle.split(together))


def _line_gradient(
    model: LoopedModel,
    base: Batch,
    metric: Metric,
    name: str,
    line: tuple[Tensor, Tensor],
    n_loops: int,
    shares: Sequence[Tensor],
) -> Tensor:
    """The mean gradient at some shares of a line, which is given by its start and the change along
    it; those of one tensor are run side by side."""
    start, change = line
    total = torch.zeros_like(start)
    for part in shares:
        packed = base.repeat(len(part))
        to = torch.cat([start + share * change for share in part.to(start)])
        with model.hooks([(name, partial(_move, to=to))], n_loops=n_loops):
            grad = gradients_with_metric(
                model, packed, partial(row_by_row, metric, len(base)), [name], n_loops
            )[1][name]
        total = total + grad.view(len(part), *start.shape).sum(0)
    return total / sum(map(len, shares))


def _move(value: Tensor, hook: HookPoint, to: Tensor) -> Tensor:
    return to


def _change(source: Tensor, base: Tensor) -> Tensor:
    """The difference of two activations; 0 where both are -inf, which is what a score is where a
    key is not seen.
    """
    return torch.where(source == base, torch.zeros_like(base), source - base)


def _by_place(effect: Tensor, name: str) -> Float[Tensor, "batch pos head"]:
    """The effects of one hook point summed over what a cell never splits; one head where the site
    has none.
    """
    head_axis = HEAD_AXIS.get(site_of(name))
    kept = 2 if head_axis is None else 3
    summed = effect.reshape(*effect.shape[:kept], -1).sum(-1)
    if head_axis is None:
        return summed[..., None]
    return summed.transpose(1, 2) if head_axis == 1 else summed


def _of_cell(effects: Float[Tensor, "batch pos head"], cell: Cell) -> Float[Tensor, " batch"]:
    at_positions = effects[:, list(cell.columns)].sum(1)
    return at_positions.sum(-1) if cell.head is None else at_positions[:, cell.head]
