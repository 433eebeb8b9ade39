"""Edge attribution: a first-order estimate split by the component that wrote a change into the
residual stream and the component that reads it, across iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.attribution.direct_logit import check_sum, component_kind, require_additive
from loopscope.interp.attribution.gradients import activations_with_metric, gradients_with_metric
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.pairs import Pair
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

Values = dict[str, Tensor]
_RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_WRITTEN = ("hook_attn_out", "hook_mlp_out")


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
class EdgeAttribution(OneScreen):
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

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the effect of each edge, readers by writers."""
        from loopscope.interp.drawing.effects import edges

        return edges(self, title)


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
    source_values, source_metric = activations_with_metric(model, source, metric, written, n_loops)
    base_values, grads, base_metric = gradients_with_metric(
        model, base, metric, [*written, *stream], n_loops
    )
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
