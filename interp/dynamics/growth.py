"""Growth of one small change of the state: its rate for each example, whether that rate separates
right answers from wrong ones, and the same by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    checked_batch_size,
    in_chunks,
    rows_apart,
    rows_at_once,
)
from loopscope.interp.common.modes import differentiated, evaluated
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dynamics.changes import (
    Space,
    added,
    checked_space,
    varying,
)
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.starts import changed_start
from loopscope.interp.dynamics.states import iteration_start
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens, Targets
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

_AS_WELL = 0.01  # by how much one AUC may be below another and still be as good


@dataclass(frozen=True)
class Separation(OneScreen):
    """How well the exponent, and how well the margin, tells wrong answers from right ones.

    Attributes:
        right, wrong: How many examples have a right and a wrong last answer.
        iterations: The number of iterations of the run.
        half: The number of iterations after which the margin is read (half depth).
        exponent: The AUC of the finite-time exponent: among all pairs of a wrong and a right
            example, the share in which the wrong one has the larger exponent. A tie counts half.
            NaN if all answers are right or all are wrong.
        margin: The AUC of the logit margin at half depth, where the wrong example should have the
            smaller margin.
    """

    right: int
    wrong: int
    iterations: int
    half: int
    exponent: float
    margin: float

    @classmethod
    def of(
        cls,
        exponent: Float[Tensor, " batch"],
        margin: Float[Tensor, " batch"],
        wrong: Bool[Tensor, " batch"],
        n_loops: int,
    ) -> Separation:
        """Compare both numbers of each example, with the margin at half depth."""
        counts = int((~wrong).sum()), int(wrong.sum())
        half = half_of(n_loops)
        return cls(*counts, n_loops, half, auc(exponent, wrong), auc(-margin, wrong))

    def __str__(self) -> str:
        """The comparison in two sentences."""
        if not self.right or not self.wrong:
            return (
                f"All {self.right + self.wrong} answers are {'right' if self.right else 'wrong'},"
                " so nothing can separate them."
            )
        first = (
            f"The finite-time exponent separates {self.wrong} wrong from {self.right} right answers"
            f" with an AUC of {self.exponent:.3f}."
        )
        halfway = f"the margin after {self.half} of {self.iterations} iterations"
        if self.margin >= self.exponent - _AS_WELL:
            better = "better" if self.margin > self.exponent + _AS_WELL else "as well"
            return (
                f"{first} But {halfway} separates them {better} ({self.margin:.3f}), so the"
                " exponent describes the failures and does not foretell them."
            )
        return f"{first} It is ahead of {halfway} ({self.margin:.3f})."

    def frame(self) -> pd.DataFrame:
        """One row for the exponent and one for the margin. The columns are predictor, iterations
        (run before the number is known), auc, right and wrong.
        """
        rows = [
            ("finite-time exponent", self.iterations, self.exponent, self.right, self.wrong),
            ("margin at half depth", self.half, self.margin, self.right, self.wrong),
        ]
        return pd.DataFrame(rows, columns=["predictor", "iterations", "auc", "right", "wrong"])


@dataclass(frozen=True)
class FiniteTimeExponent(OneScreen):
    """The leading finite-time Lyapunov exponent of each example, with its answers.

    Attributes:
        start: The iteration, from 0, before which the small change is made.
        space: "state" measures changes of h, "direction" changes of h / ||h|| at each column.
        growth: Float[Tensor, "loop batch"], the logarithm of the factor by which each iteration
            makes the change longer, in nats. Entry 0 belongs to the iteration `start`.
        lens: The model's own readout after every iteration of the same run.
    """

    start: int
    space: Space
    growth: Float[Tensor, "loop batch"]
    lens: Lens

    @property
    def exponent(self) -> Float[Tensor, " batch"]:
        """The mean growth over iterations, in nats per iteration; above 0 a small change grows."""
        return self.growth.mean(0)

    def separation(self, answers: Targets) -> Separation:
        """How well the exponent tells wrong last answers from right ones, beside the logit margin
        at half depth.

        Args:
            answers: The token id of each example's right answer.
        """
        wrong, n_loops = ~self.lens.correct(answers)[-1], len(self.lens.names)
        margin = self.lens.margin(answers)[half_of(n_loops) - 1]
        return Separation.of(self.exponent, margin, wrong, n_loops)

    def frame(self) -> pd.DataFrame:
        """One row per iteration and example. The columns are loop, example, growth (nats) and
        exponent: the mean growth up to this iteration, in nats per iteration.
        """
        loops, batch = self.growth.shape
        counts = torch.arange(1, loops + 1, device=self.growth.device)[:, None]
        mean = self.growth.cumsum(0) / counts
        counted = range(self.start, self.start + loops)
        return tidy({"growth": self.growth, "exponent": mean}, loop=counted, example=range(batch))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the sum of the growth over iterations."""
        from loopscope.interp.drawing.stability import growth

        return growth(self.growth.cumsum(0), title, self.start + 1)


@differentiated
def finite_time_exponent(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    space: Space = "state",
    start: int | None = None,
    seed: int = 0,
    batch_size: int = 128,
) -> FiniteTimeExponent:
    """Measure for each example how fast a small change of its state grows: the leading finite-time
    Lyapunov exponent.

    One random change is followed through the iterations by derivatives. The answers of the same run
    are kept.

    Args:
        inputs, n_loops, readout, positions, space, start, seed: The run and the change, as
            `lyapunov_spectrum` describes them.
        batch_size: How many rows run at a time.

    Returns:
        The growth by iteration and example, in nats.

    Raises:
        ValueError: `lyapunov_spectrum` would refuse the call.

    Source:
        The method is that of `lyapunov_spectrum` with one direction. Exponents of examples that
        fail were compared for small recursive models (TRM, HRM).
    """
    batch = as_batch(model, inputs, readout)
    found = lyapunov_spectrum(
        model, batch, 1, n_loops, positions=positions, space=space, start=start, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    lens = readout_lens(model, batch, n_loops, batch_size=batch_size)
    return FiniteTimeExponent(found.start, space, found.exponents[..., 0], lens)


@dataclass(frozen=True)
class PerturbationGrowth(OneScreen):
    """The distance between a run and runs whose state was changed a little before one iteration.

    Attributes:
        start: The iteration, from 0, before which the state is changed.
        space: "state" measures distances of h, "direction" distances of h / ||h|| at each column.
        scale: The norm of each change, as a share of the norm of the parts and columns that vary.
        distance: Float[Tensor, "point batch direction"], over all columns that vary together. Point
            0 is the change itself, and point t follows t more iterations.
    """

    start: int
    space: Space
    scale: float | int
    distance: Float[Tensor, "point batch direction"]

    @property
    def growth(self) -> Float[Tensor, "point batch direction"]:
        """The logarithm of the distance over the first distance, in nats."""
        return (self.distance / self.distance[0]).log()

    def frame(self) -> pd.DataFrame:
        """One row per point, example and direction. The columns are iterations (run since the
        change), example, direction, distance and growth (nats).
        """
        points, batch, k = self.distance.shape
        columns = {"distance": self.distance, "growth": self.growth}
        return tidy(columns, iterations=range(points), example=range(batch), direction=range(k))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the growth over iterations, mean over directions."""
        from loopscope.interp.drawing.stability import growth

        return growth(self.growth.mean(2), title, self.start)


@torch.no_grad()
@evaluated
def perturbation_growth(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    space: Space = "state",
    start: int | None = None,
    scale: float | int = 1e-2,
    n_directions: int = 4,
    seed: int = 0,
    batch_size: int = 128,
) -> PerturbationGrowth:
    """Change the state a little before one iteration, and measure how far the run moves away.

    It compares whole runs (finite differences) along random directions. So, unlike
    `finite_time_exponent`, it also shows where a change stops growing because it is no longer
    small.

    Args:
        inputs, n_loops, readout, positions, space, seed: The run and what varies, as
            `lyapunov_spectrum` describes them.
        start: The iteration, from 0, before which the state is changed. None means the first
            iteration to which all varying parts are handed, or one later if the first state is all
            zeros.
        scale: The norm of each change, as a share of the norm of the parts and columns that vary.
        n_directions: How many random directions are tried, the same for every example.
        batch_size: How many rows run at a time, changed copies counted.

    Returns:
        The distances by point, example and direction.

    Raises:
        ValueError: The scale is not above 0, there is no direction, the state is all zeros where
            the change is made, or `lyapunov_spectrum` would refuse the call.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    scale = checked_number(scale, "scale", above=0)
    n_directions = checked_count(n_directions, "n_directions")
    whole = varying(model, batch, positions, None)
    start = changed_start(model, batch, whole, start, n_loops)
    share = max(1, checked_batch_size(batch_size) // (n_directions + 1))
    rows, beside = rows_at_once(model, batch, share), n_directions + 1 if rows_apart(model) else 1
    stops = [iteration_start(model, start, n_loops), *model.iteration_ends(n_loops)[start:]]
    found = []
    for part, free in zip(in_chunks(batch, rows, "growth"), whole.split(rows), strict=True):
        generator = seeded(seed)
        state = model.advance(begin_batch(model, part, n_loops), stops[0])
        values = free.values(model, state)
        changes = free.matched(values, free.draw(values, n_directions, generator), scale)
        unchanged = torch.zeros_like(changes[:, :1])
        runs = [
            free.beside(state, values, some, added)
            for some in torch.cat([unchanged, changes], dim=1).split(beside, dim=1)
        ]
        distances = []
        for stop in stops:
            runs = [model.advance(run, stop) for run in runs]
            made = [list(free.values(model, run).values()) for run in runs]
            measured = [free.measured(each, beside, checked_space(space)) for each in made]
            points = torch.cat(measured, dim=1)
            distances.append((points[:, 1:] - points[:, :1]).norm(dim=2))
        found.append(torch.stack(distances))
    return PerturbationGrowth(start, space, scale, torch.cat(found, dim=1))


def half_of(n_loops: int) -> int:
    """The number of iterations at half depth."""
    return (n_loops + 1) // 2


def auc(scores: Float[Tensor, " batch"], positive: Bool[Tensor, " batch"]) -> float:
    """The share of pairs of a positive and a negative example in which the positive one scores
    higher, ties counting half; NaN where there is no such pair.
    """
    high, low = widened(scores[positive])[:, None], widened(scores[~positive])[None]
    return float(((high > low).double() + 0.5 * (high == low)).mean())
