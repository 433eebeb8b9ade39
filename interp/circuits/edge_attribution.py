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
    """One end of an edge: a component of one iteration that writes or reads.

    Attributes:
        kind: "embed", "attn" or "mlp" for a writer; "attn", "mlp" or "final" (the final norm) for a
            reader. Outside the loop the stage stands in front ("prelude.mlp").
        loop, layer: The iteration and the block, from 0; None for a component without one.
    """

    kind: str
    loop: int | None
    layer: int | None


class EndPair(NamedTuple):
    """An edge: a component that writes, and a later component that reads its output."""

    writer: ComponentEnd
    reader: ComponentEnd


@dataclass(frozen=True)
class EdgeAttribution(OneScreen):
    """The estimated effect of every edge, within one visit or between two.

    Attributes:
        edges: The edges, sorted by reader in the order in which the readers run.
        by_position: Float[Tensor, "edge batch pos"], the effect on the metric of replacing the
            writer's output at one position.
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
        """The effect of each edge, in the metric's unit: the sum over positions."""
        return self.by_position.sum(-1)

    def frame(self) -> pd.DataFrame:
        """One row per edge. The columns are writer, writer_loop, writer_layer, reader, reader_loop,
        reader_layer and value (in the metric's unit, a mean over the batch).
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
    """Estimate how much each edge between two components matters, from gradients: edge attribution
    patching.

    Writers are the token embedding and every attention and MLP of every iteration. Readers are all
    later attentions and MLPs, and the final norm. The effect of an edge is that of giving the
    reader alone the writer's clean output. Its first-order estimate is (clean - corrupted output of
    the writer) times the gradient of the corrupted run, taken through the reader but not through
    the residual stream beside it.

    All edges that cross one place of the residual stream sum to the estimate of `attribution_patch`
    for that place. Position embeddings have no edges, because they are the same in both runs.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or token
            ids.
        readout: For token ids, the column at which answers are read.
        metric: A function from the logits at the answer position, Float[Tensor, "batch d_vocab"],
            to one number per row, such as `logit_diff(right, wrong)`.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        The effect of each edge.

    Raises:
        ValueError: The residual stream is not a plain sum of component outputs, or the two inputs
            have different shapes.

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
