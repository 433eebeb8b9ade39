"""Activation patching: put activations of one run into another and see what becomes of the answer.

A sweep never runs again what a patch cannot reach (`interp.packed`). Where rows cannot be run side
by side, because the model is not causal or holds hooks of the caller's, whole runs are continued
instead (`interp.continued`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common.cells import Cell, Selection, Together, choose
from loopscope.interp.common.fingerprint import described, facts_of
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, begin_batch
from loopscope.interp.common.metrics import measure, metric_name
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import Picked, VisitNames, Where
from loopscope.interp.common.processes import Team, team
from loopscope.interp.patching.continued import continued_logits
from loopscope.interp.patching.grouped import Labels, checked_labels
from loopscope.interp.patching.packed import packable, packed_logits
from loopscope.interp.patching.sweep import Sweep, present
from loopscope.interp.patching.unfinished import Unfinished
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
    memory_gb: float = 0.1,
    save_to: str | Path | None = None,
) -> Sweep:
    """Patch every chosen cell on its own and measure the answer (arXiv 2604.07822, figures 11 and
    21).

    Under `accelerate launch` the cells are shared among the processes, and each returns the whole
    sweep.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or tokens
            with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, "
            batch"].
        n_loops: Iterations; None means what the checkpoint records.
        sites: Site names ("resid_pre", "z", "mlp_out", "pattern", "ln1.normalized", "state_in",
            "embed", ...).
        positions: Columns to patch, "all" for every one.
        heads: Heads to patch one by one at sites that have heads, "all" for every one; None patches
            all heads together.
        loops, layers: Restrict the sweep to iterations and layers, from 0; None means all. Each
            visit there has cells of its own, also where several visits share iteration and layer.
        visits: Restrict the sweep to visits by name or pattern, such as "loops.0.low.1.blocks.0" or
            "loops.*.low.*"; None means all.
        together: What is patched at once instead of one by one: "loops" (the site at all chosen
            iterations), "positions" (all chosen columns).
        window: Patch so many consecutive chosen iterations at once; a cell's loop is then the first
            of them.
        direction: "denoise" puts the clean activation into the corrupted run, "noise" the corrupted
            one into the clean run.
        also: More metrics of the same patched runs, by name; their sweeps are in `Sweep.also`.
        group_by: A label for each column, or for each row and column, such as the index of the
            relation or the distance in a graph; `Sweep.by_group` averages over the places of a
            label. None as a label leaves the place out.
        memory_gb: About how much memory the patched runs may take, in GiB; it decides how many run
            side by side.
        save_to: A file for partial results: a sweep that was interrupted and is called again goes
            on from there.

    Raises:
        KeyError: A site or a visit that this model does not have.
        ValueError: Inputs that do not match, a position, head, loop or layer out of range, or
            partial results of another sweep.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    if not memory_gb > 0:
        raise ValueError(f"memory_gb must be a size in GiB above 0, got {memory_gb}")
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
    facts = facts_of(model, cells, (base, source), (n_loops, direction, metrics))
    key = "" if save_to is None else described(facts)
    job = _Job(model, cells, base, n_loops, metrics, memory_gb, team(lambda: facts))
    values, unpatched = job.run(source, Unfinished(save_to, key, len(metrics), len(base)))
    shown = present(model, base, cells)
    low, high = unpatched if direction == "denoise" else reversed(unpatched)
    first, *others = (
        Sweep(
            tuple(cells),
            values[i],
            high[i],
            low[i],
            name,
            direction,
            present=shown,
            groups=group_by,
        )
        for i, name in enumerate(metrics)
    )
    return replace(first, also={sweep.metric: sweep for sweep in others})


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
    """A sweep to compute."""

    model: LoopedModel
    cells: list[Cell]
    base: Batch
    n_loops: int
    metrics: Mapping[str, Metric]
    memory_gb: float
    team: Team

    def run(
        self, source: Batch, unfinished: Unfinished
    ) -> tuple[Float[Tensor, "metric cell batch"], tuple[Tensor, Tensor]]:
        """The metrics of every cell, and those of the base and the source run; what was saved
        already is not computed again.
        """
        missing = self.team.share([i for i in range(len(self.cells)) if i not in unfinished.done])
        names = sorted({name for index in missing for name in self.cells[index].names})
        cache = self._activations(source, names) if names else {}
        state = self.model.advance(begin_batch(self.model, source, self.n_loops))
        logits = self.model.readout(
            state, source.readout
        )  # by the kernels of the base run, which caching may switch
        engine = packed_logits if packable(self.model, self.base) else continued_logits
        cells = [self.cells[index] for index in missing]
        patched = engine(self.model, self.base, cells, cache, self.n_loops, self.memory_gb)
        unpatched = self._measure(next(patched)), self._measure(logits)
        found: dict[int, Tensor] = {}
        short = len(missing) * len(self.base) < _BAR_FROM
        for index, row in zip(
            missing,
            tqdm(patched, desc="patching", leave=False, disable=short, total=len(missing)),
            strict=True,
        ):
            found[index] = self._measure(row)
            unfinished.add(index, found[index])
        everything = unfinished.done | self.team.gathered(found)
        unfinished.forget()
        return (
            torch.stack(
                [everything[index].to(logits.device) for index in range(len(self.cells))], dim=1
            ),
            unpatched,
        )

    def _activations(self, batch: Batch, names: list[str]) -> dict[str, Tensor]:
        run = self.model.run_with_cache(
            batch.tokens, n_loops=self.n_loops, mask=batch.mask, names_filter=names, **batch.options
        )
        return dict(run[1])

    def _measure(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "metric batch"]:
        return torch.stack([measure(metric, logits) for metric in self.metrics.values()])
