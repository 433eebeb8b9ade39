"""How much of the answer a circuit keeps, and how much is left without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from itertools import chain
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.masked import MAX_BYTES, Replace
from loopscope.interp.circuits.measured import Measured, masked_runs, share_kept
from loopscope.interp.circuits.names import end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Pair
from loopscope.interp.common.shown import OneScreen
from loopscope.models.core.base import LoopedModel


@dataclass(frozen=True)
class Faithfulness(OneScreen):
    """Runs with everything outside a circuit replaced, and with the circuit itself replaced.

    Attributes:
        edges: Int[Tensor, " circuit"], how many edges each circuit has.
        weights: Int[Tensor, " circuit"], how many weights its components have; a block that acts in
            several iterations counts once.
        n_edges, n_weights: Of the whole graph.
        values: Float[Tensor, "circuit batch"], the metric with only the circuit's edges kept.
        complements: Float[Tensor, "circuit batch"], with all edges but the circuit's kept.
        whole, replaced: Float[Tensor, " batch"], with all edges kept and with none.
        least_loss: Float[Tensor, " circuit"], the smallest loss of faithfulness when one node of
            the circuit is taken out; None where it was not measured.
        metric: The metric's name.
        replace: What excluded edges carry.
    """

    edges: Int[Tensor, " circuit"]
    weights: Int[Tensor, " circuit"]
    n_edges: int
    n_weights: int
    values: Float[Tensor, "circuit batch"]
    complements: Float[Tensor, "circuit batch"]
    whole: Float[Tensor, " batch"]
    replaced: Float[Tensor, " batch"]
    least_loss: Float[Tensor, " circuit"] | None
    metric: str
    replace: Replace

    @property
    def faithfulness(self) -> Float[Tensor, " circuit"]:
        """The share of the metric's mean difference between the whole model and the replaced one
        that each circuit keeps: 1 for the whole model.
        """
        return self._share(self.values)

    @property
    def completeness(self) -> Float[Tensor, " circuit"]:
        """The share that is left without the circuit: 0 for a circuit that has everything."""
        return self._share(self.complements)

    @property
    def cpr(self) -> float:
        """The area under faithfulness over the share of edges, by trapezoids from 0 to 1 through
        the measured sizes, the empty circuit and the whole model.

        Source:
            Mueller et al. 2025 (arXiv 2504.13151), the integrated circuit performance ratio.
        """
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """The area between faithfulness and 1, in the same way.

        Source:
            Mueller et al. 2025 (arXiv 2504.13151), the integrated circuit-model distance.
        """
        return self._area((1 - self.faithfulness).abs(), empty=1.0, whole=0.0)

    def frame(self) -> pd.DataFrame:
        """One row per circuit: edges, edge_share, weights, weight_share, value, faithfulness,
        completeness, least_loss (missing where it was not measured).
        """
        columns: dict[str, Any] = {
            "edges": self.edges,
            "edge_share": self.edges.double() / self.n_edges,
            "weights": self.weights,
            "weight_share": self.weights.double() / self.n_weights,
            "value": self.values.mean(1),
            "faithfulness": self.faithfulness,
            "completeness": self.completeness,
        }
        frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        return frame.assign(
            least_loss=None if self.least_loss is None else self.least_loss.tolist()
        )

    def _share(self, values: Float[Tensor, "circuit batch"]) -> Float[Tensor, " circuit"]:
        return share_kept(values, self.whole, self.replaced)

    def _area(self, heights: Tensor, empty: float = 0.0, whole: float = 1.0) -> float:
        order = self.edges.argsort(stable=True)
        share = self.edges[order].to(heights) / self.n_edges
        ends = heights.new_tensor([[0.0, 1.0], [empty, whole]])
        x = torch.cat([ends[0, :1], share, ends[0, 1:]])
        return float(torch.trapezoid(torch.cat([ends[1, :1], heights[order], ends[1, 1:]]), x))


@torch.no_grad()
@evaluated
def evaluate_circuit(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    circuits: Circuit | Sequence[Circuit],
    metric: Metric | Literal["kl"],
    *,
    replace: Replace = "corrupted",
    minimality: bool = False,
    seed: int = 0,
    readout: ReadoutColumn = None,
    max_bytes: int = MAX_BYTES,
) -> Faithfulness:
    """Run a model on the clean inputs with every edge outside a circuit replaced, and with every
    edge of the circuit replaced.

    Along an excluded edge the reader is given, in place of what the writer adds in this run, what
    it adds in the replacing run; norms, injections and all else between are computed as they are.
    Many circuits run side by side.

    Args:
        clean, corrupted, metric, readout: As for `circuit_scores`.
        circuits: One or several of this model, all with the same iterations.
        replace: What excluded edges carry: "corrupted" the run of the corrupted inputs; "mean" its
            mean over the batch at each position; "zero" nothing; "resample" the run of another
            corrupted input.
        minimality: Also take out each node of each circuit, one run per node.
        seed: Of the order in which inputs are resampled.
        max_bytes: About how many bytes the runs may take; it decides how many run side by
            side.

    Raises:
        ValueError: Inputs that do not match, circuits of another model or of several lengths, a
            model whose stream is not made of what its attentions and MLPs add, or a metric that
            does not tell the whole model from the replaced one.

    Source:
        Wang et al. 2022 (arXiv 2211.00593), section 4, the three criteria; Hanna et al. 2024 (arXiv
        2403.17806), the normalised faithfulness of edges.
    """
    chosen = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    pair = Pair.of(model, clean, corrupted, readout)
    runs = masked_runs(model, pair, chosen, replace, seed, max_bytes)
    graph = runs.graph
    numbers = [graph.numbers(circuit.edges) for circuit in chosen]
    measured = Measured.of(runs, pair, metric)
    values = measured.values(_both(graph, numbers), 2 * len(chosen))
    sizes = [_weights(graph, circuit) for circuit in chosen]
    found = Faithfulness(
        torch.tensor(list(map(len, chosen)), device="cpu"),
        torch.tensor(sizes, device="cpu"),
        graph.n_edges,
        _weights(graph, None),
        values[::2],
        values[1::2],
        measured.whole,
        measured.replaced,
        None,
        metric_name(measured.metric),
        replace,
    )
    share_kept(found.values, found.whole, found.replaced)
    return _with_least_loss(found, measured, chosen) if minimality else found


def _both(
    graph: Graph, circuits: Sequence[Int[Tensor, "_ 3"]]
) -> Iterator[Bool[Tensor, "reader writer span"]]:
    """The mask of each circuit, followed by that of all other edges.

    Args:
        circuits: The numbers of each circuit's edges.
    """
    for numbers in circuits:
        mask = graph.marked(numbers)
        yield mask
        yield graph.every & ~mask


@torch.no_grad()
@evaluated
def shares_of(
    model: LoopedModel,
    pair: Pair,
    scores: Circuit,
    metric: Metric,
    kept: Sequence[Sequence[int]],
    left: Sequence[Sequence[int]] = (),
    max_bytes: int = MAX_BYTES,
) -> tuple[Float[Tensor, " kept"], Float[Tensor, " left"]]:
    """The shares that many circuits keep, and those that are left without some, as
    `evaluate_circuit` measures them with excluded edges "corrupted".

    Args:
        scores: All edges.
        kept, left: The numbers of each circuit's edges.
        model, pair, metric, max_bytes: As for `evaluate_circuit`.

    Raises:
        ValueError: As for `evaluate_circuit`.
    """
    measured = Measured.of(
        masked_runs(model, pair, [scores], "corrupted", 0, max_bytes), pair, metric
    )
    graph = measured.runs.graph
    numbers = graph.numbers(scores.edges)
    masks = chain(
        (graph.marked(numbers[list(each)]) for each in kept),
        (graph.every & ~graph.marked(numbers[list(each)]) for each in left),
    )
    found = measured.shares(masks, len(kept) + len(left))
    return found[: len(kept)], found[len(kept) :]


def _with_least_loss(
    found: Faithfulness, measured: Measured, circuits: Sequence[Circuit]
) -> Faithfulness:
    """The record with the smallest loss when one node is taken out of each circuit."""
    losses = []
    for circuit, whole in zip(circuits, found.faithfulness, strict=True):
        nodes = [node for node in circuit.nodes if end_of(node).visit]
        without = (
            measured.runs.graph.mask(circuit.edges[number] for number in circuit.away_from(node))
            for node in nodes
        )
        left = measured.shares(without, len(nodes)) if nodes else whole[None]
        losses.append((whole - left).min())
    return replace_field(found, least_loss=torch.stack(losses))


def _weights(graph: Graph, circuit: Circuit | None) -> int:
    """The weights of a circuit's attentions, heads and MLPs; None for those of all."""
    nodes = graph.writers if circuit is None else circuit.nodes
    visits = {stage.visit.name: stage.visit for stage in graph.stages}
    counted: dict[tuple[int, str], int] = {}
    for node in nodes:
        end = end_of(node)
        if not end.visit or "-" in end.component:
            continue
        module: Any = getattr(visits[end.visit].block, end.component.partition(".")[0])
        size = sum(weight.numel() for weight in module.parameters())
        shared = len(module.W_Q) if "." in end.component else 1
        counted[id(module), end.component] = size // shared
    return sum(counted.values())
