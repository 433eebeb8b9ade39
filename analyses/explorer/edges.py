"""The circuit between two questions: the scores of all edges, the exact effect of one of them, and
how much of the answer some of them keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

import torch

from loopscope.analyses.explorer.model import Answers, answers
from loopscope.analyses.explorer.questions import Query
from loopscope.analyses.explorer.sentences import iterations
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.masked import MAX_BYTES
from loopscope.interp.circuits.measured import masked_runs, own_logits
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.selection import ranked
from loopscope.interp.common.pairs import Pair
from loopscope.models.core.base import LoopedModel

QUICK_EDGES = 30_000
"""Edges above which positions, and then heads, are not told apart."""


@dataclass(frozen=True)
class ScoredEdges:
    """All edges between two questions.

    Attributes:
        circuit: The edges with their scores, in logits of A's margin.
        order: Their numbers in the order in which they are taken: every edge leads to the answer
            through edges before it.
    """

    circuit: Circuit
    order: tuple[int, ...]

    def has(self, count: int | None) -> TypeGuard[int]:
        """Whether there are so many edges, and at least one."""
        return count is not None and 1 <= count <= len(self.order)

    def first(self, count: int | None) -> Circuit:
        """The first edges of the order.

        Raises:
            ValueError: A number of edges that there is not.
        """
        if not self.has(count):
            given = "" if count is None else f", got {count}"
            raise ValueError(f"the circuit has between 1 and {len(self.order)} edges{given}")
        return self.circuit.take(self.order[:count], f"greedy {count}")

    def one(self, text: str) -> Circuit:
        """The one edge that a text names.

        Raises:
            ValueError: It names none of the edges.
        """
        edge = Edge.from_text(text)
        if edge not in self.circuit.edges:
            best = self.circuit.edges[self.order[0]]
            raise ValueError(
                f"an edge is named as writer → reader, such as {best.text}, but {text!r} is none of"
                f" the {len(self.circuit)} edges between A and B after"
                f" {iterations(self.circuit.n_loops)}{self._coarse()}"
            )
        return self.circuit.take([self.circuit.edges.index(edge)], "one edge")

    def _coarse(self) -> str:
        """Why the edges' names have no position, as the end of a sentence."""
        if self.circuit.positions:
            return ""
        return (
            "; they are over all positions, because positions, and then heads, are told apart only"
            f" where that makes at most {QUICK_EDGES:,} edges"
        )


def score_edges(model: LoopedModel, a: Query, b: Query, n_loops: int) -> ScoredEdges:
    """The scores of all edges; positions, and heads, are told apart where that makes at most
    `QUICK_EDGES` edges.

    Raises:
        ValueError: A model whose stream is not made of what its attentions and MLPs add, or
            questions between which no edge makes a difference.
    """
    count = graph_of(model, a.batch, n_loops, None).n_edges
    circuit = circuit_scores(
        model,
        a.batch,
        b.batch,
        a.metric,
        n_loops,
        heads=None if count <= QUICK_EDGES else False,
        by_position=count * len(a.tokens) <= QUICK_EDGES,
    )
    if not any(circuit.scores):
        raise ValueError(
            "edges are scored by what differs between A and B, but every score is 0; type another B"
        )
    return ScoredEdges(circuit, tuple(ranked(circuit, "greedy")))


@torch.no_grad()
def patch_edge(model: LoopedModel, a: Query, b: Query, edge: Circuit) -> tuple[Answers, Answers]:
    """The answers of A's run before and after the reader of one edge alone is given what its writer
    adds in B's run.

    Args:
        edge: A circuit of this one edge.

    Raises:
        ValueError: As for `exact_scores`.
    """
    pair = Pair.of(model, a.batch, b.batch, None)
    runs = masked_runs(model, pair, [edge], "corrupted", 0, MAX_BYTES)
    every = runs.graph.every
    before, after = runs.logits(torch.stack([every, every & ~runs.graph.mask(edge.edges)]))
    own_logits(runs, pair, before)  # refuses a stream of which the edges are not all
    return answers(model, before, a.answer_id), answers(model, after, a.answer_id)
