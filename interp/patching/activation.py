"""Activation patching: put activations of one run into another and see what becomes of the answer.

A sweep never runs again what a patch cannot reach (`interp.packed`). Where rows cannot be run side
by side, because the model is not causal or holds hooks of the caller's, whole runs are continued
instead (`interp.continued`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.cells import Cell, Selection, Together, choose
from loopscope.interp.common.collecting import keeping
from loopscope.interp.common.fingerprint import facts_of
from loopscope.interp.common.inputs import (
    Inputs,
    Metric,
    ReadoutColumn,
    begin_batch,
)
from loopscope.interp.common.metrics import measure_each, metric_name
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import Picked, VisitNames, Where
from loopscope.interp.common.processes import Team, team
from loopscope.interp.patching.continued import continued_groups, continued_logits
from loopscope.interp.patching.grouped import Labels, checked_labels
from loopscope.interp.patching.kept import sweep_manifest, sweep_of
from loopscope.interp.patching.packed import packable, packed_groups, packed_logits
from loopscope.interp.patching.sweep import Sweep, present
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import in_pieces, run_items
from loopscope.interp.shards.share import Shard, checked_shard
from loopscope.interp.shards.work import Results, on_device
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

_BAR_FROM = 4000  # cells times examples below which no progress is shown


@torch.no_grad()
@evaluated
def activation_patch(
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
    together: Together | Sequence[Together] = (),
    window: int | None = None,
    direction: Direction = "denoise",
    also: Mapping[str, Metric] | None = None,
    group_by: Labels | None = None,
    readout: ReadoutColumn = None,
    max_bytes: int = 100 << 20,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> Sweep:
    """Patch activations of one run into another, one place at a time, and measure the answer.

    Each patch is a *cell*: one site at one iteration, block, position and, if wanted, head. Under
    `accelerate launch` the processes share the cells, and each returns the whole sweep.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or token
            ids.
        readout: For token ids, the column at which answers are read.
        metric: A function from the logits at the answer position, Float[Tensor, "batch d_vocab"],
            to one number per row, such as `logit_diff(right, wrong)`.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        sites: The sites to patch, such as "resid_pre", "z", "mlp_out", "pattern", "ln1.normalized",
            "state_in" or "embed".
        positions: The columns to patch; "all" for every one.
        heads: The heads to patch one by one, at sites that have heads; "all" for every one. None
            patches all heads together.
        loops, layers: The iterations and the blocks to patch, from 0; None means all. If several
            visits share both, each has cells of its own.
        visits: The visits to patch, by name or pattern, such as "loops.0.low.1.blocks.0" or
            "loops.*.low.*"; None means all.
        together: What one patch covers at once: "loops" for the site at all chosen iterations,
            "positions" for all chosen columns.
        window: How many consecutive chosen iterations one patch covers; the loop of the cell is the
            first of them. None means one.
        direction: "denoise" puts clean activations into the corrupted run, "noise" puts corrupted
            ones into the clean run.
        also: More metrics of the same patched runs, by name; their sweeps are in `Sweep.also`.
        group_by: A label for each column, or for each row and column, such as the index of the
            relation or the distance in a graph. `Sweep.by_group` averages over the places of one
            label; the label None leaves a place out.
        max_bytes: How much memory the patched runs may take, in bytes; it decides how many run side
            by side, at least one. The two runs without a patch need memory besides: for the keys,
            values and residual stream of every visit, and for the activations that are patched in.
        save_to: A folder that keeps results. If the call was interrupted, the same call goes on
            from there. `merge` joins the results of all shards.
        shard: (i, n) patches the i-th of n shares of the cells; None patches all.

    Returns:
        The metric of every cell; for a shard only that of its cells.

    Raises:
        KeyError: The model does not have a site or a visit.
        ValueError: The two inputs have different shapes, a position, head, loop or layer is out of
            range, or the folder holds results of another call.

    Source:
        Figures 11 and 21 of arXiv 2604.07822.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    max_bytes = checked_count(max_bytes, "max_bytes")
    pair = Pair.of(model, clean, corrupted, readout)
    base, source = base_and_source(direction, pair.clean, pair.corrupted)
    selection = Selection(
        sites=sites,
        where=Where(loops, layers, visits),
        positions=positions,
        heads=heads,
        together=together,
        window=window,
    )
    cells = choose(model, n_loops, base.tokens.shape[1], selection)
    if group_by is not None:
        checked_labels(group_by, tuple(base.tokens.shape))
    metrics = _named(metric, also or {})
    options = (n_loops, direction, metrics)
    job = _Job(model, cells, base, source, n_loops, metrics, max_bytes)
    ours = (
        Team()
        if in_pieces(save_to, shard)
        else team(lambda: facts_of(model, cells, (base, source), options))
    )
    if ours.size > 1:
        common, found = job.shared(ours)
        return sweep_of(cells, list(metrics), direction, common, found, group_by)
    groups = job.groups

    def manifest() -> Manifest:
        settings = {"n_loops": n_loops, "max_bytes": max_bytes}
        return sweep_manifest(
            "activation_patch", model, pair, cells, groups, metrics, settings, direction, group_by
        )

    items, common, found = run_items(
        len(groups), checked_shard(shard), job.compute, save_to, manifest
    )
    mine = [index for item in items for index in groups[item]]
    device = base.tokens.device
    here = on_device({**common, "present": common["present"][mine]}, device)
    results = [on_device(each, device) for each in found]
    own = [cells[index] for index in mine]
    return sweep_of(own, list(metrics), direction, here, results, group_by)


def _named(metric: Metric, also: Mapping[str, Metric]) -> dict[str, Metric]:
    name = metric_name(metric)
    if name in also:
        raise ValueError(
            f"each metric needs a name of its own, but the first one is called {name!r} and `also`"
            " has one of that name"
        )
    return {name: metric, **also}


@dataclass(frozen=True)
class _Job:
    """A sweep to compute, in groups of cells that are run side by side."""

    model: LoopedModel
    cells: list[Cell]
    base: Batch
    source: Batch
    n_loops: int
    metrics: Mapping[str, Metric]
    max_bytes: int

    @cached_property
    def groups(self) -> list[list[int]]:
        """The cells, by their index, of each group."""
        if packable(self.model, self.base):
            return packed_groups(self.model, self.base, self.cells, self.n_loops, self.max_bytes)
        return continued_groups(self.model, self.base, self.cells, self.max_bytes)

    def compute(self, items: list[int]) -> tuple[Results, Iterator[Results]]:
        """The metrics of the two runs without a patch, and of some groups of cells."""
        groups = [[self.cells[index] for index in self.groups[item]] for item in items]
        # of all cells, since what is cached may change how a visit is computed
        names = sorted({name for cell in self.cells for name in cell.names}) if items else []
        cache = self._activations(names) if names else {}
        state = self.model.advance(begin_batch(self.model, self.source, self.n_loops))
        logits = self.model.readout(
            state, self.source.readout
        )  # by the kernels of the base run, which caching may switch
        patched = self._patched(groups, cache)
        common = {
            "base": self._measure(next(patched))[:, 0],
            "source": self._measure(logits[None])[:, 0],
            "present": present(self.model, self.base, self.cells),
        }
        return common, self._rows(groups, patched)

    def shared(self, ours: Team) -> tuple[Results, list[Results]]:
        """All cells, of which each process of a team computes its share."""
        mine = ours.share(list(range(len(self.cells))))
        part = replace(self, cells=[self.cells[index] for index in mine])
        common, found = part.compute(list(range(len(part.groups))))
        values = torch.cat([each["values"] for each in found], dim=1).unbind(1)
        everything = ours.gathered(dict(zip(mine, values, strict=True)))
        device = self.base.tokens.device
        whole = [everything[index].to(device)[:, None] for index in range(len(self.cells))]
        common["present"] = present(self.model, self.base, self.cells)
        return common, [{"values": torch.cat(whole, dim=1)}]

    def _patched(
        self, groups: Sequence[Sequence[Cell]], cache: Mapping[str, Tensor]
    ) -> Iterator[Float[Tensor, "cell batch d_vocab"]]:
        """Logits of the base run, and of the patched ones of each group."""
        given = self.model, self.base, groups, cache, self.n_loops
        if packable(self.model, self.base):
            return packed_logits(*given, self.max_bytes)
        return continued_logits(*given)

    def _rows(
        self, groups: Sequence[Sequence[Cell]], patched: Iterator[Tensor]
    ) -> Iterator[Results]:
        """The metrics of each group."""
        total = sum(map(len, groups))
        short = total * len(self.base) < _BAR_FROM
        with tqdm(desc="patching", leave=False, disable=short, total=total) as bar:
            for logits in patched:
                bar.update(len(logits))
                yield {"values": self._measure(logits)}

    def _activations(self, names: list[str]) -> dict[str, Tensor]:
        with keeping(self.model, names, self.n_loops) as values:
            state = self.model.advance(begin_batch(self.model, self.source, self.n_loops))
            if set(names) & set(self.model.edge_sites()[1]):
                self.model.readout(state)  # at every position, which takes memory for all logits
        return values

    def _measure(
        self, logits: Float[Tensor, "cell batch d_vocab"]
    ) -> Float[Tensor, "metric cell batch"]:
        return torch.stack([measure_each(metric, logits) for metric in self.metrics.values()])
