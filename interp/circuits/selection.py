"""Choosing the edges of a circuit from their scores."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from loopscope.interp.circuits.masked import MAX_BYTES, Replace
from loopscope.interp.circuits.measured import Measured, masked_runs
from loopscope.interp.circuits.names import EMBED, FINAL, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Pair
from loopscope.models.basis.numbers import checked_integer, checked_number
from loopscope.models.core.base import LoopedModel

Rule = Literal["top", "greedy"]
NEUTRAL: tuple[Replace, ...] = ("corrupted", "resample")
"""The replacements under which pruning changes nothing."""


def select_circuit(
    scores: Circuit, n_edges: int, rule: Rule = "greedy", prune: bool = True
) -> Circuit:
    """Choose the edges of a circuit by their scores, largest absolute scores first.

    Args:
        scores: The edges to choose from, with their scores.
        n_edges: How many edges to choose, before pruning.
        rule: "top" takes the largest edges of all. "greedy" starts at "final" and at each step
            takes the largest edge into a node that is already in the circuit, so that every edge
            leads to the readout.
        prune: Whether `prune_circuit` then removes the edges that lead nowhere.

    Returns:
        The circuit of the chosen edges.

    Raises:
        ValueError: The rule is unknown, or there are not so many edges.

    Source:
        Hanna et al. 2024 (arXiv 2403.17806), section 3: greedy selection.
    """
    if rule not in ("top", "greedy"):
        raise ValueError(f"rule must be 'top' or 'greedy', got {rule!r}")
    n_edges = checked_integer(n_edges, "n_edges")
    if not 0 <= n_edges <= len(scores.edges):
        raise ValueError(f"n_edges must be in 0..{len(scores.edges)}, got {n_edges}")
    first = ranked(scores, rule)[:n_edges]
    kept = _connected(scores, first) if prune else first
    return scores.take(kept, f"{rule} {n_edges}")


def prune_circuit(circuit: Circuit) -> Circuit:
    """Remove the edges of a circuit that are on no path from the embedding to the readout.

    An edge is removed if its writer has no path from "embed", or its reader has no path to "final".
    If excluded edges carry one run of the model (`replace` "corrupted" or "resample" of
    `evaluate_circuit`), the removed edges have no effect. With "mean" or "zero" they can have one:
    a writer that receives nothing of the embedding still computes something from the replaced
    values.
    """
    kept = _connected(circuit, range(len(circuit)))
    return circuit.take(kept, circuit.call.selection)


def _connected(circuit: Circuit, chosen: Iterable[int]) -> list[int]:
    """Those of some edges that lie on a path from "embed" to "final" through these edges."""
    ends = [(number, *circuit.edges[number]) for number in sorted(chosen)]
    fed = {reader: circuit.feeds(reader) for reader in {reader for _, _, reader in ends}}
    heard = {writer for _, writer, _ in ends if end_of(writer).component == EMBED}
    for _, writer, reader in ends:  # readers in the order of the run, so every writer is settled
        if writer in heard:
            heard.update(fed[reader])
    heeded = {node for nodes in fed.values() for node in nodes if end_of(node).component == FINAL}
    kept = []
    for number, writer, reader in reversed(ends):
        if heeded.intersection(fed[reader]):
            heeded.add(writer)
            if writer in heard:
                kept.append(number)
    return kept[::-1]


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
    max_bytes: int = MAX_BYTES,
) -> Circuit:
    """Find the smallest circuit that reaches a wanted faithfulness, by bisection on the number of
    edges.

    Faithfulness need not grow with every edge, so a smaller circuit may reach it too. The circuit
    is pruned if excluded edges carry one run of the model; see `prune_circuit`.

    Args:
        model, clean, corrupted, metric, replace, seed, readout, max_bytes: The call that measures a
            circuit, as `evaluate_circuit` describes it.
        scores: All edges with their scores.
        wanted: The faithfulness to reach: 0 for the replaced run, 1 for the whole model.
        rule: How edges are chosen, as `select_circuit` describes it.

    Returns:
        The circuit that was found.

    Raises:
        ValueError: All edges together do not reach the faithfulness, or `evaluate_circuit` would
            refuse the call.
    """
    checked_number(wanted, "wanted", infinite=True)
    pair = Pair.of(model, clean, corrupted, readout)
    measured = Measured.of(
        masked_runs(model, pair, [scores], replace, seed, max_bytes), pair, metric
    )
    order, graph = ranked(scores, rule), measured.runs.graph
    numbers = graph.numbers(scores.edges)[order]

    def faithful(n_edges: int) -> bool:
        return bool(measured.shares(graph.marked(numbers[:n_edges])[None]) >= wanted)

    most, least = len(order), 0
    if not faithful(most):
        raise ValueError(
            f"the scored edges must reach the wanted faithfulness {wanted} together, but do not"
        )
    while most - least > 1:
        middle = (most + least) // 2
        least, most = (least, middle) if faithful(middle) else (middle, most)
    kept = _connected(scores, order[:most]) if replace in NEUTRAL else order[:most]
    return scores.take(kept, f"{rule} {most}, faithfulness at least {wanted} by {replace}")


def ranked(scores: Circuit, rule: Rule) -> Sequence[int]:
    """The edges' numbers in the order in which `select_circuit` takes them."""
    largest = sorted(range(len(scores)), key=lambda number: -abs(scores.scores[number]))
    if rule == "top":
        return largest
    place = {number: index for index, number in enumerate(largest)}
    waiting: dict[str, list[int]] = {}
    for number, edge in enumerate(scores.edges):
        waiting.setdefault(edge.reader, []).append(number)
    into: dict[str, list[str]] = {}
    for reader in waiting:
        for node in scores.feeds(reader):
            into.setdefault(node, []).append(reader)
    heap: list[int] = []
    order: list[int] = []

    def open_node(node: str) -> None:
        for reader in into.pop(node, ()):
            for number in waiting.pop(reader, ()):
                heapq.heappush(heap, place[number])

    for node in [node for node in into if end_of(node).component == FINAL]:
        open_node(node)
    while heap:
        number = largest[heapq.heappop(heap)]
        order.append(number)
        open_node(scores.edges[number].writer)
    return order
