"""The names of a circuit's nodes and edges, made of hook names so that they can be copied.

A node is "embed", "final" (the final norm and the head), or a visit's name with a component behind
it: "loops.2.blocks.0.mlp", "loops.2.blocks.0.attn", or one head, "loops.2.blocks.0.attn.3". Where
heads 2 and 3 share their keys and values, "loops.2.blocks.0.attn.2-3" is the part that makes those.
A reader is a node, and for a head the node with the input that it reads: "….attn.3.q".

In a circuit by position the position stands behind all that: "loops.2.blocks.0.attn.3.k@4". A
writer at a position is what it adds to the stream there; a reader at a position reads the stream
there, so both ends of an edge are at one position. A head moves information between positions
inside: its result at a position is made of its queries there and of its keys and values at every
position that it attends to.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

EMBED, FINAL = "embed", "final"
HEAD_INPUTS = ("q", "k", "v")
Order = tuple[int, int, int, int, int]


class Edge(NamedTuple):
    """An edge of a circuit: the output of one component, as one later component reads it.

    Attributes:
        writer: The node that writes into the residual stream.
        reader: The node that reads. For a head its input stands behind the node: ".q", ".k" or
            ".v".
    """

    writer: str
    reader: str

    @property
    def text(self) -> str:
        """Both names in one text with an arrow between them, as pages show and copy them."""
        return f"{self.writer} → {self.reader}"

    @classmethod
    def from_text(cls, text: str) -> Edge:
        """Make the edge from such a text; "->" may stand for the arrow.

        Raises:
            ValueError: The text is not two names with one arrow between them.
        """
        names = [name.strip() for name in text.replace("->", "→").split("→")]
        if len(names) != 2 or not all(names):
            raise ValueError(
                "an edge is two names with an arrow between them, such as 'embed → final', got"
                f" {text!r}"
            )
        return cls(*names)


class Positions(NamedTuple):
    """The positions of a circuit by position.

    Attributes:
        size: How many the inputs have.
        readout: The one at which the answer is read.
        causal: Whether attention at a position reads no later one.
    """

    size: int
    readout: int
    causal: bool

    def reached(self, position: int) -> range:
        """The positions at which attention can read a position."""
        return range(position if self.causal else 0, self.size)


class ScheduleEntry(NamedTuple):
    """One visit of the schedule that a circuit lies in.

    Attributes:
        name: The visit's name, e.g. "loops.2.blocks.0".
        loop, layer: Its coordinates, from 0; None where it has no such coordinate.
        block: The module that holds the visit's weights, e.g. "blocks.0"; visits that share it
            have one name here.
    """

    name: str
    loop: int | None
    layer: int | None
    block: str


class End(NamedTuple):
    """The parts of the name of a writer or a reader.

    Attributes:
        node: The node, with its position if it has one.
        visit: The visit's name; empty for "embed" and "final".
        component: "embed", "final", "mlp", "attn", "attn.3" or "attn.2-3".
        input: "q", "k" or "v" for a reader at a head, else empty.
        position: The position of the node; None in a circuit over all positions.
    """

    node: str
    visit: str
    component: str
    input: str
    position: int | None

    def order(self, visits: Mapping[str, int]) -> Order:
        """When it runs: the visit, attention or MLP, queries, keys or values, the head, the
        position.

        Args:
            visits: The visits' numbers.
        """
        ends = {EMBED: -1, FINAL: len(visits)}
        visit = visits[self.visit] if self.visit else ends[self.component]
        head = self.component.removeprefix("attn.").partition("-")[0]
        read = "qkv".index(self.input) if self.input else 0
        number = int(head) if head.isdecimal() else 0
        return (visit, int(self.component == "mlp"), read, number, self.position or 0)

    def feeds(self, positions: Positions | None) -> tuple[str, ...]:
        """The nodes whose outputs depend on what is read here: the node, or the heads that share
        it; and where attention reads keys and values also those at the positions that see them.

        Args:
            positions: Of the circuit.
        """
        first, _, last = self.component.removeprefix("attn.").partition("-")
        nodes = [self.node.partition("@")[0]]
        if last:
            nodes = [f"{self.visit}.attn.{head}" for head in range(int(first), int(last) + 1)]
        if self.position is None or positions is None:
            return tuple(nodes)
        moves = self.component.startswith("attn") and self.input != "q"
        reached = positions.reached(self.position) if moves else [self.position]
        return tuple(placed(node, at) for node in nodes for at in reached)


def placed(name: str, position: int | None) -> str:
    """A writer's or reader's name at a position."""
    return name if position is None else f"{name}@{position}"


@cache
def end_of(name: str) -> End:
    """A writer's or reader's name, taken apart.

    Raises:
        ValueError: It is no such name.
    """
    whole, mark, at = name.partition("@")
    node, _, last = whole.rpartition(".")
    node, read = (node, last) if last in HEAD_INPUTS else (whole, "")
    steps = node.split(".")
    first = len(steps) - (1 if steps[-1] in ("attn", "mlp") else 2)
    known = node in (EMBED, FINAL) or (first >= 1 and steps[first] in ("attn", "mlp"))
    if not known or bool(mark) != at.isdecimal():
        raise ValueError(
            "a node is 'embed', 'final', or a visit's name with 'attn', 'attn.HEAD' or 'mlp' behind"
            f" it, and in a circuit by position '@POSITION' behind that, got {name!r}"
        )
    position = int(at) if mark else None
    if node in (EMBED, FINAL):
        return End(placed(node, position), "", node, read, position)
    return End(
        placed(node, position), ".".join(steps[:first]), ".".join(steps[first:]), read, position
    )
