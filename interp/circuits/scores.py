"""Edge scores: the first-order effect of every edge between components of all iterations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.attribution.gradients import gradients_with_metric
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.gates import gate_scores
from loopscope.interp.circuits.gradients import (
    Skeleton,
    Written,
    by_stage,
    integrated_readout,
    last_stream,
    sites_of,
)
from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.masked import MAX_BYTES, MaskedRuns
from loopscope.interp.circuits.measured import check_whole
from loopscope.interp.circuits.record import Circuit, CircuitCall
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, rows_apart
from loopscope.interp.common.metrics import measure, metric_name, metric_or_kl, row_by_row
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

Method = Literal["eap", "eap-ig-inputs", "eap-ig-activations", "ig-edges"]


@differentiated
def circuit_scores(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric | Literal["kl"],
    n_loops: int | None = None,
    *,
    method: Method = "eap-ig-inputs",
    steps: int = 5,
    direction: Direction = "denoise",
    heads: bool | None = None,
    by_position: bool = False,
    readout: ReadoutColumn = None,
    checkpoint: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Circuit:
    """Score every edge between the components of all iterations: (clean - corrupted output of the
    writer) times the gradient of the metric through the reader alone.

    Writers are the embedding, every head (or attention) and every MLP of every visit; readers are
    the queries, keys and values of every later head (or attention), every later MLP, and the final
    norm with the head. Where a norm, an injected input or another map stands between a writer and a
    reader, the gradient is taken back through it. All edges come from one forward and backward pass
    per step. With integrated gradients the gradient at the readout is the mean along the straight
    line between its two inputs, so that in a family with an additive residual stream the edges into
    "final" sum to the difference of the metrics.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or tokens
            with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, "
            batch"]; "kl" for minus the divergence in nats from the clean run's distribution.
        n_loops: Iterations; None means what the checkpoint records.
        method: "eap" takes the gradient of the base run; "eap-ig-inputs" the mean over runs whose
            embeddings lie between the two; "eap-ig-activations" for each writer the mean over runs
            in which what its attention or MLP adds lies between the two; "ig-edges" the mean over
            runs in which every edge carries a mixture of the two, so that the scores of all edges
            sum to the difference of the metrics in every family (up to the steps' error), and no
            score is a linearisation through norms and maps between.
        steps: Of integrated gradients: midpoints of so many equal parts of the line.
        direction: The base run: "denoise" the corrupted one, "noise" the clean one; "ig-edges" has
            none.
        heads: Whether heads are nodes; None where a family lets them be told apart.
        by_position: Whether a component is another node at each position. A writer at a position is
            what it adds to the stream there; an edge leads to a reader's input at the same
            position. A head's result at a position is made of its queries there and of its keys and
            values at all positions that it attends to: a head moves information inside. Readers
            from which no path leads to the readout's position have no edges. The scores of an
            edge's positions sum to the edge's score over all positions. All inputs must have one
            length.
        checkpoint: The checkpoint's name, for the record.
        max_bytes: About how many bytes the gradient of "ig-edges" may keep; it decides how many
            examples run side by side, one at least. A run of the first example measures what one
            needs. It grows with the iterations, and with their square where the family's stream is
            no plain sum.

    Returns:
        All edges with the mean score over the batch; positive for what moves the metric towards the
        clean run's.

    Raises:
        ValueError: Inputs that do not match, a method or a number of steps that does not exist, or
            a model whose stream is not made of what its attentions and MLPs add.

    Source:
        Syed et al. 2023 (arXiv 2310.10348); Hanna et al. 2024 (arXiv 2403.17806), integrated
        gradients of inputs; Marks et al. 2024 (arXiv 2403.19647), of activations. "ig-edges" is
        the path integral of Sundararajan et al. 2017 (arXiv 1703.01365) over the edges' masks of
        Bhaskar et al. 2024 (arXiv 2406.16778).
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {method!r}")
    steps = checked_count(steps, "steps")
    max_bytes = checked_count(max_bytes, "max_bytes")
    if method == "ig-edges" and direction != "denoise":
        raise ValueError(
            f"'ig-edges' goes from one run to the other and has no base run, got direction="
            f"{direction!r}; leave direction out"
        )
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    pair = Pair.of(model, clean, corrupted, readout)
    graph = graph_of(model, pair.clean, n_loops, heads, by_position)
    job = _Job.of(model, pair, metric, graph, direction)
    scores = job.by_method(pair, method, steps, max_bytes)
    return job.circuit(scores, method, steps, checkpoint)


@dataclass(frozen=True)
class _Job:
    """All edges of a model on one pair of inputs."""

    model: LoopedModel
    graph: Graph
    base: Batch
    metric: Metric
    direction: Direction
    clean: Written
    corrupted: Written

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        pair: Pair,
        metric: Metric | Literal["kl"],
        graph: Graph,
        direction: Direction,
    ) -> _Job:
        base, _ = base_and_source(direction, pair.clean, pair.corrupted)
        runs = [Written.of(model, batch, graph) for batch in (pair.clean, pair.corrupted)]
        with torch.no_grad():
            chosen = metric_or_kl(metric, model.readout(runs[0].end, pair.clean.readout))
        return cls(model, graph, base, chosen, direction, *runs)

    @property
    def change(self) -> Float[Tensor, "writer batch pos d_model"]:
        return self.clean.outputs - self.corrupted.outputs

    @property
    def last(self) -> str:
        return last_stream(self.model, self.graph.n_loops)

    def by_method(
        self, pair: Pair, method: Method, steps: int, max_bytes: int
    ) -> Float[Tensor, "reader writer span"]:
        """The scores by one of the methods."""
        if method == "eap":
            return self.plain()
        if method == "ig-edges":
            given = (self.model, self.graph, pair.clean, self.corrupted)
            runs = MaskedRuns.of(*given, "corrupted", 0, max_bytes)
            with torch.no_grad():
                own = self.model.readout(self.clean.end, pair.clean.readout)
                check_whole(runs.logits(self.graph.every[None])[0], own)
            return gate_scores(runs, self.metric, _midpoints(steps))
        return self.inputs(steps) if method == "eap-ig-inputs" else self.activations(steps)

    def plain(self) -> Float[Tensor, "reader writer span"]:
        """EAP: one gradient, of the base run."""
        return self._scored(self.base, self.metric, ())

    def inputs(self, steps: int) -> Float[Tensor, "reader writer span"]:
        """EAP-IG of inputs."""
        total = self._zeros()
        for share in _midpoints(steps):
            moved = torch.lerp(self.corrupted.added[0], self.clean.added[0], share)
            total += self._scored(self.base, self.metric, [("hook_embed", moved)]) / steps
        return self._with_readout(total)

    def activations(self, steps: int) -> Float[Tensor, "reader writer span"]:
        """EAP-IG of activations; the steps of one stage are run side by side where rows do not
        depend on each other.
        """
        if not rows_apart(self.model):
            each = [self._activations([share]) for share in _midpoints(steps)]
            return self._with_readout(torch.stack(each).mean(0))
        return self._with_readout(self._activations(_midpoints(steps)))

    def _activations(self, shares: Sequence[float]) -> Float[Tensor, "reader writer span"]:
        """The scores by gradients at some shares of the way, as their mean."""
        total = self._zeros()
        metric = partial(row_by_row, self.metric, len(self.base))
        batch = self.base.repeat(len(shares))
        places = [("hook_embed", slice(0, 1)), *((s.added, s.writers) for s in self.graph.stages)]
        lines = zip(places, self.corrupted.added, self.clean.added, strict=True)
        with tqdm(total=len(places), desc="circuit scores", leave=False, delay=2) as bar:
            for number, ((name, own), low, high) in enumerate(lines):
                moved = torch.cat([torch.lerp(low, high, share) for share in shares])
                found = self._scored(batch, metric, [(name, moved)], number)
                total[:, own] = found[:, own]
                bar.update()
        return total

    def _scored(
        self, batch: Batch, metric: Metric, moved: Sequence[tuple[str, Tensor]], first: int = 0
    ) -> Float[Tensor, "reader writer span"]:
        """The scores by the gradient of one run.

        Args:
            moved: What the run is given at some hook points.
            first: The first stage whose readers are scored.
        """
        graph, stages = self.graph, self.graph.stages
        held = [] if self.model.additive_residual else ["hook_embed", *(s.added for s in stages)]
        names = [*sites_of(stages[first:]), *held, self.last]
        with self.model.hooks(
            [(n, partial(_put, to=to)) for n, to in moved], n_loops=graph.n_loops
        ):
            values, grads, _ = gradients_with_metric(
                self.model, batch, metric, list(dict.fromkeys(names)), graph.n_loops
            )
        skeleton = Skeleton.of(self.model, batch, graph, values) if held else None
        change = self.change.repeat(1, len(batch) // len(self.base), 1, 1)
        total = self._zeros()
        for number, readers, stream, through in by_stage(graph, values, grads, self.last):
            before = graph.before[readers.start]
            if skeleton is None:
                total[readers, :before] = self._products(through, change[:before])
                continue
            at = [slice(0, 1), *(s.writers for s in stages[:number])]
            for writers, pulled in zip(at, skeleton.pulled(stream, number, through), strict=True):
                total[readers, writers] = self._products(pulled, change[writers])
        return total / len(batch)

    def _with_readout(self, scores: Tensor) -> Float[Tensor, "reader writer span"]:
        """Scores whose edges into the readout are those of the integrated gradient."""
        through = integrated_readout(
            self.model, self.base, self.metric, self.corrupted.end, self.clean.end
        )[None]
        stages, n_stages = self.graph.stages, len(self.graph.stages)
        pulled = [through] * (n_stages + 1)
        if not self.model.additive_residual:
            names = ["hook_embed", *(s.added for s in stages)]
            values = dict(zip(names, self.corrupted.added, strict=True))
            skeleton = Skeleton.of(self.model, self.base, self.graph, values)
            pulled = skeleton.pulled(self.last, n_stages, through)
        for writers, grad in zip([slice(0, 1), *(s.writers for s in stages)], pulled, strict=True):
            scores[-1:, writers] = self._products(grad, self.change[writers]) / len(self.base)
        return scores

    def _products(
        self,
        grads: Float[Tensor, "reader batch pos d_model"],
        change: Float[Tensor, "writer batch pos d_model"],
    ) -> Float[Tensor, "reader writer span"]:
        """Gradients times changes, summed over the batch and over the positions of each span."""
        spans = (self.graph.every.shape[-1], -1)
        ends = "reader batch span pos d_model, writer batch span pos d_model"
        found: Tensor = einsum(
            grads.unflatten(2, spans), change.unflatten(2, spans), f"{ends} -> reader writer span"
        )
        return found

    def _zeros(self) -> Float[Tensor, "reader writer span"]:
        return self.change.new_zeros(self.graph.every.shape)

    def circuit(
        self,
        scores: Float[Tensor, "reader writer span"],
        method: Method,
        steps: int,
        name: str | None,
    ) -> Circuit:
        """The record of all edges."""
        clean, corrupted = (
            self._measured(run).mean().item() for run in (self.clean, self.corrupted)
        )
        settings = {"direction": self.direction} | ({} if method == "eap" else {"steps": steps})
        whole = clean - corrupted
        summed = scores if method == "ig-edges" else scores[-1]
        error = abs(summed.sum().item() - whole) / abs(whole) if whole else None
        call = CircuitCall(
            method, metric_name(self.metric), clean, corrupted, error, settings, checkpoint=name
        )
        every, values = self.graph.edges, tuple(scores[self.graph.every.to(scores.device)].tolist())
        graph = self.graph
        return Circuit(
            every, values, call, graph.n_loops, graph.schedule, len(every), graph.positions
        )

    def _measured(self, run: Written) -> Tensor:
        with torch.no_grad():
            return measure(self.metric, self.model.readout(run.end, self.base.readout))


def _midpoints(steps: int) -> list[float]:
    return [(step + 0.5) / steps for step in range(steps)]


def _put(value: Tensor, hook: HookPoint, to: Tensor) -> Tensor:
    return to.to(value)
