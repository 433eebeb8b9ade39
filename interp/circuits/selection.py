"""Choosing the edges of a circuit from their scores."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace as replace_field
from typing import Literal

import torch

from loopscope.interp.circuits.faithfulness import Measured, masked_runs
from loopscope.interp.circuits.masked import Replace
from loopscope.interp.circuits.names import EMBED, FINAL, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Pair
from loopscope.models.core.base import LoopedModel

Rule = Literal["top", "greedy"]


def select_circuit(
    scores: Circuit, n_edges: int, rule: Rule = "greedy", prune: bool = True
) -> Circuit:
    """Choose the edges of largest absolute score.

    Args:
        scores: Edges to choose from, with their scores.
        n_edges: How many, before pruning.
        rule: "top" takes the largest of all; "greedy" starts at "final" and takes at each step the
            largest edge into a node that is there, so that every edge leads to the readout.
        prune: Leave out edges that do nothing: whose writer hears nothing of the embedding, or
            whose reader leads nowhere.

    Raises:
        ValueError: Another rule, or a number of edges that there is not.

    Source:
        Hanna et al. 2024 (arXiv 2403.17806), section 3: greedy selection.
    """
    if rule not in ("top", "greedy"):
        raise ValueError(f"rule must be 'top' or 'greedy', got {rule!r}")
    if not 0 <= n_edges <= len(scores.edges):
        raise ValueError(f"n_edges must be in 0..{len(scores.edges)}, got {n_edges}")
    ranked = _ranked(scores, rule)[:n_edges]
    chosen = scores.take(ranked, f"{rule} {n_edges}")
    return prune_circuit(chosen) if prune else chosen


def prune_circuit(circuit: Circuit) -> Circuit:
    """The circuit without edges that do nothing: those whose writer has no path from "embed" and
    those whose reader has no path to "final".
    """
    heard = {EMBED}
    for edge in circuit.edges:  # readers in the order of the run, so every writer is settled
        if edge.writer in heard:
            heard.update(end_of(edge.reader).writers)
    heeded = {FINAL}
    for edge in reversed(circuit.edges):
        if heeded.intersection(end_of(edge.reader).writers):
            heeded.add(edge.writer)
    kept = [
        number
        for number, edge in enumerate(circuit.edges)
        if edge.writer in heard and heeded.intersection(end_of(edge.reader).writers)
    ]
    return circuit.take(kept, circuit.call.selection)


@torch.no_grad()
@evaluated
def smallest_circuit(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    scores: Circuit,
    metric: Metric | Literal["kl"],
    wanted: float = 0.9,
    *,
    rule: Rule = "greedy",
    replace: Replace = "corrupted",
    seed: int = 0,
    readout: ReadoutColumn = None,
    max_bytes: int = 1 << 29,
) -> Circuit:
    """The smallest circuit of a wanted faithfulness, by bisection on the number of edges.

    Faithfulness need not grow with every edge, so that a smaller circuit may have it too.

    Args:
        scores: All edges with their scores.
        wanted: The faithfulness, 1 for the whole model's.
        rule: As for `select_circuit`.
        model, clean, corrupted, metric, replace, seed, readout, max_bytes: As for
            `evaluate_circuit`.

    Raises:
        ValueError: As for `evaluate_circuit`; or all the scored edges together are less faithful.
    """
    pair = Pair.of(model, clean, corrupted, readout)
    measured = Measured.of(
        masked_runs(model, pair, [scores], replace, seed, max_bytes), pair, metric
    )
    low, high = measured.replaced.mean(), measured.whole.mean()

    def faithful(n_edges: int) -> bool:
        mask = measured.runs.graph.mask(select_circuit(scores, n_edges, rule).edges)
        return bool((measured.values(mask[None]).mean() - low) / (high - low) >= wanted)

    most, least = len(scores.edges), 0
    if not faithful(most):
        raise ValueError(
            f"the scored edges must reach the wanted faithfulness {wanted} together, but do not"
        )
    while most - least > 1:
        middle = (most + least) // 2
        least, most = (least, middle) if faithful(middle) else (middle, most)
    found = select_circuit(scores, most, rule)
    words = f"{rule} {most}, faithfulness at least {wanted} by {replace}"
    return replace_field(found, call=replace_field(found.call, selection=words))


def _ranked(scores: Circuit, rule: Rule) -> Sequence[int]:
    """The edges' numbers in the order in which they are chosen."""
    sizes = [abs(score) for score in scores.scores]
    if rule == "top":
        return sorted(range(len(sizes)), key=lambda number: -sizes[number])
    into: dict[str, list[int]] = {}
    for number, edge in enumerate(scores.edges):
        for node in end_of(edge.reader).writers:
            into.setdefault(node, []).append(number)
    heap: list[tuple[float, int]] = []
    order: dict[int, None] = {}

    def open_node(node: str) -> None:
        for number in into.pop(node, ()):
            heapq.heappush(heap, (-sizes[number], number))

    open_node(FINAL)
    while heap:
        number = heapq.heappop(heap)[1]
        if number not in order:
            order[number] = None
            open_node(scores.edges[number].writer)
    return list(order)
