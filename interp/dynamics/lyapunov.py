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
    grows. The exponents are in falling order once the directions have settled, which takes a few
    iterations.

    Attributes:
        start: The iteration, from 0, before which the small changes are made.
        space: "state" measures changes of h, "direction" changes of h / ||h|| at each column.
        sublayers: The names of the sublayers within an iteration, such as "blocks.0.attn".
            "boundary" is everything that an iteration does between its blocks. If the state has
            several parts, each block is one sublayer.
        triangles: Float[Tensor, "loop batch k k"], the upper triangular factor R of each
            iteration's QR decomposition, with a diagonal of at least 0. Entry 0 belongs to the
            iteration `start`.
        shares: Float[Tensor, "loop sublayer batch k"], how much each sublayer adds to the exponent,
            in nats; the sum over sublayers is the iteration's exponent. 0 if the iteration does not
            have the sublayer.
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
            skip: How many iterations to leave out at the beginning, while the directions settle.

        Raises:
            ValueError: No iteration is left.
        """
        return self.exponents[one_in_range("skip", skip, len(self.triangles)) :].mean(0)

    def singular_rates(self) -> Float[Tensor, "batch k"]:
        """The logarithms of the singular values of the product of all iterations, divided by their
        number, in falling order. NaN where rounding hides a value.

        With as many exponents as the state has dimensions, these are the singular values of the
        whole Jacobian. With fewer, they are those of the Jacobian on the directions that were
        followed.
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
        """One row per iteration, example and exponent. The columns are loop, example, rank (0 for
        the first exponent), exponent, and one column per sublayer for what it adds, in nats.
        """
        loops, batch, k = self.exponents.shape
        columns = {"exponent": self.exponents}
        columns |= {name: self.shares[:, i] for i, name in enumerate(self.sublayers)}
        counted = range(self.start, self.start + loops)
        return tidy(columns, loop=counted, example=range(batch), rank=range(k))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the spectrum, and how much each sublayer adds to the first exponent."""
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
    """Measure how fast small changes of the state grow or shrink per iteration: the k leading
    finite-time Lyapunov exponents.

    Random changes of the state are pushed through the iterations in forward mode (Jacobian-vector
    products), and made orthonormal again after each iteration (QR). The growth is also split
    between the sublayers.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        k: The number of exponents, at most the dimension of the shortest example's state.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns whose states vary together: "real" for all tokens except padding,
            "readout" for the answer position, "all" for padding too, or a list of columns. All
            other columns, and padding, are held fixed at the start of each iteration.
        parts: The parts of the state that vary together. None means the parts that an iteration
            hands to the next (`LoopedModel.loop_parts`).
        space: "state" measures changes of the state h. "direction" measures changes of h / ||h|| at
            each column, for a residual stream whose length grows without bound.
        start: The iteration, from 0, before which the changes are made. None means the first
            iteration to which all these parts are handed.
        seed: The seed of the first directions, which are the same for every example.
        batch_size: How many examples run at a time; each takes k rows.

    Returns:
        The exponents by iteration and example, and how much each sublayer adds to them.

    Raises:
        ValueError: k is larger than the dimension of the state, the run does not have the
            iteration, a part cannot vary, or the rows of the model depend on one another.

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
