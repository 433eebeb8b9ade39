"""The record of a circuit: named nodes, edges with a score each, and the call that found them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from loopscope.interp.circuits.names import Edge, End, Order, Positions, ScheduleEntry, end_of
from loopscope.interp.common.shown import OneScreen
from loopscope.models.basis.files import atomic_path

if TYPE_CHECKING:
    import plotly.graph_objects as go

_KIND, _VERSION = "loopscope circuit", 1
Setting = str | int | float | bool | list[Any] | None


@dataclass(frozen=True)
class CircuitCall:
    """How a circuit was found.

    Attributes:
        method: How its edges were scored: "eap", "eap-ig-inputs", "eap-ig-activations", "ig-edges",
            "exact", or a word of the caller's.
        metric: The metric's name.
        clean, corrupted: The metric of the two runs, as means over the batch.
        first_order_error: How far the scores of all edges into "final" (with "ig-edges" of all
            edges) are from the difference of the two metrics, as a share of it; None where no such
            sum was made.
        settings: What else was given to the scoring call, by name: text, numbers, bools, None, or
            lists of these. Numbers of numpy and PyTorch, arrays and tuples are turned into them.
        selection: How the edges were chosen, in words; empty for all edges.
        checkpoint: The checkpoint's name, where it is known.

    Raises:
        TypeError: A setting that a file cannot hold.
    """

    method: str
    metric: str
    clean: float | None = None
    corrupted: float | None = None
    first_order_error: float | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    selection: str = ""
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        plain = {name: _plain(name, value) for name, value in self.settings.items()}
        object.__setattr__(self, "settings", plain)
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", str(self.checkpoint))


def _plain(name: str, value: Any) -> Any:
    """A setting as a file holds it and gives it back: numbers of Python in the place of those of
    numpy or PyTorch, lists in the place of arrays and tuples.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(name, each) for each in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(
        "a circuit's setting must be text, a number, a bool, None, or a list of these, got"
        f" {name}={value!r}"
    )


@dataclass(frozen=True)
class Circuit(OneScreen):
    """Edges between components of all iterations.

    Attributes:
        edges: By reader, in the order in which readers read, then by writer; edges given in another
            order are put into this one. See `Edge` for the names.
        scores: One number per edge.
        call: How it was found.
        n_loops: Iterations of the runs.
        schedule: The visits of the runs, in order.
        n_possible: The edges of the whole graph.
        positions: Of the inputs, where nodes at different positions are different nodes.
    """

    edges: tuple[Edge, ...]
    scores: tuple[float, ...]
    call: CircuitCall
    n_loops: int
    schedule: tuple[ScheduleEntry, ...]
    n_possible: int
    positions: Positions | None = None

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.scores):
            raise ValueError(
                f"a circuit needs one score per edge, got {len(self.edges)} edges and"
                f" {len(self.scores)} scores"
            )
        if not all(map(math.isfinite, self.scores)):
            raise ValueError(
                "a circuit's scores must be finite numbers, but some are not; see that the metric"
                " is finite on both runs"
            )
        if len(set(self.edges)) != len(self.edges):
            raise ValueError(
                f"a circuit's edges must differ, got {len(self.edges) - len(set(self.edges))} twice"
            )
        ends = {name: end_of(name) for name in dict.fromkeys(chain.from_iterable(self.edges))}
        _check_visits(self, ends)
        _check_positions(self, ends)
        order = sorted(range(len(self.edges)), key=_when(self, ends).__getitem__)
        for field_, values in (("edges", self.edges), ("scores", self.scores)):
            object.__setattr__(self, field_, tuple(values[number] for number in order))

    def __len__(self) -> int:
        return len(self.edges)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node at either end of an edge, in the order of the run."""
        names = set(chain.from_iterable(self.edges))
        return self.in_order(end_of(name).node for name in names)

    def in_order(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Nodes in the order of the run, each once."""
        return tuple(sorted(set(nodes), key=lambda node: (end_of(node).order(self._visits), node)))

    def feeds(self, reader: str) -> tuple[str, ...]:
        """The nodes whose outputs depend on what a reader reads; see `End.feeds`."""
        return end_of(reader).feeds(self.positions)

    def passed_on(self, reader: str) -> tuple[str, ...]:
        """Those of these nodes that write in this circuit; all of them where none does."""
        found = self.feeds(reader)
        return tuple(node for node in found if node in self._writing) or found

    @property
    def share(self) -> float:
        """The circuit's edges as a share of the whole graph's."""
        return len(self.edges) / self.n_possible

    def take(self, chosen: Sequence[int], selection: str) -> Circuit:
        """The circuit of some of the edges.

        Args:
            chosen: The edges' numbers.
            selection: How they were chosen, in words.
        """
        kept = sorted(chosen)
        return replace(
            self,
            edges=tuple(self.edges[i] for i in kept),
            scores=tuple(self.scores[i] for i in kept),
            call=replace(self.call, selection=selection),
        )

    def away_from(self, node: str) -> list[int]:
        """The numbers of the edges that have a node at neither end."""
        ends = [(edge.writer, end_of(edge.reader).node) for edge in self.edges]
        return [number for number, pair in enumerate(ends) if node not in pair]

    def frame(self) -> pd.DataFrame:
        """The same as `unrolled`."""
        return self.unrolled()

    def unrolled(self) -> pd.DataFrame:
        """One row per edge: writer, writer_visit, writer_loop, writer_layer, writer_component, the
        same of the reader, input ("q", "k", "v" of a head, else empty), position (missing in a
        circuit over all positions), distance (iterations from writer to reader, missing outside the
        loop), score.
        """
        places = {place.name: place for place in self.schedule} | {
            "": ScheduleEntry("", None, None, "")
        }
        parts = ("", "_visit", "_loop", "_layer", "_component")
        sides = [f"{side}{part}" for side in ("writer", "reader") for part in parts]
        rows = []
        for edge in self.edges:
            writer, reader = (end_of(name) for name in edge)
            at = [(end, places[end.visit]) for end in (writer, reader)]
            cells = [(e.node, e.visit, p.loop, p.layer, e.component) for e, p in at]
            rows.append((*cells[0], *cells[1], reader.input, reader.position))
        frame = pd.DataFrame(rows, columns=[*sides, "input", "position"])
        whole = [column for column in sides if column.endswith(("_loop", "_layer"))]
        frame = frame.astype(dict.fromkeys([*whole, "position"], "Int64"))
        distance = frame["reader_loop"] - frame["writer_loop"]
        return frame.assign(distance=distance, score=pd.Series(self.scores, dtype="float64"))

    def folded(self) -> pd.DataFrame:
        """One row per component of the shared blocks: component (the block's module with the
        component behind it), loops (the iterations in which it acts), visits (how many times it
        acts), edges_in, edges_out, score (the sum of the absolute scores of its edges out; for
        what writes nothing itself, "final" and shared keys and values, of its edges in).
        """
        frame = self.unrolled().assign(size=1)
        frame["score"] = frame["score"].abs()
        into, out = (frame.groupby(side)[["size", "score"]].sum() for side in ("reader", "writer"))
        nodes = pd.DataFrame({"node": self.nodes})
        nodes["component"] = [self.folded_name(node) for node in self.nodes]
        nodes["visit"] = [end_of(node).visit for node in self.nodes]
        nodes["loop"] = nodes["visit"].map({place.name: place.loop for place in self.schedule})
        for name, side in (("edges_in", into), ("edges_out", out)):
            nodes[name] = nodes["node"].map(side["size"]).fillna(0).astype(int)
        counted = nodes["node"].map(out["score"]).fillna(nodes["node"].map(into["score"]))
        groups = nodes.assign(score=counted).groupby("component", sort=False)
        return groups.agg(
            loops=("loop", _loops),
            visits=("visit", "nunique"),
            edges_in=("edges_in", "sum"),
            edges_out=("edges_out", "sum"),
            score=("score", "sum"),
        ).reset_index()

    def folded_edges(self) -> pd.DataFrame:
        """One row per edge between components of the shared blocks and per distance: writer,
        reader, input, distance (iterations), loops (of the reader), edges (how many were folded),
        score (their sum).
        """
        frame = self.unrolled()
        for side in ("writer", "reader"):
            frame[side] = [self.folded_name(name) for name in frame[side]]
        groups = frame.groupby(["writer", "reader", "input", "distance"], sort=False, dropna=False)
        return groups.agg(
            loops=("reader_loop", _loops), edges=("score", "size"), score=("score", "sum")
        ).reset_index()

    def folded_name(self, node: str) -> str:
        """A node's component of the shared block: its name without the iteration."""
        end = end_of(node)
        return f"{self._blocks[end.visit]}.{end.component}" if end.visit else end.component

    def end(self, name: str) -> End:
        """A node or a reader of the circuit, taken apart."""
        return end_of(name)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the strongest edges between visits, and the folded view."""
        from loopscope.interp.drawing.circuits import circuit

        return circuit(self, title)

    def save(self, path: str | Path) -> None:
        """Write the circuit as JSON, whole or not at all."""
        about = {"kind": _KIND, "version": _VERSION, "call": asdict(self.call)}
        rows = [(*edge, score) for edge, score in zip(self.edges, self.scores, strict=True)]
        about |= {"n_loops": self.n_loops, "n_possible": self.n_possible}
        about |= {"positions": self.positions, "schedule": self.schedule, "edges": rows}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(about, separators=(",", ":")) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds no circuit, or lacks a field.
        """
        try:
            about: Any = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ValueError(f"a circuit is a JSON file, but {path} is none: {error}") from None
        if not isinstance(about, dict) or about.get("kind") != _KIND:
            raise ValueError(f"{path} holds no circuit that Circuit.save wrote")
        if about.get("version") != _VERSION:
            raise ValueError(
                f"circuits of version {_VERSION} can be read, but {path} has version"
                f" {about.get('version')!r}"
            )
        try:
            rows, positions = about["edges"], about.get("positions")
            fields = (
                tuple(Edge(writer, reader) for writer, reader, _ in rows),
                tuple(float(score) for *_, score in rows),
                CircuitCall(**about["call"]),
                int(about["n_loops"]),
                tuple(ScheduleEntry(*place) for place in about["schedule"]),
                int(about["n_possible"]),
                None if positions is None else Positions(*positions),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the circuit in {path} lacks a field, or one is not what Circuit.save writes:"
                f" {error}"
            ) from None
        return cls(*fields)

    @cached_property
    def _blocks(self) -> dict[str, str]:
        return {place.name: place.block for place in self.schedule}

    @cached_property
    def _writing(self) -> frozenset[str]:
        return frozenset(edge.writer for edge in self.edges)

    @cached_property
    def _visits(self) -> dict[str, int]:
        return {place.name: index for index, place in enumerate(self.schedule)}


def _check_visits(circuit: Circuit, ends: Mapping[str, End]) -> None:
    """Every node is at a visit of the schedule."""
    known = {place.name for place in circuit.schedule} | {""}
    for name, end in ends.items():
        if end.visit not in known:
            raise ValueError(
                f"a node's visit must be one of the schedule with n_loops={circuit.n_loops}, but"
                f" {name!r} is at none"
            )


def _check_positions(circuit: Circuit, ends: Mapping[str, End]) -> None:
    """Both ends of an edge are at one of the positions, or at none where there are none."""
    known = {None} if circuit.positions is None else set(range(circuit.positions.size))
    at = {name: end.position for name, end in ends.items()}
    for edge in circuit.edges:
        if at[edge.writer] != at[edge.reader] or at[edge.writer] not in known:
            where = "no position" if circuit.positions is None else f"one of {circuit.positions}"
            raise ValueError(
                f"both ends of an edge must be at {where}, got {edge.writer} -> {edge.reader}"
            )


def _when(circuit: Circuit, ends: Mapping[str, End]) -> list[tuple[Order, Order]]:
    """When each edge runs: the reader's order without the position, then the writer's."""
    orders = {name: end.order(circuit._visits) for name, end in ends.items()}
    readers = {name: (*order[:-1], 0) for name, order in orders.items()}
    return [(readers[edge.reader], orders[edge.writer]) for edge in circuit.edges]


def _loops(values: pd.Series) -> tuple[int, ...]:
    """The iterations in a column, each once."""
    return tuple(sorted({int(value) for value in values if not pd.isna(value)}))
