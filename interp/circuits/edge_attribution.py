"""Edge attribution: a first-order estimate split by the component that wrote a change into the
residual stream and the component that reads it, across iterations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.attribution.direct_logit import require_additive
from loopscope.interp.attribution.gradients import activations_with_metric, gradients_with_metric
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.gradients import by_stage, check_stream, last_stream, sites_of
from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.names import end_of
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.pairs import Pair
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


class ComponentEnd(NamedTuple):
    """One end of an edge.

    Attributes:
        kind: "embed", "attn" or "mlp" for a writer; "attn", "mlp" or "final" (the final norm) for a
            reader; outside the loop with its stage in front ("prelude.mlp").
        loop, layer: Where it is; None where it has no such coordinate.
    """

    kind: str
    loop: int | None
    layer: int | None


class EndPair(NamedTuple):
    """A component's output as one later component reads it."""

    writer: ComponentEnd
    reader: ComponentEnd


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

    edges: tuple[EndPair, ...]
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
    graph = graph_of(model, pair.clean, n_loops, heads=False)
    last, before = last_stream(model, n_loops), model.edge_sites()[0]
    written = [*before, *(stage.added for stage in graph.stages)]
    source, source_metric = activations_with_metric(model, pair.clean, metric, written, n_loops)
    names = dict.fromkeys([*written, *sites_of(graph.stages), last])
    base, grads, base_metric = gradients_with_metric(
        model, pair.corrupted, metric, list(names), n_loops
    )
    check_stream(base, written, last)
    read = ["hook_embed", *(stage.added for stage in graph.stages)]
    change = torch.stack([widened(source[name] - base[name]) for name in read])
    values = [
        einsum(
            through[0],
            change[: number + 1],
            "batch pos d_model, edge batch pos d_model -> edge batch pos",
        )
        for number, _, _, through in by_stage(graph, base, grads, last)
    ]
    edges = tuple(EndPair(*(_end(name, graph) for name in edge)) for edge in graph.edges)
    return EdgeAttribution(
        edges, torch.cat(values), source_metric, base_metric, metric_name(metric)
    )


def _end(name: str, graph: Graph) -> ComponentEnd:
    """A node by its coordinates."""
    place = {place.name: place for place in graph.schedule}.get(end_of(name).visit)
    if place is None:
        return ComponentEnd(name, None, None)
    kind = end_of(name).component
    stage = place.name.partition(".")[0]
    return ComponentEnd(
        kind if place.loop is not None else f"{stage}.{kind}", place.loop, place.layer
    )
