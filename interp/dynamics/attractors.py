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
    """Whether the state of each example settles, and on a cycle of which length.

    Attributes:
        space: "state" compares states h, "direction" compares h / ||h|| at each column.
        tol: Two states count as the same if their relative distance is below this number.
        period: Float[Tensor, " batch"], the length, in iterations, of the cycle on which the state
            ends: 1 is a fixed point. NaN if no length fits, so the state has not settled.
        iterations: Float[Tensor, " batch"], how many iterations are run until the state is on its
            cycle; NaN if it has not settled.
        residual: Float[Tensor, "iteration batch"], the relative step of each iteration, ||h_t -
            h_{t-1}|| / ||h_{t-1}||, over all columns of an example together. The first entry
            belongs to the first iteration.
        lens: The model's own readout after every iteration.
    """

    space: Space
    tol: float | int
    period: Float[Tensor, " batch"]
    iterations: Float[Tensor, " batch"]
    residual: Float[Tensor, "iteration batch"]
    lens: Lens

    @property
    def settled(self) -> Bool[Tensor, " batch"]:
        """Whether the last state of each example is on a cycle (or fixed point)."""
        return ~self.period.isnan()

    def frame(self) -> pd.DataFrame:
        """One row per example. The columns are example, settled, period, iterations and residual
        (of the last iteration).
        """
        columns = {
            "settled": self.settled,
            "period": self.period,
            "iterations": self.iterations,
            "residual": self.residual[-1],
        }
        return tidy(columns, example=range(len(self.period)))

    def by_answer(self, answers: Targets) -> pd.DataFrame:
        """Compare examples that are answered right with examples that are answered wrong, one row
        each.

        The columns are answer, examples (how many), settled (their share), iterations (the median
        of those that settled), residual (the median of the last one) and auc: how well a large
        residual tells a wrong answer from a right one.

        Args:
            answers: The token id of each example's right answer.
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
    """Find whether the state of each example settles, after how many iterations, and on a cycle of
    which length.

    The record also holds the answers of the same run, so that the residual can be compared with
    accuracy.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns of the state: "real" for all tokens except padding, "readout" for the
            answer position, "all" for padding too, or a list of columns. The columns of an example
            are taken as one long vector.
        part: The part of the state, named as in `model.state_parts(state)`; "resid" is the residual
            stream.
        space: "state" compares states h. "direction" compares h / ||h|| at each column, for a
            residual stream whose length grows without bound.
        tol: Two states count as the same if their relative distance is below this number.
        max_period: The longest cycle to look for, in iterations; it must fit twice into the run.
            None means 4, or as many as fit.
        batch_size: How many rows run at a time.

    Returns:
        Period, iterations and residuals of each example.

    Raises:
        ValueError: A cycle of `max_period` does not fit twice into the run, or the state has no
            such part of real numbers.

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
    """The trajectory of each example, with its columns joined into one long vector."""
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
