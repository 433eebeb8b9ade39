"""Probes fitted at one iteration and tested at another: does the model keep one code?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked, at_site, places_of, points_by_block
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.probes.ridge import check_strength, ridge_maps
from loopscope.interp.probes.states import ReadStates, split_rows
from loopscope.interp.probes.tasks import Task
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class TransferMatrix(OneScreen):
    """Held-out scores of probes that were fitted at one iteration and tested at another.

    Attributes:
        blocks: The name of each block within an iteration, e.g. "blocks.0".
        score: Float[Tensor, "block fitted tested"], by block and by the two iterations, from 0; NaN
            for an iteration that leaves the block out.
        metric: "accuracy" or "R2".
        constant: The score of the best answer that looks at no state.
        n_train, n_test: Reads that were fitted, and held out.
    """

    blocks: tuple[str, ...]
    score: Float[Tensor, "block fitted tested"]
    metric: str
    constant: float
    n_train: int
    n_test: int

    def kept(self) -> Float[Tensor, " block"]:
        """The share of their scores that probes keep at other iterations: score - constant, summed
        over pairs of unequal iterations, over the same sum of the probes that were fitted where
        they are tested. It is 1 for one code throughout, and at most 0 where each iteration has a
        code of its own.

        Iterations whose own probe is not above the constant have nothing to keep and are left out
        as tested ones; NaN where that leaves none.
        """
        above = self.score - self.constant
        at_home = above.diagonal(dim1=1, dim2=2)[:, None].expand_as(above)
        apart = ~torch.eye(above.shape[1], dtype=torch.bool)
        counted = apart & (at_home > 0) & ~above.isnan()
        return above.where(counted, 0).sum((1, 2)) / at_home.where(counted, 0).sum((1, 2))

    def frame(self) -> pd.DataFrame:
        """One row per block, fitted and tested iteration: block, fitted, tested, score,
        constant.
        """
        loops = self.score.shape[1]
        columns = {"score": self.score}
        frame = tidy(columns, block=self.blocks, fitted=range(loops), tested=range(loops))
        return frame.assign(constant=self.constant)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: one map per block, fitted iterations by tested ones."""
        from loopscope.interp.drawing.probes import transfer

        return transfer(self, title)


@torch.no_grad()
@evaluated
def transfer_matrix(
    model: LoopedModel,
    inputs: Inputs,
    targets: Shaped[Tensor, ...],
    n_loops: int | None = None,
    *,
    site: str | None = None,
    positions: Picked | int | None = None,
    strength: float = 1.0,
    held_out: float | Bool[Tensor, " batch"] = 0.25,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
    seed: int = 0,
) -> TransferMatrix:
    """Fit a ridge probe of each block at every iteration, and test it at every other one.

    Args:
        inputs, targets, n_loops, positions, strength, held_out, readout, batch_size, seed: As for
            `probe`.
        site: A site of the blocks in the loop; None means the residual after each.

    Raises:
        KeyError, ValueError: As for `probe`, or a site that no block of the loop has.
    """
    check_strength(strength)
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    own_site = at_site(places_of(model, n_loops), site or model.lens_site)[0].site
    blocks = points_by_block(model, n_loops, own_site)
    names = [name for points in blocks.values() for name in points.values()]
    states = ReadStates.of(model, batch, names, positions, n_loops, batch_size)
    task = Task.of(states, targets)
    train, test = split_rows(len(batch), held_out, seed)
    maps = dict(zip(states.names, ridge_maps(states, [task], train, strength), strict=True))
    pairs = [
        (i, s, t, maps[fitted], tested)
        for i, points in enumerate(blocks.values())
        for s, fitted in points.items()
        for t, tested in points.items()
    ]
    answers: list[list[Tensor]] = [[] for _ in pairs]
    for _, chunk in states.chunks(test):
        for found, (_, _, _, linear, name) in zip(answers, pairs, strict=True):
            found.append(task.answer(linear(chunk[name])))
    held, score = states.reads(test), torch.full((len(blocks), n_loops, n_loops), torch.nan)
    score = score.double()
    for found, (i, s, t, _, _) in zip(answers, pairs, strict=True):
        score[i, s, t] = task.score(torch.cat(found), held)
    constant = task.constant(states.reads(train), held)
    sizes = len(states.reads(train)), len(held)
    return TransferMatrix(tuple(blocks), score, task.metric, constant, *sizes)
