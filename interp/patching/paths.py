"""Path patching: what one component sends to another along the residual stream alone, with the
iteration as an axis.

The three runs of Wang et al. 2022 (arXiv 2211.00593), section 3.1 and appendix B, are in
`interp.path_runs`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.cells import in_range
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import metric_name
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import visits_at
from loopscope.interp.patching.path_runs import PathRuns, Spot
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

Freeze = Literal["attention+mlp", "attention"]
_SENT = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
_ADDED = {"head": _SENT["attn"]}  # a head is in the residual stream once its attention's output is
_RECEIVED = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_out"}
_FROZEN: dict[str, tuple[str, ...]] = {
    "attention+mlp": ("hook_attn_out", "hook_mlp_out"),
    "attention": ("hook_attn_out",),
}


@dataclass(frozen=True)
class Sender:
    """Whose output is taken from the source run.

    Attributes:
        kind: "head" (at attn.hook_z), "attn" or "mlp" (what it adds to the residual stream).
        loop, layer: Where it is, from 0.
        head: The head, for kind "head" only.
        position: The column that is sent; None for all.
    """

    kind: Literal["head", "attn", "mlp"]
    loop: int
    layer: int
    head: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SENT:
            raise ValueError(f"a sender's kind must be 'head', 'attn' or 'mlp', got {self.kind!r}")
        if (self.head is None) != (self.kind != "head"):
            raise ValueError(f"head= must be given for kind 'head' and only then, got {self}")

    def __str__(self) -> str:
        return _words(self.kind, self.loop, self.layer, self.head, self.position)


@dataclass(frozen=True)
class Receiver:
    """Whose input the path ends in.

    Attributes:
        kind: "q", "k" or "v" of attention, "mlp" (an MLP's input), or "readout" (the final logits;
            it stands alone).
        loop, layer: Where it is, from 0; None for the readout.
        head: The head (for k and v the key-value head); None for all, and where there are none.
        position: The column that receives; None for all.
    """

    kind: Literal["q", "k", "v", "mlp", "readout"]
    loop: int | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*_RECEIVED, "readout"):
            raise ValueError(
                f"a receiver's kind must be 'q', 'k', 'v', 'mlp' or 'readout', got {self.kind!r}"
            )
        place = (self.loop, self.layer)
        if self.kind == "readout" and (*place, self.head, self.position) != (None,) * 4:
            raise ValueError(f"the readout has no loop, layer, head or position, got {self}")
        if self.kind != "readout" and None in place:
            raise ValueError(f"a receiver needs loop= and layer=, got {self}")
        if self.kind == "mlp" and self.head is not None:
            raise ValueError(f"an MLP has no heads, got {self}")

    def __str__(self) -> str:
        return _words(self.kind, self.loop, self.layer, self.head, self.position)


def _words(
    kind: str, loop: int | None, layer: int | None, head: int | None, position: int | None
) -> str:
    places = {"loop": loop, "layer": layer, "head": head, "position": position}
    return " ".join(
        [kind, *(f"{name} {number}" for name, number in places.items() if number is not None)]
    )


@dataclass(frozen=True)
class PathPatch:
    """The metric with one path patched.

    Attributes:
        sender: Where the path starts.
        receivers: Where it ends.
        values: Float[Tensor, " batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise": the corrupted run with the path of the clean one; "noise": the
            reverse.
        freeze: What was held between sender and receivers.
    """

    sender: Sender
    receivers: tuple[Receiver, ...]
    values: Float[Tensor, " batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str
    direction: Direction
    freeze: Freeze

    def effect(self) -> Float[Tensor, " batch"]:
        """How far the path moves the metric from the run that it is patched into."""
        return self.values - (self.corrupted if self.direction == "denoise" else self.clean)

    def frame(self) -> pd.DataFrame:
        """One row per example: sender, receivers, example, metric, clean, corrupted, value."""
        columns = {"clean": self.clean, "corrupted": self.corrupted, "value": self.values}
        frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        told = {
            "sender": str(self.sender),
            "receivers": _listed(self.receivers),
            "example": range(len(frame)),
            "metric": self.metric,
        }
        for place, (name, column) in enumerate(told.items()):
            frame.insert(place, name, column)
        return frame


@torch.no_grad()
def path_patch(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    sender: Sender,
    receivers: Receiver | Sequence[Receiver],
    n_loops: int | None = None,
    *,
    direction: Direction = "denoise",
    freeze: Freeze = "attention+mlp",
    readout: ReadoutColumn = None,
) -> PathPatch:
    """Patch the path from one component to others and measure the answer; exact in every family,
    norms are recomputed.

    All receivers are patched in one run. Each gets its new input with the others frozen, so paths
    through one receiver to another do not count. With a family that works on the residual stream
    between blocks (an injected input, a norm at an iteration's end), that work belongs to the path.
    The inputs are run as one batch.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or tokens
            with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, "
            batch"].
        sender: Takes its output from the source run (the clean one for "denoise").
        receivers: One or several, each later than the sender; or Receiver("readout") alone.
        n_loops: Iterations; None means what the checkpoint records.
        direction: "denoise" patches the path of the clean run into the corrupted one, "noise" the
            reverse.
        freeze: What is held at the base run between sender and receivers: "attention+mlp" leaves
            the residual stream alone as the path; "attention" lets MLPs recompute, so that paths
            through them count too, as in the IOI paper.

    Raises:
        ValueError: Inputs that do not match, a place out of range, or a receiver that is not later
            than the sender.

    Source:
        Wang et al. 2022 (arXiv 2211.00593); Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
    """
    paths = _Paths.of(
        model, Pair.of(model, clean, corrupted, readout), receivers, n_loops, direction, freeze
    )
    values = paths.values([sender], metric, batch_size=1)
    return PathPatch(
        sender,
        paths.receivers,
        values[0],
        *paths.unpatched(metric),
        metric_name(metric),
        direction,
        freeze,
    )


@torch.no_grad()
def path_patch_sweep(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    receivers: Receiver | Sequence[Receiver],
    n_loops: int | None = None,
    *,
    senders: Sequence[Sender] | None = None,
    direction: Direction = "denoise",
    freeze: Freeze = "attention+mlp",
    readout: ReadoutColumn = None,
    batch_size: int = 1024,
) -> pd.DataFrame:
    """Path patching from many senders, one by one, into the same receivers.

    Args:
        senders: None means each head and each MLP of every iteration that is earlier than all
            receivers.
        batch_size: Rows run side by side.
        clean, corrupted, metric, receivers, n_loops, direction, freeze, readout: As for
            `path_patch`.

    Returns:
        One row per sender: kind, loop, layer, head, position, receivers, metric, clean, corrupted,
        value (means over the batch).

    Raises:
        ValueError: As for `path_patch`, or no sender is earlier than the receivers.
    """
    paths = _Paths.of(
        model, Pair.of(model, clean, corrupted, readout), receivers, n_loops, direction, freeze
    )
    chosen = paths.earlier_senders() if senders is None else list(senders)
    if not chosen:
        raise ValueError(
            f"no sender is earlier than all of the receivers ({_listed(paths.receivers)})"
        )
    values = paths.values(chosen, metric, batch_size)
    places = [
        (sender.kind, sender.loop, sender.layer, sender.head, sender.position) for sender in chosen
    ]
    frame = pd.DataFrame(places, columns=["kind", "loop", "layer", "head", "position"])
    frame = frame.astype({column: "Int64" for column in ("loop", "layer", "head", "position")})
    frame["receivers"], frame["metric"] = _listed(paths.receivers), metric_name(metric)
    frame["clean"], frame["corrupted"] = (run.mean().item() for run in paths.unpatched(metric))
    frame["value"] = values.mean(1).cpu().numpy()
    return frame


def _listed(receivers: Sequence[Receiver]) -> str:
    return ", ".join(map(str, receivers))


@dataclass(frozen=True)
class _Paths:
    """All paths of two inputs into one set of receivers."""

    pair: Pair
    receivers: tuple[Receiver, ...]
    runs: PathRuns

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        pair: Pair,
        receivers: Receiver | Sequence[Receiver],
        n_loops: int | None,
        direction: Direction,
        freeze: Freeze,
    ) -> _Paths:
        base, source = base_and_source(direction, pair.clean, pair.corrupted)
        if freeze not in _FROZEN:
            raise ValueError(f"freeze must be 'attention+mlp' or 'attention', got {freeze!r}")
        n_loops = checked_loops(n_loops, model.cfg.n_loops)
        ends = (receivers,) if isinstance(receivers, Receiver) else tuple(receivers)
        if not ends:
            raise ValueError("at least one receiver is needed, got none")
        if len(ends) > 1 and any(receiver.kind == "readout" for receiver in ends):
            raise ValueError(
                "the readout comes after all other receivers, so it must stand alone, got"
                f" {_listed(ends)}"
            )
        width = base.tokens.shape[1]
        spots = tuple(
            _spot(model, n_loops, width, receiver, _RECEIVED)
            for receiver in ends
            if receiver.kind != "readout"
        )
        order = {name: place for place, name in enumerate(model.hook_names(n_loops))}
        return cls(
            pair, ends, PathRuns(model, base, source, spots, _FROZEN[freeze], n_loops, order)
        )

    def values(
        self, senders: Sequence[Sender], metric: Metric, batch_size: int
    ) -> Float[Tensor, "sender batch"]:
        """The metric of each sender's patched run."""
        spots = [self._sent(sender) for sender in senders]
        for sender, spot in zip(senders, spots, strict=True):
            # the readout has no spot, and nothing is later than it
            late = [
                receiver
                for receiver, into in zip(self.receivers, self.runs.receivers, strict=False)
                if not self._earlier(spot, into)
            ]
            if late:
                raise ValueError(
                    f"a receiver must come later in the run than the sender, but ({late[0]}) is not"
                    f" later than ({sender})"
                )
        return self.runs.values(spots, metric, batch_size)

    def unpatched(self, metric: Metric) -> tuple[Tensor, Tensor]:
        """The metric of the clean and of the corrupted run."""
        return metric(self.runs.unpatched(self.pair.clean)), metric(
            self.runs.unpatched(self.pair.corrupted)
        )

    def earlier_senders(self) -> list[Sender]:
        """Each head and each MLP inside the loop that is earlier than all receivers."""
        everything: list[Sender] = []
        for visit in visits_at(self.runs.model, self.runs.n_loops, "all", "all"):
            assert visit.loop is not None, "visits_at gives visits inside the loop"
            heads = [
                Sender("head", visit.loop, visit.layer, head)
                for head in range(self.runs.model.cfg.n_heads)
            ]
            everything += [*heads, Sender("mlp", visit.loop, visit.layer)]
        return [
            sender
            for sender in everything
            if all(self._earlier(self._sent(sender), into) for into in self.runs.receivers)
        ]

    def _sent(self, sender: Sender) -> Spot:
        return _spot(
            self.runs.model, self.runs.n_loops, self.runs.base.tokens.shape[1], sender, _SENT
        )

    def _earlier(self, sender: Spot, receiver: Spot) -> bool:
        return self.runs.order[sender.name] < self.runs.order[receiver.name]


def _spot(
    model: LoopedModel, n_loops: int, width: int, end: Sender | Receiver, sites: Mapping[str, str]
) -> Spot:
    """The place in the run of one end of the path."""
    assert end.loop is not None, "only the readout has no place"
    assert end.layer is not None, "only the readout has no place"
    visits = visits_at(model, n_loops, [end.loop], [end.layer])
    if len(visits) != 1 or sites[end.kind] not in visits[0].points:
        where = ", ".join(visit.name for visit in visits) or "none"
        raise ValueError(f"one visit with {sites[end.kind]} is needed for {end}, found {where}")
    if end.position is not None:
        in_range("positions", [end.position], width)
    if end.head is not None and end.kind in ("head", "q"):
        in_range("heads", [end.head], model.cfg.n_heads)
    name, added = (
        f"{visits[0].name}.{site}"
        for site in (sites[end.kind], _ADDED.get(end.kind, sites[end.kind]))
    )
    return Spot(name, added, visits[0].index, end.head, end.position)
