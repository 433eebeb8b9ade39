"""The nodes and edges of a model: every component of every iteration, writers to later readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.circuits.names import Edge, Positions, ScheduleEntry, placed
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import Visit

READ = {"attn": "hook_resid_pre", "mlp": "hook_resid_mid"}
ADDED = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
HEAD_SITES = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")

_NOWHERE = (-1, 0)


@dataclass(frozen=True)
class Stage:
    """The attention or the MLP of one visit: it reads the stream and adds to it.

    Attributes:
        visit: The visit.
        kind: Which of the two.
        readers, writers: The graph's numbers of its readers and of its writers.
        heads: Whether heads are nodes of their own; readers are then the queries of each head,
            the keys and the values of each key-value head.
    """

    visit: Visit
    kind: Literal["attn", "mlp"]
    readers: slice
    writers: slice
    heads: bool

    @property
    def moving(self) -> slice:
        """Its readers of whose input at one position its outputs at others are made: keys and
        values, or attention as a whole.
        """
        queries = self.writers.stop - self.writers.start if self.heads else 0
        start = self.readers.start + queries if self.kind == "attn" else self.readers.stop
        return slice(start, self.readers.stop)

    @property
    def stream(self) -> str:
        """The hook point of the stream that it reads."""
        return f"{self.visit.name}.{READ[self.kind]}"

    @property
    def added(self) -> str:
        """The hook point of what it adds to the stream."""
        return f"{self.visit.name}.{ADDED[self.kind]}"

    def head_names(self) -> list[str]:
        """The hook points of queries, keys, values and heads' results."""
        return [f"{self.visit.name}.{site}" for site in HEAD_SITES]

    def projected(
        self, streams: Float[Tensor, "reader batch pos d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, "batch pos head d_head", each head's made of the stream that
        its reader reads.
        """
        block: Any = self.visit.block
        attn, norm = block.attn, getattr(block, "ln1", None)
        flat = streams.flatten(0, 1)
        normed = (flat if norm is None else norm(flat, NO_TAPS)).view(streams.shape)
        sizes = [len(attn.W_Q), len(attn.W_K), len(attn.W_V)]
        maps = ((attn.W_Q, attn.b_Q), (attn.W_K, attn.b_K), (attn.W_V, attn.b_V))
        form = "head batch pos d_model, head d_model d_head -> batch pos head d_head"
        q, k, v = (
            einsum(part, weight, form) + bias
            for part, (weight, bias) in zip(normed.split(sizes), maps, strict=True)
        )
        return q, k, v

    def outputs(
        self, value: Float[Tensor, "batch pos ..."]
    ) -> Float[Tensor, "writer batch pos d_model"]:
        """The addition of each writer to the stream, from the value of `written`."""
        if not self.heads:
            return value[None]
        weights: Tensor = self.visit.block.attn.W_O  # type: ignore[union-attr, assignment]
        form = "batch pos head d_head, head d_head d_model -> head batch pos d_model"
        return einsum(value, weights, form)

    @property
    def written(self) -> str:
        """The hook point of which its writers' outputs are made."""
        return self.head_names()[-1] if self.heads else self.added

    def constant(self, like: Tensor) -> Tensor:
        """The part of the stream that no writer adds: the bias of the heads' sum."""
        bias = getattr(getattr(self.visit.block, "attn", None), "b_O", None) if self.heads else None
        return like.new_zeros(()) if bias is None else bias.to(like)


@dataclass(frozen=True)
class Graph:
    """Nodes and edges of a model in a run of some length.

    A span is one position where nodes at different positions are different nodes, else all of them.

    Attributes:
        stages: In the order of the run.
        writers, readers: Their names, in the order of the run; the last reader is "final".
        before: For each reader how many of the writers it can read.
        n_loops: Iterations.
        schedule: The visits.
        positions: The inputs' positions, where nodes at different positions are different nodes.
    """

    stages: tuple[Stage, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    before: tuple[int, ...]
    n_loops: int
    schedule: tuple[ScheduleEntry, ...]
    positions: Positions | None = None

    @cached_property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.every.sum())

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by reader, then by writer, then by position."""
        return self.chosen(self.every)

    def chosen(self, mask: Bool[Tensor, "reader writer span"]) -> tuple[Edge, ...]:
        """The edges of a mask."""
        readers, writers = ({at: name for name, at in own.items()} for own in self._numbered)
        return tuple(
            Edge(writers[writer, span], readers[reader, span])
            for reader, writer, span in mask.nonzero().tolist()
        )

    @cached_property
    def every(self) -> Bool[Tensor, "reader writer span"]:
        """Where there is an edge: from each writer to each later reader, and by position only where
        the reader can reach the readout.
        """
        writers = torch.arange(len(self.writers), device="cpu")
        there = writers < torch.tensor(self.before, device="cpu")[:, None]
        return there[:, :, None] & self._heeded()[:, None, :]

    def _heeded(self) -> Bool[Tensor, "reader span"]:
        """Where readers can reach the readout."""
        if self.positions is None:
            return torch.ones(len(self.readers), 1, dtype=torch.bool, device="cpu")
        found = torch.zeros(len(self.readers), self.positions.size, dtype=torch.bool, device="cpu")
        heeded = torch.arange(self.positions.size, device="cpu") == self.positions.readout
        found[-1] = heeded
        for stage in reversed(self.stages):
            found[stage.readers] = heeded
            if stage.kind == "attn":
                reached = map(self.positions.reached, range(len(heeded)))
                heeded = torch.tensor(
                    [bool(heeded[list(later)].any()) for later in reached], device="cpu"
                )
                found[stage.moving] = heeded
        return found

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "reader writer span"]:
        """Some of the edges.

        Raises:
            ValueError: One that the graph does not have.
        """
        return self.marked(self.numbers(edges))

    def marked(self, numbers: Int[Tensor, "edge 3"]) -> Bool[Tensor, "reader writer span"]:
        """The mask of edges given by their numbers."""
        found = torch.zeros_like(self.every)
        found[numbers.unbind(1)] = True
        return found

    def numbers(self, edges: Iterable[Edge]) -> Int[Tensor, "edge 3"]:
        """The numbers of each edge's reader, writer and span.

        Raises:
            ValueError: One that the graph does not have.
        """
        given = list(edges)
        reads, writes = self._numbered
        rows = [(*reads.get(e.reader, _NOWHERE), *writes.get(e.writer, _NOWHERE)) for e in given]
        reader, at, writer, to = (
            torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 4).unbind(1)
        )
        has = (at == to) & (reader >= 0) & (writer >= 0) & self.every[reader, writer, at]
        if not has.all():
            edge = given[int(has.int().argmin())]
            raise ValueError(
                f"every edge must be one of this model's with n_loops={self.n_loops}"
                f" {'and heads' if any(s.heads for s in self.stages) else 'without heads'}"
                f" {'by position' if self.positions else 'over all positions'}, but"
                f" {edge.writer} -> {edge.reader} is none"
            )
        return torch.stack([reader, writer, at], dim=1)

    @cached_property
    def _numbered(self) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
        """The numbers of every reader and of every writer, each with its span's."""
        spans = range(self.every.shape[2])
        reads, writes = (
            {
                placed(name, at if self.positions else None): (number, at)
                for number, name in enumerate(names)
                for at in spans
            }
            for names in (self.readers, self.writers)
        )
        return reads, writes
