"""The motion of the recurrent state over iterations: steps, angles, orbits, periods.

Axes besides the usual ones: `point` counts the points of a trajectory from 0, `pos` counts the
columns that are shown, and `position` holds the column of each. `iterations` is an amount: the
iterations run before the state of a point, 0 for the state before the first iteration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.columns import (
    Shown,
    ShownColumns,
    at_positions,
    shown_columns,
)
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dynamics.statistics import cosine_of, effective_rank, norm_of
from loopscope.models.basis.numbers import checked_count, checked_integer, checked_number
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Orbits(OneScreen):
    """Trajectories of the state, projected on the first principal components of all their points.

    Attributes:
        coordinates: Float[Tensor, "point batch pos component"]; NaN at padding.
        components: Float[Tensor, "component d_model"], each of length 1. The sign makes the entry
            of largest magnitude positive.
        mean: Float[Tensor, " d_model"], which is subtracted before projecting.
        explained: Float[Tensor, " component"], the share of the variance along each component.
        dynamics: The trajectories that are projected.
    """

    coordinates: Float[Tensor, "point batch pos component"]
    components: Float[Tensor, "component d_model"]
    mean: Float[Tensor, " d_model"]
    explained: Float[Tensor, " component"]
    dynamics: Dynamics

    def frame(self) -> pd.DataFrame:
        """One row per point, example and position. The columns are iterations (run), example,
        position, pc1, pc2, ...
        """
        return self.dynamics._tidy(
            {f"pc{i + 1}": column for i, column in enumerate(self.coordinates.unbind(-1))}
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the trajectories on the first two components, a star at the end of each."""
        from loopscope.interp.drawing.motion import orbits

        return orbits(self, title)


@dataclass(frozen=True)
class Dynamics(OneScreen):
    """The trajectory of the state over iterations, with statistics of its motion.

    Below, h_t is the state after t iterations and h_T the last one. A statistic is NaN if it is not
    defined at a point, and at padding.

    Attributes:
        states: Float[Tensor, "point batch pos d_model"], the state before the first iteration and
            after each iteration; NaN at padding. Further axes of a site are joined into the last
            one.
        iterations: How many iterations are run before each point; 0 is the state before the first
            one.
        position: Int[Tensor, "batch pos"], the column of the input.
        shown: Bool[Tensor, "batch pos"], False at padding.
        part: The name of the part of the state, or of the site.
    """

    states: Float[Tensor, "point batch pos d_model"]
    iterations: tuple[int, ...]
    position: Int[Tensor, "batch pos"]
    shown: Bool[Tensor, "batch pos"]
    part: str

    @classmethod
    def of(
        cls,
        states: Float[Tensor, "point batch pos d_model"],
        iterations: Sequence[int],
        chosen: ShownColumns,
        part: str,
    ) -> Dynamics:
        """Make the record of a trajectory at some columns, with NaN at padding."""
        position, shown = chosen
        return cls(
            states.masked_fill(~shown[..., None], torch.nan),
            tuple(iterations),
            position,
            shown,
            part,
        )

    def directions(self) -> Dynamics:
        """The trajectories of h_t / ||h_t||, so that only the direction of the state counts."""
        return replace(self, states=self.states / norm_of(self.states)[..., None])

    def state_norm(self) -> Float[Tensor, "point batch pos"]:
        """The length of the state, ||h_t||."""
        return norm_of(self.states)

    def step_norm(self, relative: bool = False) -> Float[Tensor, "point batch pos"]:
        """The length of each step, ||h_t - h_{t-1}||; with `relative` divided by ||h_{t-1}||."""
        norm = norm_of(self.states.diff(dim=0))
        return self._from_later(norm / self.state_norm()[:-1] if relative else norm)

    def update_cosine(self) -> Float[Tensor, "point batch pos"]:
        """The cosine between successive steps h_t - h_{t-1} and h_{t-1} - h_{t-2}
        (arXiv 2509.23314).
        """
        updates = self.states.diff(dim=0)
        return self._from_later(cosine_of(updates[1:], updates[:-1]))

    def second_difference(self) -> Float[Tensor, "point batch pos"]:
        """The acceleration ||h_t - 2 h_{t-1} + h_{t-2}||, at point t (arXiv 2509.23314)."""
        return self._from_later(norm_of(self.states.diff(dim=0).diff(dim=0)))

    def distance_to_last(self, relative: bool = False) -> Float[Tensor, "point batch pos"]:
        """The distance to the last state, ||h_t - h_T||; with `relative` divided by ||h_T||."""
        distance = norm_of(self.states - self.states[-1])
        return distance / self.state_norm()[-1] if relative else distance

    def state_cosine(self) -> Float[Tensor, "point batch pos"]:
        """The cosine between successive states h_t and h_{t-1}."""
        return self._from_later(cosine_of(self.states[1:], self.states[:-1]))

    def effective_rank(self) -> Float[Tensor, " point"]:
        """The effective rank of the states at each point, one row per position of each example; see
        `loopscope.effective_rank`.
        """
        return torch.stack([effective_rank(point[self.shown]) for point in self.states])

    def orbits(self, k: int = 2) -> Orbits:
        """Project the trajectories on their first k principal components, fitted over all points.

        Raises:
            ValueError: k is larger than the number of points or d_model allows.
        """
        rows = self.states[:, self.shown].flatten(0, 1)
        refuse_nonfinite("the states", rows)
        k = checked_integer(k, "k")
        if not 1 <= k <= min(len(rows) - 1, rows.shape[1]):
            raise ValueError(
                f"k must be in 1..{min(len(rows) - 1, rows.shape[1])} for {len(rows)} points of"
                f" size {rows.shape[1]}, got {k}"
            )
        mean = rows.mean(0)
        _, sizes, directions = torch.linalg.svd(rows - mean, full_matrices=False)
        largest = directions[:k].gather(1, directions[:k].abs().argmax(1, keepdim=True))
        components = directions[:k] * largest.sign()
        shares = sizes[:k] ** 2 / (sizes**2).sum()
        return Orbits((self.states - mean) @ components.T, components, mean, shares, self)

    def period(
        self, max_period: int = 4, tol: float = 1e-2, window: int | None = None
    ) -> Float[Tensor, "batch pos"]:
        """Find after how many iterations each state repeats: the smallest p with ||h_{t+p} - h_t||
        / ||h_t|| < tol at all of the last points.

        A period of 1 is a fixed point, a larger one is a cycle.

        Args:
            max_period: The largest p to try, in iterations.
            tol: The relative distance below which two states count as the same.
            window: How many of the last points are looked at. None means twice `max_period`, so
                that each period is seen twice.

        Returns:
            Float[Tensor, "batch pos"], in iterations; NaN if no period fits.

        Raises:
            ValueError: The window is shorter than twice `max_period`, or longer than the
                trajectory.
        """
        max_period = checked_count(max_period, "max_period")
        window = 2 * max_period if window is None else checked_count(window, "window")
        tol = checked_number(tol, "tol", above=0)
        if not 2 * max_period <= window <= len(self.states):
            raise ValueError(
                "a period is looked for in a window of at least 2 * max_period points, of the"
                f" {len(self.states)} that there are; got max_period={max_period}, window={window}:"
                " try a smaller max_period or more iterations"
            )
        late = self.states[-window:]
        found = torch.full_like(late[0, ..., 0], torch.nan)
        for p in range(max_period, 0, -1):
            moved = norm_of(late[p:] - late[:-p]) / norm_of(late[:-p])
            found = found.masked_fill((moved < tol).all(0), p)
        return found

    def frame(self) -> pd.DataFrame:
        """One row per point, example and position, without padding. The columns are iterations
        (run), example, position, and every statistic.
        """
        columns = {
            "state_norm": self.state_norm(),
            "state_cosine": self.state_cosine(),
            "step_norm": self.step_norm(),
            "relative_step_norm": self.step_norm(relative=True),
            "update_cosine": self.update_cosine(),
            "second_difference": self.second_difference(),
            "distance_to_last": self.distance_to_last(),
            "relative_distance_to_last": self.distance_to_last(relative=True),
        }
        return self._tidy(columns)

    def _from_later(self, values: Tensor) -> Tensor:
        """The values with NaN at the first points, where they are not defined."""
        missing = len(self.states) - len(values)
        return torch.cat([values.new_full((missing, *values.shape[1:]), torch.nan), values])

    def _tidy(self, columns: dict[str, Tensor]) -> pd.DataFrame:
        points, (example, column) = len(self.states), self.shown.nonzero(as_tuple=True)
        places = {
            "iterations": torch.tensor(self.iterations, device="cpu").repeat_interleave(
                len(example)
            ),
            "example": example.repeat(points),
            "position": self.position[example, column].repeat(points),
        }
        values = {name: value[:, self.shown].flatten() for name, value in columns.items()}
        return pd.DataFrame(
            {name: value.cpu().numpy() for name, value in (places | values).items()}
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: size, relative step, cosine of steps and distance to the last state."""
        from loopscope.interp.drawing.motion import dynamics

        return dynamics(self, title)


@torch.no_grad()
@evaluated
def dynamics(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    part: str = "resid",
    batch_size: int = 512,
) -> Dynamics:
    """Collect the state before the first iteration and after every iteration, to see how it moves.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns to collect: "real" for all tokens except padding, "readout" for the
            answer position (which may be padding), "all" for padding too, or a list of columns.
        part: The part of the state, named as in `model.state_parts(state)`; "resid" is the residual
            stream.
        batch_size: How many rows run at a time.

    Returns:
        The states, with their statistics as methods.

    Raises:
        ValueError: The state does not have the part, or the part is not made of real numbers.

    Source:
        The geometry of iterates: arXiv 2509.23314; orbits: figures of arXiv 2502.05171.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    return trajectory(model, batch, n_loops, positions, part, batch_size, lambda state, rows: None)


def trajectory(
    model: LoopedModel,
    batch: Batch,
    n_loops: int,
    positions: Shown,
    part: str,
    batch_size: int,
    ended: Callable[[State, Batch], object],
) -> Dynamics:
    """The record of `dynamics`.

    Args:
        ended: Is called with the state after every iteration and the rows that run, piece by piece
            of the batch.
    """
    size = rows_at_once(model, batch, batch_size)
    chosen, first = shown_columns(batch, positions), iteration_start(model, 0, n_loops)
    collected = []
    for rows, columns in zip(
        in_chunks(batch, size, "dynamics"),
        chosen[0].split(size),
        strict=True,
    ):
        state = model.advance(begin_batch(model, rows, n_loops), first)
        points = [_shown_part(model, state, part, columns)]
        for end in model.iteration_ends(n_loops):
            state = model.advance(state, end)
            points.append(_shown_part(model, state, part, columns))
            ended(state, rows)
        collected.append(torch.stack(points))
    return Dynamics.of(torch.cat(collected, dim=1), range(n_loops + 1), chosen, part)


def iteration_start(model: LoopedModel, loop: int, n_loops: int) -> int:
    """The index in the schedule of the first visit of an iteration."""
    return min(visit.index for visit in model.schedule(n_loops) if visit.loop == loop)


def _shown_part(
    model: LoopedModel, state: State, part: str, columns: Int[Tensor, "batch k"]
) -> Float[Tensor, "batch k d_model"]:
    """A part of the state at some columns, its axes after pos joined into one."""
    return at_positions(widened(_part(model, state, part).flatten(2)), columns)


def _part(model: LoopedModel, state: State, part: str) -> Float[Tensor, "batch pos ..."]:
    parts = model.state_parts(state)
    if part not in parts or not parts[part].is_floating_point():
        known = ", ".join(name for name, value in parts.items() if value.is_floating_point())
        raise ValueError(
            f"the state of this {type(model).__name__} has no part {part!r} of real numbers; it has"
            f" {known}"
        )
    return parts[part]
