"""Where iterations lead: to a fixed point, to a cycle, or nowhere."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dynamics.answered import dynamics_and_lens
from loopscope.interp.dynamics.changes import Space, checked_space
from loopscope.interp.dynamics.growth import auc
from loopscope.interp.dynamics.states import Dynamics
from loopscope.interp.dynamics.statistics import median_of, norm_of
from loopscope.interp.lens.record import Lens, Targets
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class FixedPoints(OneScreen):
    """Whether the state of each example settles, and where it does not.

    Attributes:
        space: "state", or "direction" for h / ||h|| at each column.
        tol: The relative distance below which two states count as the same.
        period: Float[Tensor, " batch"], the length of the cycle in which the state ends: 1 is a
            fixed point; NaN where no length fits, so the state has not settled.
        iterations: Float[Tensor, " batch"], the iterations run until the state is on its cycle;
            NaN where it has not settled.
        residual: Float[Tensor, "iteration batch"], ||h_t - h_{t-1}|| / ||h_{t-1}||, joint over the
            columns, from the first iteration on.
        lens: The family's own readout after every iteration.
    """

    space: Space
    tol: float | int
    period: Float[Tensor, " batch"]
    iterations: Float[Tensor, " batch"]
    residual: Float[Tensor, "iteration batch"]
    lens: Lens

    @property
    def settled(self) -> Bool[Tensor, " batch"]:
        """Whether the state is on a cycle at the end."""
        return ~self.period.isnan()

    def frame(self) -> pd.DataFrame:
        """One row per example: example, settled, period, iterations, residual (the last one)."""
        columns = {
            "settled": self.settled,
            "period": self.period,
            "iterations": self.iterations,
            "residual": self.residual[-1],
        }
        return tidy(columns, example=range(len(self.period)))

    def by_answer(self, answers: Targets) -> pd.DataFrame:
        """Right and wrong answers side by side: answer, examples, settled (their share), iterations
        (median of those that settled), residual (median), auc (of the residual for wrong answers
        against right ones).

        Args:
            answers: The right token of each example.
        """
        wrong = ~self.lens.correct(answers)[-1]
        rows = []
        for name, chosen in (("right", ~wrong), ("wrong", wrong)):
            until, last = self.iterations[chosen], self.residual[-1, chosen]
            settled = float(self.settled[chosen].double().mean())
            numbers = settled, median_of(until[~until.isnan()]), median_of(last)
            rows.append((name, int(chosen.sum()), *numbers))
        frame = pd.DataFrame(
            rows, columns=["answer", "examples", "settled", "iterations", "residual"]
        )
        return frame.assign(auc=auc(self.residual[-1], wrong))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the residual over iterations."""
        from loopscope.interp.drawing.stability import residuals

        return residuals(self, title)


@torch.no_grad()
@evaluated
def fixed_points(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    part: str = "resid",
    space: Space = "state",
    tol: float | int = 1e-2,
    max_period: int | None = None,
    batch_size: int = 512,
) -> FixedPoints:
    """Whether each example's state settles, after how many iterations, and on a cycle of which
    length; with the answers of the same run, for the residual against accuracy.

    Args:
        inputs, n_loops, readout, positions, part, batch_size: As for `dynamics`; the columns of an
            example are looked at jointly.
        space: "state", or "direction" for h / ||h|| at each column, for a stream that grows along
            its own direction without bound.
        tol: The relative distance below which two states count as the same.
        max_period: The longest cycle to look for, which must fit twice into the run; None means 4,
            or as many as fit.

    Raises:
        ValueError: A cycle that does not fit twice into the run, and as for `dynamics`.

    Source:
        Residuals against accuracy: arXiv 2605.21488; cycles of blocks: arXiv 2604.11791.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    tol = checked_number(tol, "tol", above=0)
    path, lens = dynamics_and_lens(
        model, batch, n_loops, positions=positions, part=part, batch_size=batch_size
    )
    whole = joint(path.directions() if checked_space(space) == "direction" else path)
    longest = (
        min(4, (n_loops + 1) // 2)
        if max_period is None
        else checked_count(max_period, "max_period")
    )
    period = whole.period(longest, tol)[:, 0]
    residual = whole.step_norm(relative=True)[1:, :, 0]
    return FixedPoints(space, tol, period, _until(whole, period, tol), residual, lens)


def joint(path: Dynamics) -> Dynamics:
    """The trajectories of each example's columns as one trajectory."""
    states = path.states.masked_fill(~path.shown[..., None], 0.0).flatten(2)[:, :, None]
    first = path.position[:, :1]
    return replace(path, states=states, position=first, shown=torch.ones_like(first).bool())


def _until(
    path: Dynamics, period: Float[Tensor, " batch"], tol: float | int
) -> Float[Tensor, " batch"]:
    """The iterations run until the state stays within the tolerance of itself a cycle later."""
    states, found = path.states[:, :, 0], torch.full_like(period, torch.nan)
    for p in period[~period.isnan()].unique().int().tolist():
        moved = norm_of(states[p:] - states[:-p]) / norm_of(states[:-p]) >= tol
        late = moved.flip(0).int().argmax(0)
        until = torch.where(moved.any(0), len(moved) - late, 0)
        found = torch.where(period == p, until.to(found.dtype), found)
    return found
