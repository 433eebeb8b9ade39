"""The ends of a path: the component that sends its output, and the inputs that receive it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from loopscope.interp.common.places import Where, heads_at, one_in_range, one_visit
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit

SENT = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
_ADDED = {"head": SENT["attn"]}  # a head is in the residual stream once its attention's output is
RECEIVED = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_out"}


@dataclass(frozen=True)
class Sender:
    """The start of a path: the component whose output is taken from the source run.

    Attributes:
        kind: "head" (at attn.hook_z), "attn" or "mlp" (the output that is added to the residual
            stream).
        loop, layer: The iteration and the block, from 0.
        head: The head; for the kind "head" only.
        position: The column that is sent; None for all.
        visit: The name of the visit ("loops.0.low.1.blocks.0", "prelude.0") instead of loop and
            layer. It must be given if several visits share both.
    """

    kind: Literal["head", "attn", "mlp"]
    loop: int | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    visit: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in SENT:
            raise ValueError(f"a sender's kind must be 'head', 'attn' or 'mlp', got {self.kind!r}")
        _require_visit("a sender", self)
        if (self.head is None) != (self.kind != "head"):
            raise ValueError(f"head= must be given for kind 'head' and only then, got {self}")

    def __str__(self) -> str:
        return _words(self)


@dataclass(frozen=True)
class Receiver:
    """The end of a path: the component whose input is changed.

    Attributes:
        kind: "q", "k" or "v" of attention, "mlp" (the MLP's input), or "readout" (the final logits,
            which cannot be combined with other receivers).
        loop, layer: The iteration and the block, from 0; None for the readout.
        head: The head (for k and v the key-value head); None for all heads, and for kinds without
            heads.
        position: The column that receives; None for all.
        visit: The name of the visit instead of loop and layer. It must be given if several visits
            share both.
    """

    kind: Literal["q", "k", "v", "mlp", "readout"]
    loop: int | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None
    visit: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*RECEIVED, "readout"):
            raise ValueError(
                f"a receiver's kind must be 'q', 'k', 'v', 'mlp' or 'readout', got {self.kind!r}"
            )
        if self.kind != "readout":
            _require_visit("a receiver", self)
        elif any(getattr(self, field.name) is not None for field in fields(self)[1:]):
            raise ValueError(f"the readout has no loop, layer, head or position, got {self}")
        if self.kind == "mlp" and self.head is not None:
            raise ValueError(f"an MLP has no heads, got {self}")

    def __str__(self) -> str:
        return _words(self)


def _require_visit(what: str, end: Sender | Receiver) -> None:
    """Raise unless the end of a path has a visit: by its coordinates or by its name."""
    given = [end.loop is not None, end.layer is not None, end.visit is not None]
    if given not in ([True, True, False], [False, False, True]):
        raise ValueError(f"{what} needs loop= and layer=, or visit= alone, got {end}")


def _words(end: Sender | Receiver) -> str:
    axes = ("visit", "loop", "layer", "head", "position")
    numbers = [f"{axis} {getattr(end, axis)}" for axis in axes if getattr(end, axis) is not None]
    return " ".join([end.kind, *numbers])


def end_of_path(
    model: LoopedModel, n_loops: int, width: int, end: Sender | Receiver, sites: Mapping[str, str]
) -> PathEnd:
    """One end of the path in the run."""
    visit = one_visit(model, n_loops, Where(end.loop, end.layer, end.visit))
    site = sites[end.kind]
    if site not in visit.sites:
        raise ValueError(f"{visit.name} has no {site}, which {end} needs")
    if end.position is not None:
        one_in_range("positions", end.position, width)
    if end.head is not None and end.kind in ("head", "q"):
        one_in_range("heads", end.head, heads_at(visit))
    name, added = (f"{visit.name}.{point}" for point in (site, _ADDED.get(end.kind, site)))
    return PathEnd(name, added, visit, end.head, end.position)


@dataclass(frozen=True)
class PathEnd:
    """One end of a path in the run.

    Attributes:
        name: The hook point.
        added: The hook point at which the component's output is in the residual stream; for a head
            the output of its attention.
        visit: The visit of both.
        head, position: The head and the column that are sent or received; None for all.
    """

    name: str
    added: str
    visit: Visit
    head: int | None
    position: int | None
