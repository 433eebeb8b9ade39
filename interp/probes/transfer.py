"""Probes fitted at one iteration and tested at another: does the model keep one code?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked, at_site, places_of, points_by_block
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.probes.fits import tasks_of, tensors_of
from loopscope.interp.probes.kept import StatesJob
from loopscope.interp.probes.ridge import check_strength, ridge_maps
from loopscope.interp.probes.states import HeldOut, ReadStates, Side, split_rows
from loopscope.interp.probes.tasks import Task
from loopscope.interp.shards.share import Shard
from loopscope.interp.shards.work import Results
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class TransferMatrix(OneScreen):
    """Scores of probes that were fitted at one iteration and tested at another, on reads that were
    held out.

    Attributes:
        blocks: The name of each block within an iteration, e.g. "blocks.0".
        score: Float[Tensor, "block fitted tested"], by block, by the iteration of the fit and by
            that of the test, from 0. NaN if an iteration leaves the block out.
        metric: "accuracy" or "R2".
        constant: The score of the best constant answer, which uses no state.
        n_train, n_test: How many reads were fitted, and how many held out.
    """

    blocks: tuple[str, ...]
    score: Float[Tensor, "block fitted tested"]
    metric: str
    constant: float
    n_train: int
    n_test: int

    def kept(self) -> Float[Tensor, " block"]:
        """How much of their scores probes keep at other iterations: 1 if the model has one code at
        all iterations, at most 0 if each iteration has a code of its own.

        It is a ratio of two sums over pairs of different iterations. The first sum takes the score
        of the probe at the tested iteration, minus the constant. The second takes the same
        difference for the probe that was fitted at the tested iteration. Tested iterations whose
        own probe does not exceed the constant are left out; NaN if none is left.
        """
        above = self.score - self.constant
        at_home = above.diagonal(dim1=1, dim2=2)[:, None].expand_as(above)
        apart = ~torch.eye(above.shape[1], dtype=torch.bool, device=above.device)
        counted = apart & (at_home > 0) & ~above.isnan()
        return above.where(counted, 0).sum((1, 2)) / at_home.where(counted, 0).sum((1, 2))

    def frame(self) -> pd.DataFrame:
        """One row per block and pair of iterations. The columns are block, fitted, tested, score
        and constant.
        """
        loops = self.score.shape[1]
        columns = {"score": self.score}
        frame = tidy(columns, block=self.blocks, fitted=range(loops), tested=range(loops))
        return frame.assign(constant=self.constant)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: one map per block, fitted iterations by tested ones."""
        from loopscope.interp.drawing.probes import transfer

        return transfer(self, title)


@dataclass(frozen=True)
class TransferFit:
    """All that makes the matrix of some states.

    Attributes:
        blocks: For each block its hook point at each iteration that visits it.
        n_loops: Iterations.
        task: What is read.
        strength: As for `probe`.
    """

    blocks: Mapping[str, Mapping[int, str]]
    n_loops: int
    task: Task
    strength: float

    def about(self) -> dict[str, Any]:
        """The fit without its tensors, as JSON."""
        blocks = {block: list(points.items()) for block, points in self.blocks.items()}
        return {"blocks": blocks, "n_loops": self.n_loops, "strength": self.strength}

    def tensors(self) -> Results:
        """The values and the classes of the task."""
        return tensors_of((self.task,))

    @classmethod
    def kept(cls, about: Mapping[str, Any], common: Results) -> TransferFit:
        """The fit that `about` and `tensors` describe."""
        blocks = {block: dict(points) for block, points in about["blocks"].items()}
        return cls(blocks, about["n_loops"], tasks_of(common)[0], about["strength"])

    def of(self, train: Side, test: Side) -> TransferMatrix:
        """Fit the probes on one side, and score each of them at every iteration of the other."""
        names = [name for points in self.blocks.values() for name in points.values()]
        maps = dict(zip(names, ridge_maps(names, [self.task], train, self.strength), strict=True))
        pairs = [
            (i, s, t, maps[fitted], tested)
            for i, points in enumerate(self.blocks.values())
            for s, fitted in points.items()
            for t, tested in points.items()
        ]
        answers: list[list[Tensor]] = [[] for _ in pairs]
        for _, states in test.pieces:
            for found, (_, _, _, linear, name) in zip(answers, pairs, strict=True):
                found.append(self.task.answer(linear(states[name])))
        shape = len(self.blocks), self.n_loops, self.n_loops
        score = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
        for found, (i, s, t, _, _) in zip(answers, pairs, strict=True):
            score[i, s, t] = self.task.score(torch.cat(found), test.reads)
        constant = self.task.constant(train.reads, test.reads)
        sizes = len(train.reads), len(test.reads)
        return TransferMatrix(tuple(self.blocks), score, self.task.metric, constant, *sizes)

    def of_shard(
        self, train: Int[Tensor, " read"], test: Int[Tensor, " held_out"]
    ) -> TransferMatrix:
        """The record of a shard, which fits no probe."""
        return replace(self, blocks={}).of(Side(train, ()), Side(test, ()))


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
    held_out: HeldOut = 0.25,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
    seed: int = 0,
    save_to: str | Path | None = None,
    shard: Shard | None = None,
) -> TransferMatrix:
    """Test whether the model keeps one code for a property: fit a ridge probe of each block at
    every iteration, and test it at every other one.

    Args:
        inputs, readout, targets, positions, n_loops, batch_size: The reads and the property, as
            `probe` describes them.
        strength, held_out, seed, save_to, shard: The fit, as `probe` describes it.
        site: The site of the blocks in the loop, such as "mlp_out"; None means the residual stream
            after each block.

    Returns:
        The scores. For a shard the record has no blocks, because a probe is fitted on all rows.

    Raises:
        KeyError: No block of the loop has the site.
        ValueError: `probe` would refuse the call.
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
    fit = TransferFit(blocks, n_loops, task, float(strength))
    job = StatesJob("transfer_matrix", states, train, test, save_to, shard)
    return job.record(fit, {"seed": seed})
