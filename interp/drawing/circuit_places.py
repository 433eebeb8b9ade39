"""The places of a circuit's nodes, lines and ticks in its picture, before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopscope.interp.drawing.labels import tick, visible

if TYPE_CHECKING:
    from loopscope.interp.circuits.record import Circuit

EMBED, FINAL = "embed", "final"
_STEPS = 12  # points of a curved line


@dataclass(frozen=True)
class Spot:
    """The place of a node in the unrolled view.

    Attributes:
        x: The visit's number, with an MLP a little behind its attention; -1 for "embed". In a
            circuit by position the position, with the components side by side.
        y: The component's row. In a circuit by position the visit's number, with an MLP a little
            above its attention; -1 for "embed".
    """

    x: float
    y: float


def components(circuit: Circuit) -> list[str]:
    """The components of any one visit: heads (or attention) first, then the MLP."""
    found = {end.component for end in map(circuit.end, circuit.nodes) if end.visit}
    return sorted(found, key=lambda name: (name == "mlp", [len(name), name]))


def spots(circuit: Circuit) -> dict[str, Spot]:
    """The place of every node."""
    rows = {name: row for row, name in enumerate(components(circuit))}
    visits = {place.name: number for number, place in enumerate(circuit.schedule)}
    middle = (len(rows) - 1) / 2
    found = {}
    for node in circuit.nodes:
        end = circuit.end(node)
        visit = float({EMBED: -1, FINAL: len(visits)}.get(end.component, visits.get(end.visit, 0)))
        row = float(rows.get(end.component, middle))
        if end.position is None:
            found[node] = Spot(visit + 0.3 * (end.component == "mlp"), row)
        else:
            beside = 0.8 * (row - middle) / max(1, len(rows))
            found[node] = Spot(end.position + beside, visit + 0.45 * (end.component == "mlp"))
    return found


def moves(circuit: Circuit) -> list[tuple[str, str]]:
    """The moves of heads between positions inside: the node that reads keys or values, and each
    node at another position that is fed by it and writes.
    """
    writers = {edge.writer for edge in circuit.edges}
    pairs = [
        (circuit.end(edge.reader).node, fed)
        for edge in circuit.edges
        for fed in circuit.passed_on(edge.reader)
        if fed in writers
    ]
    at = {name: circuit.end(name).position for pair in pairs for name in pair}
    return list(dict.fromkeys(pair for pair in pairs if at[pair[0]] != at[pair[1]]))


@dataclass(frozen=True)
class Axes:
    """The ticks of the unrolled view.

    Attributes:
        columns, rows: The name of each tick, by where it is.
        column, row: The axes' titles.
    """

    columns: dict[float, str]
    rows: dict[float, str]
    column: str
    row: str


def axes(circuit: Circuit, tokens: Sequence[str] = ()) -> Axes:
    """The ticks of the unrolled view.

    Args:
        tokens: Names of the positions, where they are known.
    """
    ticks = ["embed", *(tick(place.name) for place in circuit.schedule), "final"]
    visits = {float(number - 1): name for number, name in enumerate(ticks)}
    if circuit.positions is None:
        rows = {float(row): name for row, name in enumerate(components(circuit))}
        return Axes(visits, rows, "visit (loop.block)", "")
    count = circuit.positions.size
    words = [f"{at} {visible(token)}" for at, token in enumerate(tokens)] or map(str, range(count))
    columns = {float(at): word for at, word in enumerate(words)}
    return Axes(columns, visits, "position", "visit (loop.block)")


def curve(record: Circuit, at: Mapping[str, Spot], number: int) -> list[tuple[float, float]]:
    """The points of an edge's line from its writer to its reader.

    Args:
        at: The place of every node, from `spots`.
        number: The edge's.
    """
    edge = record.edges[number]
    start, end = at[edge.writer], at[record.end(edge.reader).node]
    bow = 0.12 * math.sqrt(abs(end.x - start.x)) * (1 if start.y == end.y else 0.5)
    aside = 0.05 * math.sqrt(abs(end.y - start.y)) if record.positions else 0.0
    shares = [step / _STEPS for step in range(_STEPS + 1)]
    return [
        (
            start.x + share * (end.x - start.x) + 4 * aside * share * (1 - share),
            start.y + share * (end.y - start.y) + 4 * bow * share * (1 - share),
        )
        for share in shares
    ]
