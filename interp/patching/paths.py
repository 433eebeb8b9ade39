"""Path patching: what one component sends to another along the residual stream alone, with the
iteration as an axis.

The three runs of Wang et al. 2022 (arXiv 2211.00593), section 3.1 and appendix B, are in
`interp.path_runs`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn
from loopscope.interp.common.metrics import measure, metric_name
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Direction, Pair, base_and_source
from loopscope.interp.common.places import Where, chosen_visits, heads_at
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.patching.path_ends import (
    RECEIVED,
    SENT,
    PathEnd,
    Receiver,
    Sender,
    end_of_path,
)
from loopscope.interp.patching.path_runs import PathRuns
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

Freeze = Literal["attention+mlp", "attention"]
_FROZEN: dict[str, tuple[str, ...]] = {
    "attention+mlp": ("hook_attn_out", "hook_mlp_out"),
    "attention": ("hook_attn_out",),
}


@dataclass(frozen=True)
class PathPatch(OneScreen):
    """The metric of each example with one path patched.

    Attributes:
        sender: The component at which the path starts.
        receivers: The components at which it ends.
        values: Float[Tensor, " batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise" is the corrupted run with the path of the clean run, "noise" the
            reverse.
        freeze: The components that were held fixed between sender and receivers.
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
        """How far the path moves the metric, in the metric's unit: the patched run minus the run
        that was patched.
        """
        return self.values - (self.corrupted if self.direction == "denoise" else self.clean)

    def frame(self) -> pd.DataFrame:
        """One row per example. The columns are sender, receivers, example, metric (its name),
        clean, corrupted and value (of the patched run).
        """
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

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the metric of each example in the clean, the corrupted and the patched run."""
        from loopscope.interp.drawing.effects import path

        return path(self, title)


@torch.no_grad()
@evaluated
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
    """Patch the path from one component to others, and measure the answer.

    Only the direct path changes: each receiver gets its input as if the sender had had the source
    run's output, while the components between them are held fixed. All receivers are patched in one
    run, each with the other receivers held fixed, so a path through one receiver to another does
    not count. Norms are recomputed, so the result is exact in every family. If a family changes the
    residual stream between blocks (by an injected input, or a norm at an iteration's end), that
    change is part of the path. All rows run as one batch.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or token
            ids.
        readout: For token ids, the column at which answers are read.
        metric: A function from the logits at the answer position, Float[Tensor, "batch d_vocab"],
            to one number per row, such as `logit_diff(right, wrong)`.
        sender: The component whose output comes from the source run (the clean run for "denoise").
        receivers: One component or several, each later than the sender; or `Receiver("readout")`
            alone.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        direction: "denoise" patches the path of the clean run into the corrupted run, "noise" the
            reverse.
        freeze: The components that are held fixed between sender and receivers. "attention+mlp"
            leaves only the residual stream as the path. "attention" recomputes MLPs, so that paths
            through them count too, as in the IOI paper.

    Returns:
        The metric of the patched run, and of the two runs without a patch.

    Raises:
        ValueError: The two inputs have different shapes, a place is out of range, or a receiver is
            not later than the sender.

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
@evaluated
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
    """Patch the paths from many senders, one by one, to the same receivers.

    Args:
        clean, corrupted, metric, receivers, n_loops, direction, freeze, readout: The runs and the
            receivers, as `path_patch` describes them.
        senders: The components to start from; None means each head and each MLP of every iteration
            that is earlier than all receivers.
        batch_size: How many rows run side by side.

    Returns:
        A table with one row per sender. Its columns are kind, visit, loop, layer, head, position,
        receivers, metric (its name), clean, corrupted and value (of the patched run). The last
        three are means over the batch.

    Raises:
        ValueError: No sender is earlier than the receivers, or `path_patch` would refuse the call.
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
    visits = [paths.sent(sender).visit for sender in chosen]
    places = [
        (sender.kind, visit.name, visit.loop, visit.layer, sender.head, sender.position)
        for sender, visit in zip(chosen, visits, strict=True)
    ]
    frame = pd.DataFrame(places, columns=["kind", "visit", "loop", "layer", "head", "position"])
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
        found = tuple(
            end_of_path(model, n_loops, width, receiver, RECEIVED)
            for receiver in ends
            if receiver.kind != "readout"
        )
        order = {name: place for place, name in enumerate(model.hook_names(n_loops))}
        return cls(
            pair, ends, PathRuns(model, base, source, found, _FROZEN[freeze], n_loops, order)
        )

    def values(
        self, senders: Sequence[Sender], metric: Metric, batch_size: int
    ) -> Float[Tensor, "sender batch"]:
        """The metric of each sender's patched run."""
        found = [self.sent(sender) for sender in senders]
        for sender, sent in zip(senders, found, strict=True):
            # the readout is no visit, and nothing is later than it
            late = [
                receiver
                for receiver, into in zip(self.receivers, self.runs.receivers, strict=False)
                if not self._earlier(sent, into)
            ]
            if late:
                raise ValueError(
                    f"a receiver must come later in the run than the sender, but ({late[0]}) is not"
                    f" later than ({sender})"
                )
        return self.runs.values(found, metric, batch_size)

    def unpatched(self, metric: Metric) -> tuple[Tensor, Tensor]:
        """The metric of the clean and of the corrupted run."""
        clean, corrupted = (
            measure(metric, self.runs.unpatched(batch))
            for batch in (self.pair.clean, self.pair.corrupted)
        )
        return clean, corrupted

    def earlier_senders(self) -> list[Sender]:
        """Each head and each MLP inside the loop that is earlier than all receivers."""
        everything: list[Sender] = []
        model = self.runs.model
        for visit in chosen_visits(model, self.runs.n_loops, Where(loops="all")):
            heads = range(heads_at(visit))
            everything += [Sender("head", head=head, visit=visit.name) for head in heads]
            everything.append(Sender("mlp", visit=visit.name))
        return [
            sender
            for sender in everything
            if all(self._earlier(self.sent(sender), into) for into in self.runs.receivers)
        ]

    def sent(self, sender: Sender) -> PathEnd:
        """A sender in the run."""
        width = self.runs.base.tokens.shape[1]
        return end_of_path(self.runs.model, self.runs.n_loops, width, sender, SENT)

    def _earlier(self, sender: PathEnd, receiver: PathEnd) -> bool:
        return self.runs.order[sender.name] < self.runs.order[receiver.name]
