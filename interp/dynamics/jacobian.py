"""The Jacobian of one iteration: does it contract near the state that a run has there?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Complex, Float
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.places import one_in_range
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dynamics.changes import (
    Varying,
    carried,
    check_map,
    forward_mode,
    varying,
)
from loopscope.interp.dynamics.states import iteration_start
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

_GROWTH = 32  # dimensions by which a Krylov space grows
_MOST = 256  # dimensions at which it stops
_ENOUGH = 1e-5  # residual of the leading eigenvalue at which it has settled


@dataclass(frozen=True)
class JacobianSpectrum(OneScreen):
    """Estimates of the leading eigenvalues of one iteration's map from state to state.

    Attributes:
        loop: The iteration, from 0.
        eigenvalues: Complex[Tensor, "batch krylov"], Ritz values, largest magnitude first. NaN if
            the Krylov space of an example is smaller than that of others.
        residual: Float[Tensor, " batch"], how far the first value is from being an eigenvalue: ||J
            v - lambda v|| / |lambda| for its Ritz vector v of length 1. It is exact up to rounding.
        change: Float[Tensor, " batch"], the relative change of the spectral radius when the last
            dimension was added to the Krylov space.
    """

    loop: int
    eigenvalues: Complex[Tensor, "batch krylov"]
    residual: Float[Tensor, " batch"]
    change: Float[Tensor, " batch"]

    @property
    def radius(self) -> Float[Tensor, " batch"]:
        """The estimated spectral radius; below 1 the iteration contracts near this state."""
        return self.eigenvalues[:, 0].abs()

    def frame(self) -> pd.DataFrame:
        """One row per example. The columns are loop (from 0), example, radius, real and imag (of
        the first eigenvalue; of a conjugate pair the one with positive imaginary part), residual
        and change.
        """
        leading = self.eigenvalues[:, 0]
        columns = {"radius": self.radius, "real": leading.real, "imag": leading.imag.abs()}
        columns |= {"residual": self.residual, "change": self.change}
        frame = pd.DataFrame({name: value.cpu().numpy() for name, value in columns.items()})
        frame.insert(0, "example", range(len(frame)))
        frame.insert(0, "loop", self.loop)
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the eigenvalues on the complex plane, with the unit circle."""
        from loopscope.interp.drawing.motion import spectrum

        return spectrum(self, title)


@differentiated
def jacobian_spectrum(
    model: LoopedModel,
    inputs: Inputs,
    loop: int,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    parts: str | Sequence[str] | None = None,
    krylov: int | None = None,
    batch_size: int = 32,
) -> JacobianSpectrum:
    """Estimate the leading eigenvalues of the Jacobian of one iteration, to see whether it
    contracts near the state of a run.

    The method is Arnoldi iteration. It also converges if the leading eigenvalues are a complex
    pair, where a power iteration does not. Each product with the Jacobian is one run of the
    iteration in forward mode. `residual` and `change` of the record say how far the estimate has
    converged. A Krylov space as large as the state gives the exact eigenvalues.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        loop: The iteration, from 0.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns whose states vary together: "real" for all tokens except padding,
            "readout" for the answer position, "all" for padding too, or a list of columns. All
            other columns, and padding, are held fixed.
        parts: The parts of the state that vary together; the others are held fixed. None means the
            parts that an iteration hands to the next (`LoopedModel.loop_parts`).
        krylov: The dimension of the Krylov space. None adds 32 dimensions at a time until
            `residual` is at most 1e-5 for all rows that run together, or 256 dimensions are
            reached.
        batch_size: How many rows run at a time.

    Returns:
        The estimated eigenvalues of each example, with measures of convergence.

    Raises:
        ValueError: The run does not have the iteration, a part cannot vary, the iteration returns a
            part in another shape, or the rows of the model depend on one another.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    loop = one_in_range("loop", loop, n_loops)
    krylov = None if krylov is None else checked_count(krylov, "krylov")
    batch_size = rows_at_once(model, batch, batch_size)
    whole = varying(model, batch, positions, parts)
    found = []
    for rows, free in zip(
        in_chunks(batch, batch_size, "jacobian"), whole.split(batch_size), strict=True
    ):
        with torch.no_grad():
            state = model.advance(
                begin_batch(model, rows, n_loops), iteration_start(model, loop, n_loops)
            )
        values = free.values(model, state)
        start = free.draw(values, 1, seeded(0))[:, 0]
        times = partial(_times, model, free, state, model.iteration_ends(n_loops)[loop])
        most = min(_MOST if krylov is None else krylov, start.shape[1])
        found.append(_ritz(_arnoldi(times, start, most, grows=krylov is None)))
    eigenvalues, residuals, changes = zip(*found, strict=True)
    return JacobianSpectrum(loop, _joined(eigenvalues), torch.cat(residuals), torch.cat(changes))


def _times(
    model: LoopedModel, free: Varying, state: State, stop: int, vector: Float[Tensor, "batch n"]
) -> Float[Tensor, "batch n"]:
    """The product of the Jacobian with a vector of each example."""
    values = free.values(model, state)
    with forward_mode():
        after = model.advance(free.beside(state, values, vector[:, None], carried), stop)
        made = free.values(model, after)
        check_map(model, values, made)
        return free.carried_by(list(made.values()), 1)[:, 0]


def _joined(eigenvalues: Sequence[Tensor]) -> Complex[Tensor, "batch krylov"]:
    """Eigenvalues of several chunks of examples, filled with NaN to the largest Krylov space."""
    most = max(values.shape[1] for values in eigenvalues)
    return torch.cat([F.pad(x, (0, most - x.shape[1]), value=math.nan) for x in eigenvalues])


def _arnoldi(
    times: Callable[[Tensor], Tensor], start: Float[Tensor, "batch n"], steps: int, grows: bool
) -> Float[Tensor, "batch next step"]:
    """The Hessenberg matrix of each example; zeros from where its Krylov space stops growing. With
    `grows` it may have fewer than that many steps, where the leading eigenvalues have settled.
    """
    matrix = start.new_zeros(len(start), steps + 1, steps)
    basis = torch.nn.functional.normalize(start, dim=1)[:, None]
    for step in range(steps):
        vector = times(basis[:, step])
        scale = vector.norm(dim=1)
        for _ in range(2):  # a second time, for the rounding that the first leaves
            along = einsum(basis, vector, "batch k n, batch n -> batch k")
            vector = vector - einsum(basis, along, "batch k n, batch k -> batch n")
            matrix[:, : step + 1, step] += along
        left = vector.norm(dim=1)
        new = left > 100 * torch.finfo(left.dtype).eps * scale
        matrix[:, step + 1, step] = left * new
        basis = torch.cat(
            [basis, torch.where(new[:, None], vector / left[:, None], 0.0)[:, None]], dim=1
        )
        size = step + 1
        if grows and size % _GROWTH == 0 and size < steps:
            _, residual, _ = _ritz(matrix[:, : size + 1, :size])
            if not bool((residual > _ENOUGH).any()):
                return matrix[:, : size + 1, :size]
    return matrix


def _ritz(matrix: Float[Tensor, "batch next step"]) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values by falling magnitude; of the first, its relative residual and relative change."""
    refuse_nonfinite("the products with the Jacobian", matrix)
    values, vectors = torch.linalg.eig(matrix[:, :-1])
    order = values.abs().argsort(dim=1, descending=True)
    values, last = values.gather(1, order), vectors[:, -1].gather(1, order)
    radius = values[:, 0].abs()
    before = (
        torch.linalg.eigvals(matrix[:, :-2, :-1]).abs().amax(1)
        if matrix.shape[2] > 1
        else torch.full_like(radius, torch.nan)
    )
    return values, (matrix[:, -1, -1] * last[:, 0].abs()) / radius, (radius - before).abs() / radius
