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
    """Trajectories in the space of the first principal components of all their points.

    Attributes:
        coordinates: Float[Tensor, "point batch pos component"]; NaN where a column is padding.
        components: Float[Tensor, "component d_model"], of length 1, each with the sign that
            makes its entry of largest magnitude positive.
        mean: Float[Tensor, " d_model"], what is taken away before projecting.
        explained: Float[Tensor, " component"], each component's share of the variance.
        dynamics: The trajectories.
    """

    coordinates: Float[Tensor, "point batch pos component"]
    components: Float[Tensor, "component d_model"]
    mean: Float[Tensor, " d_model"]
    explained: Float[Tensor, " component"]
    dynamics: Dynamics

    def frame(self) -> pd.DataFrame:
        """One row per point, example and position: iterations (run), example, position, pc1, pc2,
        ...
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
    """A part of the state along iterations.

    A statistic is NaN where it is not defined, and where a column is padding.

    Attributes:
        states: Float[Tensor, "point batch pos d_model"]; NaN where a column is padding. Axes after
            pos are joined into one.
        iterations: How many iterations are run before each point; 0 is the state before the first
            iteration.
        position: Int[Tensor, "batch pos"], the column of the input.
        shown: Bool[Tensor, "batch pos"], False where a column is padding.
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
        """The record of a trajectory at some columns, without the values at padding."""
        position, shown = chosen
        return cls(
            states.masked_fill(~shown[..., None], torch.nan),
            tuple(iterations),
            position,
            shown,
            part,
        )

    def directions(self) -> Dynamics:
        """The trajectories of h_t / ||h_t||, on the unit sphere."""
        return replace(self, states=self.states / norm_of(self.states)[..., None])

    def state_norm(self) -> Float[Tensor, "point batch pos"]:
        """||h_t||."""
        return norm_of(self.states)

    def step_norm(self, relative: bool = False) -> Float[Tensor, "point batch pos"]:
        """||h_t - h_{t-1}||, over ||h_{t-1}|| when relative."""
        norm = norm_of(self.states.diff(dim=0))
        return self._from_later(norm / self.state_norm()[:-1] if relative else norm)

    def update_cosine(self) -> Float[Tensor, "point batch pos"]:
        """Cosine between h_t - h_{t-1} and h_{t-1} - h_{t-2} (arXiv 2509.23314)."""
        updates = self.states.diff(dim=0)
        return self._from_later(cosine_of(updates[1:], updates[:-1]))

    def second_difference(self) -> Float[Tensor, "point batch pos"]:
        """||h_t - 2 h_{t-1} + h_{t-2}||, at the point t at which it can first be known (the
        acceleration of arXiv 2509.23314).
        """
        return self._from_later(norm_of(self.states.diff(dim=0).diff(dim=0)))

    def distance_to_last(self, relative: bool = False) -> Float[Tensor, "point batch pos"]:
        """||h_t - h_T||, over ||h_T|| when relative."""
        distance = norm_of(self.states - self.states[-1])
        return distance / self.state_norm()[-1] if relative else distance

    def state_cosine(self) -> Float[Tensor, "point batch pos"]:
        """Cosine between h_t and h_{t-1}."""
        return self._from_later(cosine_of(self.states[1:], self.states[:-1]))

    def effective_rank(self) -> Float[Tensor, " point"]:
        """Effective rank of each point's states, a row being one position of one example; see
        `effective_rank`.
        """
        return torch.stack([effective_rank(point[self.shown]) for point in self.states])

    def orbits(self, k: int = 2) -> Orbits:
        """The trajectories on the first k principal components, fitted over all their points.

        Raises:
            ValueError: k is more than the points and d_model allow.
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
        """The smallest p with ||h_{t+p} - h_t|| / ||h_t|| < tol all through the last points: 1 is a
        fixed point, more an orbit.

        Args:
            max_period: The largest p that is tried.
            window: How many of the last points are looked at; None means twice the largest period,
                so that it is seen twice.

        Returns:
            Float[Tensor, "batch pos"], NaN where no period fits.

        Raises:
            ValueError: The window is shorter than two of the largest periods, or longer than the
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
        """One row per point, example and position that is no padding: iterations (run), example,
        position, then every statistic.
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
    """The state before the first iteration and after every iteration, from one run.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        n_loops: Iterations; None means what the checkpoint records.
        positions: "real" for all tokens that are not padding, "readout" for the column at which
            answers are read (which may be padding), "all" for padding too, or columns.
        part: A part of the state, as `model.state_parts(state)` names it.
        batch_size: Rows run at a time.

    Raises:
        ValueError: A part that the state does not have, or that is not made of real numbers.

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
