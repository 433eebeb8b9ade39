"""Lyapunov spectra: how fast small changes of a state grow or shrink over iterations, along several
independent directions, and the share of every sublayer in that.

Axes: loop batch; `k` counts exponents, `n` the numbers of a change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.columns import Shown
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
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dynamics.changes import Space, checked_space, checked_start, varying
from loopscope.interp.dynamics.followed import Followed
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class LyapunovSpectrum(OneScreen):
    """The finite-time Lyapunov exponents of each example, by iteration.

    An exponent is the logarithm of a growth rate, in nats per iteration: above 0 a small change
    grows. Exponents stand in falling order once the directions have settled, which takes a few
    iterations.

    Attributes:
        start: The iteration before which the changes begin, from 0.
        space: "state", or "direction" for changes of h / ||h|| at each column.
        sublayers: What each block's parts are called within an iteration, such as "blocks.0.attn",
            and "boundary" for what an iteration does between its blocks. A state of several parts
            is seen between blocks only, so each block is one sublayer there.
        triangles: Float[Tensor, "loop batch k k"], the upper triangular factor R of each
            iteration's QR decomposition, with a diagonal of at least 0. Entry 0 is that of `start`.
        shares: Float[Tensor, "loop sublayer batch k"], in nats; their sum over sublayers is the
            iteration's exponent. 0 where an iteration does not have the sublayer.
    """

    start: int
    space: Space
    sublayers: tuple[str, ...]
    triangles: Float[Tensor, "loop batch k k"]
    shares: Float[Tensor, "loop sublayer batch k"]

    @property
    def exponents(self) -> Float[Tensor, "loop batch k"]:
        """The exponents of each iteration, in nats."""
        return self.triangles.diagonal(dim1=2, dim2=3).log()

    def spectrum(self, skip: int = 0) -> Float[Tensor, "batch k"]:
        """The exponents as means over iterations, in nats per iteration.

        Args:
            skip: Iterations to leave out at the beginning, in which the directions settle.

        Raises:
            ValueError: No iteration is left.
        """
        return self.exponents[one_in_range("skip", skip, len(self.triangles)) :].mean(0)

    def singular_rates(self) -> Float[Tensor, "batch k"]:
        """The logarithms of the singular values of all iterations together, over their number, in
        falling order; NaN where rounding hides them.

        With as many exponents as the state has dimensions these are those of the whole Jacobian;
        with fewer, of its restriction to the directions that were followed.
        """
        product = torch.eye(self.triangles.shape[-1], device=self.triangles.device)
        product = product.to(self.triangles)
        scale = torch.zeros_like(self.triangles[0, :, 0, :1])
        for factor in self.triangles:
            product = factor @ product
            size = product.abs().amax((-1, -2), keepdim=True)
            product, scale = product / size, scale + size[..., 0].log()
        values = torch.linalg.svdvals(product)
        hidden = values <= values[:, :1] * 10 * torch.finfo(values.dtype).eps
        rates: Tensor = (values.log() + scale) / len(self.triangles)
        return rates.masked_fill(hidden, torch.nan)

    def frame(self) -> pd.DataFrame:
        """One row per iteration, example and exponent: loop, example, rank (0 for the first
        exponent), exponent, and one column for the share of each sublayer, in nats.
        """
        loops, batch, k = self.exponents.shape
        columns = {"exponent": self.exponents}
        columns |= {name: self.shares[:, i] for i, name in enumerate(self.sublayers)}
        counted = range(self.start, self.start + loops)
        return tidy(columns, loop=counted, example=range(batch), rank=range(k))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the spectrum, and the share of each sublayer in the first exponent."""
        from loopscope.interp.drawing.stability import spectrum

        return spectrum(self, title)


@differentiated
def lyapunov_spectrum(
    model: LoopedModel,
    inputs: Inputs,
    k: int = 4,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    parts: str | Sequence[str] | None = None,
    space: Space = "state",
    start: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> LyapunovSpectrum:
    """The k leading finite-time Lyapunov exponents of a run, per iteration and sublayer.

    Random changes of the state are pushed through the iterations in forward mode
    (Jacobian-vector products) and made orthonormal again after each of them (QR).

    Args:
        inputs, n_loops, readout: As for `dynamics`.
        k: Exponents; at most as many as the shortest example's state has dimensions.
        positions: The columns whose states vary, jointly. The states of the others, and of padding,
            are held fixed where an iteration begins.
        parts: The parts of the state that vary, jointly. None means those that this family's
            iterations hand on (`LoopedModel.loop_parts`).
        space: "state" measures changes of the state; "direction" those of h / ||h|| at each
            column, for a stream that grows along its own direction without bound.
        start: The iteration before which the changes begin, from 0. None means the first one to
            which all these parts are handed.
        seed: Of the first directions, which are the same for every example.
        batch_size: Examples run at a time; each takes k rows.

    Raises:
        ValueError: More exponents than dimensions, an iteration that the call does not have, a part
            that cannot vary, or a model whose examples depend on one another.

    Source:
        Benettin et al. 1980, "Lyapunov characteristic exponents for smooth dynamical systems"; for
        recurrent networks Engelken et al. 2023 (arXiv 2006.02427).
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    whole = varying(model, batch, positions, parts)
    k = checked_count(k, "k")
    start = checked_start(model, batch, whole.names, start, n_loops)
    batch_size = rows_at_once(model, batch, batch_size)
    triangles, shares = [], []
    for rows, free in zip(
        in_chunks(batch, batch_size, "lyapunov"), whole.split(batch_size), strict=True
    ):
        generator = seeded(seed)
        followed = Followed(model, free, checked_space(space), n_loops)
        found = list(followed.run(begin_batch(model, rows, n_loops), start, k, generator))
        triangles.append(torch.stack([triangle for triangle, _ in found]))
        names = tuple(dict.fromkeys(name for _, each in found for name in each))
        nothing = torch.zeros_like(triangles[-1][0, :, 0])
        by_loop = [torch.stack([each.get(name, nothing) for name in names]) for _, each in found]
        shares.append(torch.stack(by_loop))
    return LyapunovSpectrum(
        start, space, names, torch.cat(triangles, dim=1), torch.cat(shares, dim=2)
    )
