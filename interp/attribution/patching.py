"""Attribution patching: first-order estimates of patches, from two forward passes and one backward
pass.

`attribution_patch` estimates what `interp.patching.activation_patch` measures, cell by cell.
`edge_attribution` splits such an estimate by who wrote a change into the residual stream and who
reads it, across iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.direct_logit import check_sum, component_kind, require_additive
from loopscope.interp.attribution.gradients import gradients, logits_read
from loopscope.interp.common.cells import HEAD_AXIS, Cell, Selection, choose
from loopscope.interp.common.collecting import keeping
from loopscope.interp.common.inputs import (
    Inputs,
    Metric,
    ReadoutColumn,
    begin_batch,
    runs_side_by_side,
)
from loopscope.interp.common.metrics import measure, metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import Picked, VisitNames, Where
from loopscope.interp.common.precision import widened
from loopscope.interp.patching.sweep import Sweep, present
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.state import Visit, checked_loops
from loopscope.models.core.tokens import Batch

Values = dict[str, Tensor]
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_WRITTEN = ("hook_attn_out", "hook_mlp_out")


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
) -> Sweep:
    """Estimate every cell of `activation_patch`: (source - base activation) times the metric's
    gradient, summed over the cell.

    Args:
        clean, corrupted, metric, n_loops, sites, positions, heads, loops, layers, visits,
            direction, readout: As for `activation_patch`.
        steps: 0 takes the gradient of the base run. More average the gradients at the midpoints of
            this many parts of the straight line from the base to the source activation (integrated
            gradients), a hook point being moved along its line at all positions at once; every hook
            point then needs runs of its own.
        batch_size: Rows run side by side with steps.

    Returns:
        The record of `activation_patch`; a value is the base run's metric plus the estimated
        effect. Where rows depend on each other, a row's effect is that of its own activation on the
        metrics of all rows.

    Raises:
        KeyError: A site or a visit that this model does not have.
        ValueError: Inputs that do not match, a place out of range, or a negative number of steps.

    Source:
        Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"; Sundararajan et
        al. 2017 (arXiv 1703.01365), equation 1, at one site as in Marks et al. 2024 (arXiv
        2403.19647).
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    if steps < 0:
        raise ValueError(
            "steps must be 0 (one gradient, at the base run) or the number of parts of the line,"
            f" got {steps}"
        )
    pair = Pair.of(model, clean, corrupted, readout)
    base, source = base_and_source(direction, pair.clean, pair.corrupted)
    selection = Selection(
        sites=sites, where=Where(loops, layers, visits), positions=positions, heads=heads
    )
    cells = choose(model, n_loops, base.tokens.shape[1], selection)
    names = list(dict.fromkeys(cell.name for cell in cells))
    source_values, source_metric = _activations(model, source, metric, names, n_loops)
    base_values, grads, base_metric = _gradients(model, base, metric, names, n_loops)
    together = runs_side_by_side(model, base, batch_size)
    shares = (
        ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).split(together) if steps else ()
    )
    effects: Values = {}
    for name in tqdm(names, desc="attribution", leave=False, disable=len(shares) * len(names) < 16):
        change, grad = _change(source_values[name], base_values[name]), grads[name]
        if shares:
            grad = _line_gradient(
                model, base, metric, name, (base_values[name], change), n_loops, shares
            )
        effects[name] = _by_place(widened(change) * widened(grad), name)
    values = base_metric + torch.stack([_of_cell(effects[cell.name], cell) for cell in cells])
    unpatched = (
        (source_metric, base_metric) if direction == "denoise" else (base_metric, source_metric)
    )
    shown = present(model, base, cells)
    return Sweep(tuple(cells), values, *unpatched, metric_name(metric), direction, present=shown)


class End(NamedTuple):
    """One end of an edge.

    Attributes:
        kind: "embed", "attn" or "mlp" for a writer; "attn", "mlp" or "final" (the final norm) for a
            reader; outside the loop with its stage in front ("prelude.mlp").
        loop, layer: Where it is; None where it has no such coordinate.
    """

    kind: str
    loop: int | None
    layer: int | None


class Edge(NamedTuple):
    """A component's output as one later component reads it."""

    writer: End
    reader: End


@dataclass(frozen=True)
class EdgeAttribution:
    """The first-order effect of every edge between two visits, or within one.

    Attributes:
        edges: By reader, in the order in which they run.
        by_position: Float[Tensor, "edge batch pos"], the effect of the change that the writer makes
            at one position.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs.
        metric: The metric's name.
    """

    edges: tuple[Edge, ...]
    by_position: Float[Tensor, "edge batch pos"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str

    @property
    def values(self) -> Float[Tensor, "edge batch"]:
        """The effect of each edge: the sum over positions."""
        return self.by_position.sum(-1)

    def frame(self) -> pd.DataFrame:
        """One row per edge: writer, writer_loop, writer_layer, reader, reader_loop, reader_layer,
        value (mean over the batch).
        """
        sides = [
            f"{side}{part}" for side in ("writer", "reader") for part in ("", "_loop", "_layer")
        ]
        frame = pd.DataFrame([(*edge.writer, *edge.reader) for edge in self.edges], columns=sides)
        frame["value"] = self.values.mean(1).cpu().numpy()
        return frame.astype({side: "Int64" for side in sides if "_" in side})


@differentiated
def edge_attribution(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> EdgeAttribution:
    """The first-order effect of giving one component alone the clean output of one earlier
    component, for all such pairs.

    Writers are the token embedding and every attention and MLP of every iteration; readers are
    every later attention and MLP, and the final norm. An edge's value is (clean - corrupted output
    of the writer) times the corrupted run's gradient through the reader alone, not through the
    residual stream beside it. The edges that cross any one place of the residual stream sum to the
    estimate that `attribution_patch` gives for that place. Position embeddings are the same in both
    runs, so they have no edges.

    Args:
        clean, corrupted, metric, n_loops, readout: As for `activation_patch`; clean outputs are put
            into the corrupted run.

    Raises:
        ValueError: A model whose residual stream is no sum of component outputs, or inputs that do
            not match.

    Source:
        Syed et al. 2023 (arXiv 2310.10348), edge attribution patching.
    """
    require_additive(model, "edge_attribution")
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    pair = Pair.of(model, clean, corrupted, readout)
    base, source = pair.corrupted, pair.clean
    visits, before = model.schedule(n_loops), model.edge_sites()[0]
    _require_stream(visits)
    written = [*before, *(f"{visit.name}.{site}" for visit in visits for site in _WRITTEN)]
    stream = [f"{visit.name}.{site}" for visit in visits for site in _RESIDUAL]
    source_values, source_metric = _activations(model, source, metric, written, n_loops)
    base_values, grads, base_metric = _gradients(model, base, metric, [*written, *stream], n_loops)
    check_sum(
        torch.stack([widened(base_values[name]) for name in written]),
        widened(base_values[stream[-1]]),
        "the residual stream",
        base_values[stream[-1]].dtype,
    )
    changes = {name: widened(source_values[name] - base_values[name]) for name in written}
    writers = [
        (End(name.removeprefix("hook_"), None, None), changes[name])
        for name in before
        if name != "hook_pos_embed"
    ]
    edges, values = _edges(visits, grads, changes, writers)
    return EdgeAttribution(edges, values, source_metric, base_metric, metric_name(metric))


def _edges(
    visits: Sequence[Visit], grads: Values, changes: Values, writers: list[tuple[End, Tensor]]
) -> tuple[tuple[Edge, ...], Float[Tensor, "edge batch pos"]]:
    """Every edge with its effect at each position.

    Args:
        grads: Gradients of the base run at the residual stream, by hook name.
        changes: What each component writes in the source run minus the base run, by hook name.
        writers: The writers before the first visit with their changes.
    """
    edges: list[Edge] = []
    values: list[Tensor] = []
    last = f"{visits[-1].name}.{_RESIDUAL[-1]}"
    writers = list(writers)
    for visit in tqdm([*visits, None], desc="edges", leave=False, disable=len(visits) < 64):
        for reader, grad, written_next in _readers(visit, grads, last):
            earlier = torch.stack([change for _, change in writers])
            edges += [Edge(writer, reader) for writer, _ in writers]
            sums = "writer batch pos d_model, batch pos d_model -> writer batch pos"
            values.append(einsum(earlier, widened(grad), sums))
            if written_next is not None:
                writers.append((reader, changes[written_next]))
    return tuple(edges), torch.cat(values)


def _readers(visit: Visit | None, grads: Values, last: str) -> list[tuple[End, Tensor, str | None]]:
    """The readers of a visit with the gradient through each alone and what it writes; None stands
    for the end of the run.

    What flows past a branch is the gradient of the stream after it, so the branch's own is the
    difference across it.
    """
    if visit is None:
        return [(End("final", None, None), grads[last], None)]
    pre, mid, post = (grads[f"{visit.name}.{site}"] for site in _RESIDUAL)
    attn, mlp = (
        End(component_kind(visit, what), visit.loop, visit.layer) for what in ("attn", "mlp")
    )
    attn_out, mlp_out = (f"{visit.name}.{site}" for site in _WRITTEN)
    return [(attn, pre - mid, attn_out), (mlp, mid - post, mlp_out)]


def _require_stream(visits: Sequence[Visit]) -> None:
    for visit in visits:
        for site in (*_RESIDUAL, *_WRITTEN):
            if site not in visit.sites:
                raise ValueError(
                    f"every block must have the site {site!r} to tell its readers apart, but"
                    f" {visit.name} has none"
                )


@torch.no_grad()
def _activations(
    model: LoopedModel, batch: Batch, metric: Metric, names: Sequence[str], n_loops: int
) -> tuple[Values, Float[Tensor, " batch"]]:
    """Activations of a run, and its metric."""
    with keeping(model, names, n_loops) as seen:
        state = model.advance(begin_batch(model, batch, n_loops))
        return seen, measure(metric, logits_read(model, state, batch.readout))


def _gradients(
    model: LoopedModel, batch: Batch, metric: Metric, names: Sequence[str], n_loops: int
) -> tuple[Values, Values, Float[Tensor, " batch"]]:
    """Activations of a run, the metric's gradients, and the metric."""
    measured: list[Tensor] = []

    def remembered(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        value = measure(metric, logits)
        measured.append(value.detach())
        return value

    values, grads = gradients(model, batch, remembered, list(names), n_loops)
    return dict(values), dict(grads), measured[0]


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
            grad = _gradients(
                model, packed, partial(_side_by_side, metric, len(base)), [name], n_loops
            )[1][name]
        total = total + grad.view(len(part), *start.shape).sum(0)
    return total / sum(map(len, shares))


def _side_by_side(
    metric: Metric, size: int, logits: Float[Tensor, "row d_vocab"]
) -> Float[Tensor, " row"]:
    return torch.cat([measure(metric, part) for part in logits.split(size)])


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
