"""The names of a circuit's nodes and edges, made of hook names so that they can be copied.

A node is "embed", "final" (the final norm and the head), or a visit's name with a component behind
it: "loops.2.blocks.0.mlp", "loops.2.blocks.0.attn", or one head, "loops.2.blocks.0.attn.3". Where
heads 2 and 3 share their keys and values, "loops.2.blocks.0.attn.2-3" is the part that makes those.
A reader is a node, and for a head the node with the input that it reads: "….attn.3.q".
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

EMBED, FINAL = "embed", "final"
HEAD_INPUTS = ("q", "k", "v")


class Edge(NamedTuple):
    """The output of one component as one later component reads it.

    Attributes:
        writer: The node that writes into the residual stream.
        reader: The node that reads; for a head with the input behind it, ".q", ".k" or ".v".
    """

    writer: str
    reader: str


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
    """A writer or a reader, taken apart.

    Attributes:
        node: The node.
        visit: The visit's name; empty for "embed" and "final".
        component: "embed", "final", "mlp", "attn", "attn.3" or "attn.2-3".
        input: "q", "k" or "v" for a reader at a head, else empty.
    """

    node: str
    visit: str
    component: str
    input: str

    @property
    def writers(self) -> tuple[str, ...]:
        """The nodes whose outputs depend on what is read here: the node, or the heads that share
        it.
        """
        first, _, last = self.component.removeprefix("attn.").partition("-")
        if not last:
            return (self.node,)
        return tuple(f"{self.visit}.attn.{head}" for head in range(int(first), int(last) + 1))


@cache
def end_of(name: str) -> End:
    """A writer's or reader's name, taken apart.

    Raises:
        ValueError: It is no such name.
    """
    node, _, last = name.rpartition(".")
    node, read = (node, last) if last in HEAD_INPUTS else (name, "")
    if node in (EMBED, FINAL):
        return End(node, "", node, read)
    steps = node.split(".")
    first = len(steps) - (1 if steps[-1] in ("attn", "mlp") else 2)
    if first < 1 or steps[first] not in ("attn", "mlp"):
        raise ValueError(
            "a node is 'embed', 'final', or a visit's name with 'attn', 'attn.HEAD' or 'mlp' behind"
            f" it, got {name!r}"
        )
    return End(node, ".".join(steps[:first]), ".".join(steps[first:]), read)
