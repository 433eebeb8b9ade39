"""Does the way to the last state matter? The same input from the last state of another example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    in_chunks,
    rows_at_once,
    sample_of,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dynamics.changes import checked_start, floating, varying
from loopscope.interp.dynamics.starts import RunEnd, apart, ended
from loopscope.interp.dynamics.states import iteration_start
from loopscope.interp.dynamics.statistics import cosine_of
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class PathIndependence(OneScreen):
    """Whether the last state of an input depends on the state from which its iterations start.

    Attributes:
        other: Int[Tensor, " batch"], the example from whose last state the second run starts.
        cosine: Float[Tensor, " batch"], between the last states of the two runs, over all columns
            and parts together. 1 means that the starting state does not matter.
        distance: Float[Tensor, " batch"], the relative distance of the last states of the two runs,
            ||end' - end|| / ||end||.
        same_answer: Bool[Tensor, " batch"], whether both runs give the same top token.
    """

    other: Int[Tensor, " batch"]
    cosine: Float[Tensor, " batch"]
    distance: Float[Tensor, " batch"]
    same_answer: Bool[Tensor, " batch"]

    def frame(self) -> pd.DataFrame:
        """One row per example. The columns are example, other, cosine, distance and same_answer."""
        columns = {
            "other": self.other,
            "cosine": self.cosine,
            "distance": self.distance,
            "same_answer": self.same_answer,
        }
        return tidy(columns, example=range(len(self.other)))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the cosine of each example's last states."""
        from loopscope.interp.drawing.stability import alignment

        return alignment(self, title)


@torch.no_grad()
@evaluated
def path_independence(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    batch_size: int = 512,
) -> PathIndependence:
    """Run each input twice, from its own first state and from the last state of another example,
    and compare the ends.

    The other example is the one before it; for the first example it is the last.

    Args:
        inputs: A `Batch`, texts, or token ids. There must be at least two examples, all of one
            length.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns that are compared: "real" for all tokens except padding, "readout"
            for the answer position, "all" for padding too, or a list of columns.
        batch_size: How many rows run at a time.

    Returns:
        The agreement of the two runs of each example.

    Raises:
        ValueError: There is a single example, the examples have unequal lengths, or the iterations
            of the model receive nothing of the input except the state.

    Source:
        The asymptotic alignment score of Anil et al. 2022 (arXiv 2211.09961).
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    if len(batch) < 2:
        raise ValueError("another example's last state is needed, so at least 2 examples, got 1")
    if len(lengths := batch.mask.sum(1).unique()) > 1:
        raise ValueError(
            "an example takes the last state of another, so all must have one length, got lengths"
            f" from {int(lengths[0])} to {int(lengths[-1])}; run those of one length at a time"
        )
    whole = varying(model, batch, positions, None)
    start = checked_start(model, batch, whole.names, None, n_loops)
    stops = iteration_start(model, start, n_loops), model.iteration_ends(n_loops)[-1]
    size = rows_at_once(model, batch, batch_size)
    _check_given(model, batch, whole.names, n_loops, stops[0])
    last: list[dict[str, Tensor]] = []
    for rows, free in zip(in_chunks(batch, size, "first runs"), whole.split(size), strict=True):
        end = model.advance(begin_batch(model, rows, n_loops), stops[1])
        last.append(dict(free.values(model, end)))
    shifted = {
        name: torch.cat([values[name] for values in last]).roll(1, 0).split(size)
        for name in whole.names
    }
    pairs = []
    for i, (rows, free) in enumerate(
        zip(in_chunks(batch, size, "second runs"), whole.split(size), strict=True)
    ):
        state = model.advance(begin_batch(model, rows, n_loops), stops[0])
        taken = _with(state, {name: values[i] for name, values in shifted.items()})
        first = ended(model, free, state, rows.readout, "state")
        pairs.append((first, ended(model, free, taken, rows.readout, "state")))
    own, other = (
        RunEnd(*(torch.cat([getattr(pair[k], name) for pair in pairs]) for name in RunEnd._fields))
        for k in (0, 1)
    )
    return PathIndependence(
        torch.arange(len(batch), device=model.device).roll(1, 0),
        cosine_of(other.state, own.state),
        apart(other.state[None], own.state)[0],
        own.answers == other.answers,
    )


def _with(state: State, values: Mapping[str, Tensor]) -> State:
    """The state with some of its parts replaced."""
    parts = {name: values.get(name, part) for name, part in state.parts.items()}
    return replace(state, resid=values.get("resid", state.resid), parts=parts)


def _check_given(
    model: LoopedModel, batch: Batch, names: tuple[str, ...], n_loops: int, stop: int
) -> None:
    """Refuse a model whose iterations receive nothing of the input except the state."""
    state = model.advance(begin_batch(model, sample_of(model, batch), n_loops), stop)
    if not set(floating(state)) - {"resid", *names}:
        raise ValueError(
            f"the iterations of this {type(model).__name__} receive nothing of the input except the"
            " state, so a run from another example's state only repeats that example's run"
        )
