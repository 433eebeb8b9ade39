"""The nodes and edges of a model: every component of every iteration, writers to later readers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.circuits.names import EMBED, FINAL, HEAD_INPUTS, Edge, ScheduleEntry
from loopscope.interp.common.collecting import collect
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import Visit

READ = {"attn": "hook_resid_pre", "mlp": "hook_resid_mid"}
ADDED = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
HEAD_SITES = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z")


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

    Attributes:
        stages: In the order of the run.
        writers, readers: Their names, in the order of the run; the last reader is "final".
        before: For each reader how many of the writers it can read.
        n_loops: Iterations.
        schedule: The visits.
    """

    stages: tuple[Stage, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    before: tuple[int, ...]
    n_loops: int
    schedule: tuple[ScheduleEntry, ...]

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """Every edge, by reader."""
        return tuple(
            Edge(writer, reader)
            for reader, count in zip(self.readers, self.before, strict=True)
            for writer in self.writers[:count]
        )

    def edge(self, reader: int, writer: int) -> Edge:
        """The edge between two numbers."""
        return Edge(self.writers[writer], self.readers[reader])

    @cached_property
    def every(self) -> Bool[Tensor, "reader writer"]:
        """Where there is an edge."""
        return torch.arange(len(self.writers)) < torch.tensor(self.before)[:, None]

    def mask(self, edges: Iterable[Edge]) -> Bool[Tensor, "reader writer"]:
        """Some of the edges.

        Raises:
            ValueError: One that the graph does not have.
        """
        found = torch.zeros_like(self.every)
        for edge in edges:
            row, column = self._readers.get(edge.reader), self._writers.get(edge.writer)
            if row is None or column is None or not self.every[row, column]:
                raise ValueError(
                    f"every edge must be one of this model's with n_loops={self.n_loops}"
                    f" {'and heads' if any(s.heads for s in self.stages) else 'without heads'}, but"
                    f" {edge.writer} -> {edge.reader} is none"
                )
            found[row, column] = True
        return found

    @cached_property
    def _readers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.readers)}

    @cached_property
    def _writers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.writers)}


def graph_of(model: LoopedModel, batch: Batch, n_loops: int, heads: bool | None) -> Graph:
    """The graph of a model.

    Args:
        batch: Inputs whose first row is used to see whether heads can be told apart.
        heads: Whether heads are nodes; None where they can be told apart.

    Raises:
        ValueError: A block whose attention and MLP cannot be told apart, or heads that cannot.
    """
    visits = model.schedule(n_loops)
    for visit in visits:
        for site in (*READ.values(), *ADDED.values()):
            if site not in visit.sites or visit.frozen:
                raise ValueError(
                    f"every block must have the site {site!r} to tell its readers apart, but"
                    f" {visit.name} has none"
                )
    if "hook_embed" not in model.edge_sites()[0]:
        raise ValueError(f"a circuit begins at 'hook_embed', which {type(model).__name__} lacks")
    if heads is False:
        return _graph(visits, n_loops, False)
    reason = _heads_apart(model, batch, visits, n_loops)
    if heads and reason:
        raise ValueError(f"{reason}, so its heads cannot be nodes; pass heads=False")
    return _graph(visits, n_loops, not reason)


def graph_with(model: LoopedModel, batch: Batch, n_loops: int, n_edges: int) -> Graph:
    """The graph of a circuit: with heads where it then has as many edges as the circuit's own."""
    graph = graph_of(model, batch, n_loops, None)
    return graph if len(graph.edges) == n_edges else graph_of(model, batch, n_loops, False)


def _graph(visits: list[Visit], n_loops: int, heads: bool) -> Graph:
    stages: list[Stage] = []
    writers, readers, before = [EMBED], list[str](), list[int]()
    for visit in visits:
        for kind in ("attn", "mlp"):
            by_head = heads and kind == "attn"
            reads, writes = _ends(visit, kind, by_head)
            stage = Stage(
                visit,
                kind,
                slice(len(readers), len(readers) + len(reads)),
                slice(len(writers), len(writers) + len(writes)),
                by_head,
            )
            before += [len(writers)] * len(reads)
            readers += reads
            writers += writes
            stages.append(stage)
    places = tuple(ScheduleEntry(v.name, v.loop, v.layer, str(v.block.name)) for v in visits)
    return Graph(
        tuple(stages),
        tuple(writers),
        (*readers, FINAL),
        (*before, len(writers)),
        n_loops,
        places,
    )


def _ends(visit: Visit, kind: str, by_head: bool) -> tuple[list[str], list[str]]:
    """The readers and the writers of one stage."""
    name = f"{visit.name}.{kind}"
    if not by_head:
        return [name], [name]
    attn: Any = visit.block.attn
    n_heads, n_kv = len(attn.W_Q), len(attn.W_K)
    group = n_heads // n_kv
    shared = [
        f"{name}.{h}" if group == 1 else f"{name}.{group * h}-{group * (h + 1) - 1}"
        for h in range(n_kv)
    ]
    heads = [f"{name}.{head}" for head in range(n_heads)]
    made = {"q": heads, "k": shared, "v": shared}
    return [f"{node}.{read}" for read in HEAD_INPUTS for node in made[read]], heads


def _heads_apart(model: LoopedModel, batch: Batch, visits: list[Visit], n_loops: int) -> str:
    """Why heads cannot be told apart; empty where they can: queries, keys and values are linear in
    the normed stream, and what attention adds is the sum of the heads.
    """
    stages = [stage for stage in _graph(visits, n_loops, False).stages if stage.kind == "attn"]
    stages = [Stage(s.visit, s.kind, s.readers, s.writers, True) for s in stages]
    for stage in stages:
        if not hasattr(stage.visit.block, "norm_readers"):
            return f"what reads the norms of {stage.visit.name} is not declared"
        missing = [site for site in HEAD_SITES if site not in stage.visit.sites]
        missing += [
            part
            for part in ("W_Q", "W_K", "W_V", "W_O", "b_Q")
            if not hasattr(getattr(stage.visit.block, "attn", None), part)
        ]
        if missing:
            return f"{stage.visit.name} has no {missing[0]}"
    names = [name for s in stages for name in (s.stream, s.added, *s.head_names())]
    with torch.no_grad():
        seen = collect(model, batch[:1], names, n_loops).values
        for stage in stages:
            q, k, v, z = (seen[name] for name in stage.head_names())
            n_readers = q.shape[2] + k.shape[2] + v.shape[2]
            made = stage.projected(seen[stage.stream].expand(n_readers, -1, -1, -1))
            summed = stage.outputs(z).sum(0) + stage.constant(z)
            pairs = zip((*made, summed), (q, k, v, seen[stage.added]), strict=True)
            for what, (ours, theirs) in zip(("q", "k", "v", "sum"), pairs, strict=True):
                if not close(ours, theirs):
                    wrong = "do not add up to its attention"
                    made_of = f"have a {what} that is not made of the normed stream alone"
                    return f"the heads of {stage.visit.name} {wrong if what == 'sum' else made_of}"
    return ""


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors are the same but for rounding, measured by the largest entry."""
    off, scale = (ours - theirs).abs().max(), theirs.abs().max()
    return ours.shape == theirs.shape and bool(off <= torch.finfo(ours.dtype).eps ** 0.5 * scale)
