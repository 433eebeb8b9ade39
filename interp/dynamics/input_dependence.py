"""Does the end of a run depend on the input, or on the state with which it began? A run that goes
on from another input's state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.pairs import Pair
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dynamics.statistics import norm_of
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.state import State, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class InputDependence(OneScreen):
    """The distances between three runs at the answer position: the runs of two inputs, and a mixed
    run.

    The mixed run has the tokens of the first input, but goes on from the state of the second. All
    distances are divided by the distance of the two inputs' states at the exchange.

    Attributes:
        iterations: How many iterations are run before each point. The first point is the exchange.
        to_input: Float[Tensor, "point batch"], from the state of the mixed run to that of the first
            input.
        to_start: Float[Tensor, "point batch"], from the state of the mixed run to that of the
            second input.
        apart: Float[Tensor, "point batch"], between the states of the two inputs.
    """

    iterations: tuple[int, ...]
    to_input: Float[Tensor, "point batch"]
    to_start: Float[Tensor, "point batch"]
    apart: Float[Tensor, "point batch"]

    def dependence(self) -> Float[Tensor, "point batch"]:
        """The ratio to_start / (to_start + to_input). It is 1 if the mixed run reaches the state of
        the input whose tokens it has, and 0 if it reaches the state of the input whose state it
        started from. NaN if all three states are the same.
        """
        return self.to_start / (self.to_start + self.to_input)

    def frame(self) -> pd.DataFrame:
        """One row per point and example. The columns are iterations (run), example, to_input,
        to_start, apart and dependence.
        """
        points, rows = self.to_input.shape
        columns = {
            "to_input": self.to_input,
            "to_start": self.to_start,
            "apart": self.apart,
            "dependence": self.dependence(),
        }
        frame = pd.DataFrame(
            {
                "iterations": [t for t in self.iterations for _ in range(rows)],
                "example": list(range(rows)) * points,
            }
        )
        return frame.assign(**{name: x.flatten().cpu().numpy() for name, x in columns.items()})

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the distances and the dependence over iterations."""
        from loopscope.interp.drawing.motion import dependence

        return dependence(self, title)


@torch.no_grad()
@evaluated
def input_dependence(
    model: LoopedModel,
    first: Inputs,
    second: Inputs,
    n_loops: int | None = None,
    *,
    after: int = 1,
    readout: ReadoutColumn = None,
) -> InputDependence:
    """Exchange the states of two inputs after some iterations, to see whether the end of a run
    depends on its input or on its state.

    If the run returns to the state that its own input reaches, that state is reachable from
    elsewhere. If not, the run goes where the foreign state leads. Only the parts that iterations
    hand on (`model.loop_parts`) are exchanged. All else that a run holds of its input stays, such
    as the embedding that is injected. So a model that reads its input only before the first
    iteration has a dependence of 0.

    Args:
        first, second: Two inputs of the same shape, row by row a pair: batches, texts, or token
            ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        after: How many iterations are run before the exchange, at least 1.

    Returns:
        The distances between the three runs after each iteration.

    Raises:
        ValueError: The two inputs have different shapes, no iteration follows the exchange, a state
            is not finite, or the states of both inputs are equal at the exchange.

    Source:
        Reachability and input dependence of fixed points: arXiv 2604.15259.
    """
    pair = Pair.of(model, first, second, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    after = checked_count(after, "after")
    if after >= n_loops:
        raise ValueError(
            f"after must be at least 1 and below the {n_loops} iterations of the run, got {after}"
        )
    ends = model.iteration_ends(n_loops)
    runs = [begin_batch(model, batch, n_loops) for batch in (pair.clean, pair.corrupted)]
    runs = [model.advance(state, ends[after - 1]) for state in runs]
    runs.append(_exchanged(model, *runs))
    points = []
    for end in ends[after - 1 :]:
        runs = [model.advance(state, end) for state in runs]
        points.append([widened(at_columns(state.resid, pair.clean.readout)) for state in runs])
    distances = torch.stack(
        [
            torch.stack([norm_of((x - y).flatten(1)) for x, y in ((m, a), (m, b), (a, b))])
            for a, b, m in points
        ]
    )
    refuse_nonfinite("the distances between the states", distances)
    unit = distances[0, 2]
    if not bool((unit > 0).all()):
        raise ValueError(
            "the two inputs of a pair must have different states at the exchange, but those of row"
            f" {int((unit == 0).nonzero()[0])} are equal; pass a larger after="
        )
    to_input, to_start, apart = (distances / unit).unbind(1)
    return InputDependence(tuple(range(after, n_loops + 1)), to_input, to_start, apart)


def _exchanged(model: LoopedModel, own: State, other: State) -> State:
    """A run that goes on with what another one's iteration handed on."""
    handed = {name: other.parts[name] for name in model.loop_parts if name in other.parts}
    return replace(own, resid=other.resid, parts={**own.parts, **handed})
