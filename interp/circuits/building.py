"""The graph of a model: whether its heads can be told apart, and the positions of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loopscope.interp.circuits.graph import ADDED, HEAD_SITES, READ, Graph, Stage
from loopscope.interp.circuits.names import EMBED, FINAL, HEAD_INPUTS, Positions, ScheduleEntry
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.streams import Parts, watched
from loopscope.interp.common.collecting import collect
from loopscope.interp.common.inputs import begin_batch, sample_of
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS
from loopscope.models.core.state import State, Visit

Run = tuple[Tensor, Parts]


def graph_of(
    model: LoopedModel, batch: Batch, n_loops: int, heads: bool | None, by_position: bool = False
) -> Graph:
    """The graph of a model.

    Args:
        batch: Inputs whose first row is used to see whether heads can be told apart.
        heads: Whether heads are nodes; None where they can be told apart.
        by_position: Whether nodes at different positions of the inputs are different nodes.

    Raises:
        ValueError: A block whose attention and MLP cannot be told apart, components that read more
            than the stream, heads that cannot be told apart, or inputs whose positions do not
            match.
    """
    visits = model.schedule(n_loops)
    _check_sites(model, visits)
    _check_parts(model, begin_batch(model, sample_of(model, batch), n_loops), visits)
    positions = positions_of(model, batch) if by_position else None
    if heads is False:
        return _graph(visits, n_loops, False, positions)
    reason = _heads_apart(model, batch, visits, n_loops)
    if heads and reason:
        raise ValueError(f"{reason}, so its heads cannot be nodes; pass heads=False")
    return _graph(visits, n_loops, not reason, positions)


def _check_sites(model: LoopedModel, visits: list[Visit]) -> None:
    """Raise unless the stream is seen wherever components read it and add to it."""
    for visit in visits:
        if visit.frozen:
            raise ValueError(
                f"every visit must read the stream, but {visit.name} is frozen and adds what an"
                " earlier visit does; find circuits without the edit that freezes it"
            )
        missing = [s for s in (*READ.values(), *ADDED.values()) if s not in visit.sites]
        if missing:
            raise ValueError(
                f"every block must have the site {missing[0]!r}, which shows what its components"
                f" read or add, but {visit.name} has none"
            )
    if "hook_embed" not in model.edge_sites()[0]:
        raise ValueError(f"a circuit begins at 'hook_embed', which {type(model).__name__} lacks")


@torch.no_grad()
def _check_parts(model: LoopedModel, begin: State, visits: list[Visit]) -> None:
    """Raise where what a component adds moves later ones by other ways than the stream.

    A second run has other additions at the first visit, and the additions of the first run from
    there on. So where a component is given the second run's stream, it must make nothing else of
    the second run's other parts than of the first one's.

    Args:
        begin: The state of one row before the first visit.
    """
    if model.additive_residual:
        return
    kind = type(model).__name__
    rows = Rows.make(begin, type(model).visible, None)
    plain = moved = begin.resid, begin.parts
    for visit in visits:
        own = visit.acts_as or visit
        if visit.opening:
            plain, moved = (model.enter(own, *run, NO_TAPS) for run in (plain, moved))
        made: list[dict[str, Tensor]] = [{}, {}, {}]
        crossed = moved[0], plain[1]
        plain = _blocked(model, own, plain, rows, {}, made[0])
        held = {site: _moved(x) if visit is visits[0] else x for site, x in made[0].items()}
        _blocked(model, own, crossed, rows, held, made[1])
        moved = _blocked(model, own, moved, rows, held, made[2])
        if not all(close(made[1][site], made[2][site]) for site in held):
            raise ValueError(_read_more(kind, visit.name))
        if visit.closing:
            plain, moved = (model.leave(own, *run, NO_TAPS) for run in (plain, moved))
    states = [
        replace(begin, visit=len(visits), resid=moved[0], parts=run[1]) for run in (plain, moved)
    ]
    if not close(*map(model.read_state, states)):
        raise ValueError(_read_more(kind, "the readout"))


def _moved(x: Tensor) -> Tensor:
    """Something else of the same size, which no norm takes away."""
    noise = torch.randn(x.shape, generator=seeded(0), dtype=torch.float32, device="cpu")
    return x + x.std() * noise.to(x)


def _read_more(kind: str, reader: str) -> str:
    return (
        f"an edge of a circuit is what a component adds to the stream for another, but {reader} of"
        f" this {kind} also reads earlier additions from elsewhere in the state; activation_patch"
        " and path_patch work on it"
    )


def _blocked(
    model: LoopedModel, visit: Visit, run: Run, rows: Rows, held: Parts, made: dict[str, Tensor]
) -> Run:
    """A run after a block.

    Args:
        run: The stream and the other parts.
        held: What attention and MLP add in place of their own, by site; empty for their own.
        made: Is given what they make.
    """

    def react(value: Tensor, site: str) -> Tensor | None:
        made[site] = value
        return held.get(site)

    taps = {site: watched(site, partial(react, site=site)) for site in ADDED.values()}
    return model.visit_block(visit, *run, rows, taps)


def graph_with(model: LoopedModel, batch: Batch, circuits: Sequence[Circuit]) -> Graph:
    """The graph in which circuits lie: with heads where it then has as many edges as theirs.

    Raises:
        ValueError: Circuits of several lengths or graphs, of another model, or of inputs with other
            positions.
    """
    if not circuits:
        raise ValueError("at least one circuit is needed, got none")
    lengths = sorted({circuit.n_loops for circuit in circuits})
    if len(lengths) > 1:
        raise ValueError(f"all circuits must have the same iterations, got n_loops={lengths}")
    n_edges, positions = circuits[0].n_possible, circuits[0].positions
    for heads in (None, False):
        graph = graph_of(model, batch, lengths[0], heads, positions is not None)
        if graph.positions != positions:
            raise ValueError(
                f"a circuit by position holds for inputs of one kind: it is of {positions}, but the"
                f" inputs have {graph.positions}"
            )
        if graph.n_edges == n_edges:
            break
    for circuit in circuits:
        if circuit.positions != positions:
            raise ValueError(
                "all circuits must be by the same positions, or all over all positions, but one"
                f" has {positions} and another {circuit.positions}"
            )
        if circuit.n_possible != graph.n_edges:
            raise ValueError(
                f"every circuit must be one of this model's graph of {graph.n_edges} edges, but"
                f" one is of a graph of {circuit.n_possible}"
            )
    return graph


def aligned(batch: Batch) -> bool:
    """Whether all inputs have one length and are read at one position."""
    same = (batch.mask == batch.mask[:1]).all() and (batch.readout == batch.readout[:1]).all()
    return bool(same)


def positions_of(model: LoopedModel, batch: Batch) -> Positions:
    """The positions of inputs that are alike position by position.

    Raises:
        ValueError: Inputs of several lengths, or that are read at several positions.
    """
    if not aligned(batch):
        raise ValueError(
            "a circuit by position needs inputs of one length that are read at one position, but"
            f" these have {sorted(set(batch.mask.sum(1).tolist()))} tokens and are read at"
            f" {sorted(set(batch.readout.tolist()))}; give those of one length"
        )
    causal = (
        model.causal and begin_batch(model, sample_of(model, batch), 1).tags is None
    )  # no prefix both ways
    return Positions(batch.tokens.shape[1], int(batch.readout[0]), causal)


def _graph(
    visits: list[Visit], n_loops: int, heads: bool, positions: Positions | None = None
) -> Graph:
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
        positions,
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
        seen = collect(model, sample_of(model, batch), names, n_loops).values
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
