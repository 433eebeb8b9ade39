"""The search for a circuit by exact patching, and the exact effect of single edges: what estimates
are checked against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.masked import MAX_BYTES
from loopscope.interp.circuits.measured import Measured, masked_runs
from loopscope.interp.circuits.record import Circuit, CircuitCall
from loopscope.interp.circuits.selection import prune_circuit
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Pair
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel


@torch.no_grad()
@evaluated
def exact_scores(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    scores: Circuit,
    metric: Metric | Literal["kl"],
    *,
    readout: ReadoutColumn = None,
    max_bytes: int = MAX_BYTES,
) -> Circuit:
    """Measure the effect of single edges exactly, by one patch for each.

    The effect of an edge is how far the metric of the clean run falls if the edge alone carries its
    writer's output in the corrupted run. Many edges are measured side by side.

    Args:
        model, clean, corrupted, metric, readout: The pair of inputs and the metric, as
            `circuit_scores` describes them.
        scores: The edges to measure, such as all those that `circuit_scores` returns.
        max_bytes: About how many bytes the runs may take at a time; it decides how many run side by
            side.

    Returns:
        The same edges. The score of each is its effect in the metric's unit, a mean over the batch.

    Raises:
        ValueError: There is no edge, or `evaluate_circuit` would refuse the call.
    """
    if not scores.edges:
        raise ValueError("at least one edge is needed to be measured, got none")
    job = _Search.of(model, Pair.of(model, clean, corrupted, readout), scores, metric, max_bytes)
    chosen = job.graph.mask(scores.edges)
    falls = job.measured.whole.mean() - job.without_each(chosen)
    return job.circuit(chosen, falls, {"replace": "corrupted"}, scores.call.selection)


@torch.no_grad()
@evaluated
def search_circuit(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    scores: Circuit,
    metric: Metric | Literal["kl"],
    threshold: float,
    *,
    readout: ReadoutColumn = None,
    together: int = 16,
    max_bytes: int = MAX_BYTES,
) -> Circuit:
    """Find a circuit by exact patching (ACDC): exclude each edge whose exclusion hardly changes the
    metric.

    The search goes from the readout backwards. An edge that changes the metric by less than the
    threshold is excluded for good. One run tries the next `together` edges, excluded one after the
    other, and stops at the first that must stay. So the result is that of one run per edge.

    Args:
        model, clean, corrupted, metric, readout: The pair of inputs and the metric, as
            `circuit_scores` describes them.
        scores: The edges to begin with, such as all those that `circuit_scores` returns.
        threshold: An edge is excluded if the metric's mean over the batch changes by less than this
            number, in the metric's unit.
        together: How many edges one run tries.
        max_bytes: About how many bytes the runs may take at a time; it decides how many run side by
            side.

    Returns:
        The circuit, pruned. The score of an edge is the change of the metric when the edge was
        tried.

    Raises:
        ValueError: The threshold is below 0, or `evaluate_circuit` would refuse the call.

    Source:
        Conmy et al. 2023 (arXiv 2304.14997), algorithm 1 (ACDC).
    """
    threshold = checked_number(threshold, "threshold", least=0, infinite=True)
    together = checked_count(together, "together")
    job = _Search.of(model, Pair.of(model, clean, corrupted, readout), scores, metric, max_bytes)
    kept, falls = job.backwards(job.graph.mask(scores.edges), threshold, together)
    settings: dict[str, str | float] = {"replace": "corrupted", "threshold": threshold}
    found = job.circuit(kept, falls[kept], settings, f"exact search, threshold {threshold:g}")
    return prune_circuit(found)


@dataclass(frozen=True)
class _Search:
    """Exact runs of one model on one pair of inputs."""

    graph: Graph
    measured: Measured
    checkpoint: str | None

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        pair: Pair,
        scores: Circuit,
        metric: Metric | Literal["kl"],
        max_bytes: int,
    ) -> _Search:
        runs = masked_runs(model, pair, [scores], "corrupted", 0, max_bytes)
        return cls(runs.graph, Measured.of(runs, pair, metric), scores.call.checkpoint)

    def without_each(self, chosen: Bool[Tensor, "reader writer span"]) -> Float[Tensor, " edge"]:
        """The metric's mean without one edge, for each edge of a mask."""
        numbers, found = chosen.nonzero(), []
        with tqdm(total=len(numbers), desc="exact scores", leave=False, delay=2) as bar:
            for part in numbers.split(self.measured.runs.side_by_side):
                masks = self.graph.every.repeat(len(part), 1, 1, 1)
                masks[(torch.arange(len(part), device="cpu"), *part.unbind(1))] = False
                found.append(self.measured.values(masks).mean(1))
                bar.update(len(part))
        return torch.cat(found)

    def backwards(
        self, kept: Bool[Tensor, "reader writer span"], threshold: float, together: int
    ) -> tuple[Bool[Tensor, "reader writer span"], Float[Tensor, "reader writer span"]]:
        """The edges that stay, and the change of the metric when each was tried."""
        value = self.measured.values(kept[None]).mean()
        scores = kept.new_zeros(kept.shape, dtype=value.dtype)
        order = kept.nonzero().flip(0)
        done = 0
        with tqdm(total=len(order), desc="exact search", leave=False, delay=2) as bar:
            while done < len(order):
                tried = order[done : done + together]
                masks = kept.repeat(len(tried), 1, 1, 1)
                for number, (reader, writer, span) in enumerate(tried.tolist()):
                    masks[number:, reader, writer, span] = False
                values = self.measured.values(masks).mean(1)
                falls = torch.cat([value[None], values[:-1]]) - values
                stays = (falls.abs() >= threshold).nonzero()
                count = int(stays[0]) + 1 if len(stays) else len(tried)
                scores[tried[:count].unbind(1)] = falls[:count].to(scores)
                out = tried[: count - 1] if len(stays) else tried
                kept[out.unbind(1)] = False
                value = values[len(out) - 1] if len(out) else value
                done += count
                bar.update(count)
        return kept, scores

    def circuit(
        self,
        kept: Bool[Tensor, "reader writer span"],
        scores: Float[Tensor, " edge"],
        settings: dict[str, str | float],
        selection: str,
    ) -> Circuit:
        """The record of some edges."""
        graph, measured = self.graph, self.measured
        ends = (measured.whole.mean().item(), measured.replaced.mean().item())
        name = metric_name(measured.metric)
        call = CircuitCall("exact", name, *ends, None, dict(settings), selection, self.checkpoint)
        return Circuit(
            graph.chosen(kept),
            tuple(scores.tolist()),
            call,
            graph.n_loops,
            graph.schedule,
            graph.n_edges,
            graph.positions,
        )


def compare_scores(
    estimate: Circuit, exact: Circuit, sizes: tuple[int, ...] = (10, 30, 100)
) -> pd.DataFrame:
    """Compare two scorings of the same edges, such as an estimate with exact scores.

    Args:
        estimate, exact: The same edges with two scores.
        sizes: How many edges of largest absolute score to compare; one row of the table for each
            number.

    Returns:
        A table with one row per size. Its columns are edges (the size), overlap (the share of the
        top edges that both scorings have in common) and rank correlation (Spearman's, of the
        absolute scores of all edges).

    Raises:
        ValueError: The two do not have the same edges, there is no edge, or a size is below 1.
    """
    if estimate.edges != exact.edges:
        raise ValueError(
            f"two scorings of the same edges are needed, got {len(estimate)} and {len(exact)} edges"
            " that are not the same"
        )
    sizes = tuple(checked_count(size, "a size") for size in sizes)
    if not len(exact) or not sizes:
        raise ValueError(
            f"scorings are compared by the top edges, at least one, of some; got sizes {sizes} of"
            f" {len(exact)} edges"
        )
    frame = pd.DataFrame({"estimate": estimate.scores, "exact": exact.scores}).abs()
    correlation = frame["estimate"].rank().corr(frame["exact"].rank())
    rows = []
    for size in sorted({min(size, len(frame)) for size in sizes}):
        first, second = (set(frame[side].nlargest(size).index) for side in frame)
        rows.append((size, len(first & second) / size, correlation))
    return pd.DataFrame(rows, columns=["edges", "overlap", "rank correlation"])
