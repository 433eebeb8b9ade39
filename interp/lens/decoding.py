"""Decodability: the ranks of chosen tokens under a lens, and how often a token is the top one.

`depth` in the frames is an amount, the number of visits run (the effective depth): with L layers,
layer l of loop t (both from 0) is read when t * L + l + 1 visits have run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, as_batch, in_chunks, rows_at_once
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.lens.record import Lens, visit_table
from loopscope.models.basis.numbers import given_tensor
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

Targets = Int[Tensor, "row target"] | Sequence[Sequence[int]]
Columns = Int[Tensor, "batch target"] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class RankTrajectory(OneScreen):
    """Ranks and probabilities of several tokens at every visit and read of a lens.

    Attributes:
        lens: The lens.
        tokens: Int[Tensor, "read target"], the token ids that are followed.
        rank: Int[Tensor, "visit read target"], how many tokens have a larger logit; 0 is the top.
        prob: Float[Tensor, "visit read target"], the probability.
    """

    lens: Lens
    tokens: Int[Tensor, "read target"]
    rank: Int[Tensor, "visit read target"]
    prob: Float[Tensor, "visit read target"]

    def mean_reciprocal_rank(self) -> Float[Tensor, "visit target"]:
        """The mean over the reads of 1 / (rank + 1); 1 if a target is always the top token."""
        return _reciprocal(self.rank).mean(1)

    def frame(self) -> pd.DataFrame:
        """One row per visit, read and target. The columns are example, position, visit, loop,
        layer, depth (the number of visits run), target, token, rank and prob.
        """
        n_visits, n_reads, n_targets = self.rank.shape
        places = _visit_table(self.lens, n_reads * n_targets)
        example, position = (
            x.repeat_interleave(n_targets).repeat(n_visits)
            for x in (self.lens.example, self.lens.position)
        )
        frame = pd.concat(
            [pd.DataFrame({"example": example.cpu(), "position": position.cpu()}), places], axis=1
        )
        frame["target"] = list(range(n_targets)) * (n_visits * n_reads)
        frame["token"] = self.tokens.cpu().expand(n_visits, -1, -1).flatten().numpy()
        if self.lens.model.vocab is not None:
            frame["token"] = [self.lens.model.vocab.words[token] for token in frame["token"]]
        return frame.assign(
            rank=self.rank.flatten().cpu().numpy(), prob=self.prob.flatten().cpu().numpy()
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: rank and probability of each target over visits."""
        from loopscope.interp.drawing.lenses import ranks

        return ranks(self, title)


def rank_trajectory(lens: Lens, tokens: Targets | Sequence[str]) -> RankTrajectory:
    """Follow chosen tokens through a lens: their ranks and probabilities, e.g. of bridge entities
    and the answer.

    Args:
        lens: A lens, from any of the lens functions.
        tokens: Int[Tensor, "read target"], one row of token ids per read. Or a list of words, the
            same targets for every read.

    Returns:
        The ranks and probabilities by visit, read and target.

    Raises:
        ValueError: There is not one row per read, no target, a word that is not one token, or a
            token outside the vocabulary.

    Source:
        Trajectories of chosen tokens over the blocks of every iteration: arXiv 2507.02199.
    """
    tokens = _for_every_read(lens, tokens).to(lens.heads_input.device)
    targets = tokens.unbind(1)
    rank = torch.stack([lens.rank(target) for target in targets], dim=-1)
    return RankTrajectory(
        lens, tokens, rank, torch.stack([lens.prob(target) for target in targets], dim=-1)
    )


def _for_every_read(lens: Lens, tokens: Targets | Sequence[str]) -> Int[Tensor, "read target"]:
    """Tokens by read and target; a list of words goes to every read."""
    if isinstance(tokens, Tensor):
        return _matrix("tokens", tokens)
    words = [word for word in tokens if isinstance(word, str)]
    if words and len(words) == len(tokens):
        ids = [lens.model.to_single_token(word) for word in words]
        return torch.tensor(ids, device="cpu").expand(len(lens.example), -1)
    return _matrix("tokens", [row for row in tokens if not isinstance(row, str)])


@dataclass(frozen=True)
class Decodability(OneScreen):
    """How often the logit lens reads each target at the target's own position, after every visit.

    Attributes:
        accuracy: Float[Tensor, "visit target"], the share of the examples in which the target is
            the top token.
        mean_reciprocal_rank: Float[Tensor, "visit target"], the mean over the examples of 1 / (rank
            + 1).
        names: The name of each visit, e.g. "loops.3.blocks.0".
        loops, layers: The iteration and block of each visit, from 0; None outside the loop.
        n_examples: The number of examples.
    """

    accuracy: Float[Tensor, "visit target"]
    mean_reciprocal_rank: Float[Tensor, "visit target"]
    names: tuple[str, ...]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    n_examples: int

    def frame(self, targets: Sequence[str] | None = None) -> pd.DataFrame:
        """One row per visit and target. The columns are visit, loop, layer, depth (the number of
        visits run), target, accuracy and mean_reciprocal_rank.

        Args:
            targets: The names of the targets, e.g. ["bridge", "answer"]; None numbers them from 0.

        Raises:
            ValueError: There is not one name per target.
        """
        n_visits, n_targets = self.accuracy.shape
        called = list(range(n_targets)) if targets is None else list(targets)
        if len(called) != n_targets:
            raise ValueError(
                f"one name per target is needed: there are {n_targets} targets, got {len(called)}"
                " names"
            )
        frame = _visit_table(self, n_targets).assign(target=called * n_visits)
        frame["accuracy"] = self.accuracy.flatten().cpu().numpy()
        return frame.assign(mean_reciprocal_rank=self.mean_reciprocal_rank.flatten().cpu().numpy())

    def plot(self, title: str = "") -> go.Figure:
        """A picture: accuracy and mean reciprocal rank of each target over visits."""
        from loopscope.interp.drawing.lenses import decodability

        return decodability(self, title)


@torch.no_grad()
@evaluated
def decodability(
    model: LoopedModel,
    inputs: Inputs,
    targets: Targets,
    positions: Columns,
    n_loops: int | None = None,
    *,
    batch_size: int = 512,
) -> Decodability:
    """Measure how often the logit lens reads known targets, such as bridge entities, each at a
    position of its own.

    Args:
        inputs: A `Batch`, texts, or token ids. They need no `readout`, because `positions` says
            where the lens reads.
        targets: Int[Tensor, "batch target"], the token ids to find, e.g. the bridge entity and the
            answer of two-hop questions.
        positions: The column of each target, e.g. [1, 2] for the two relations. Or
            Int[Tensor, "batch target"] for columns of each example.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        batch_size: How many rows run at a time.

    Returns:
        The share of examples and the mean reciprocal rank, by visit and target.

    Raises:
        ValueError: The shape of targets or positions does not fit the inputs, or a number is
            outside the vocabulary or the input.

    Source:
        Figure 4 of arXiv 2604.07822; the mean reciprocal rank: arXiv 2405.15071.
    """
    batch = as_batch(model, inputs, -1 if isinstance(inputs, Tensor) else None)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    targets = _matrix("targets", targets)
    size = rows_at_once(model, batch, batch_size)
    columns = _checked_columns(batch, targets, positions)
    hits, reciprocal, lens = [], [], None
    for part, tokens, read in zip(
        in_chunks(batch, size, "depth"),
        targets.split(size),
        columns.split(size),
        strict=True,
    ):
        lens = _lens_at(model, part, n_loops, read)
        rank = lens.rank(tokens.flatten()).unflatten(1, tuple(tokens.shape))
        hits.append((rank == 0).double().sum(1))
        reciprocal.append(_reciprocal(rank).sum(1))
    if lens is None:
        raise ValueError("at least one example is needed, got an empty batch")
    accuracy, mean = (torch.stack(sums).sum(0) / len(batch) for sums in (hits, reciprocal))
    return Decodability(accuracy, mean, lens.names, lens.loops, lens.layers, len(batch))


def _matrix(what: str, tokens: Targets) -> Int[Tensor, "row target"]:
    """Tokens by row and target as a tensor."""
    matrix = given_tensor(tokens)
    if matrix.ndim != 2 or matrix.shape[1] < 1:
        raise ValueError(
            f"{what} must hold at least one target token for each read or example, but have"
            f" the shape {list(matrix.shape)}"
        )
    if matrix.is_floating_point() or matrix.dtype == torch.bool:
        raise TypeError(f"{what} must be integers, got {matrix.dtype}")
    return matrix


def _checked_columns(
    batch: Batch, targets: Tensor, positions: Columns
) -> Int[Tensor, "batch target"]:
    if len(targets) != len(batch):
        raise ValueError(
            f"one row of targets per example is needed: there are {len(batch)} examples, got the"
            f" shape {list(targets.shape)}"
        )
    columns = given_tensor(positions)
    if columns.shape not in (targets.shape, targets.shape[1:]):
        raise ValueError(
            f"one position per target is needed: the targets have the shape {list(targets.shape)},"
            f" got {list(columns.shape)}"
        )
    width = batch.tokens.shape[1]
    if bool(((columns < 0) | (columns >= width)).any()):
        raise ValueError(
            f"positions must be in 0..{width - 1}, got {columns.min()} to {columns.max()}"
        )
    return columns.to(batch.tokens.device).expand(targets.shape)


def _lens_at(
    model: LoopedModel, batch: Batch, n_loops: int, columns: Int[Tensor, "batch target"]
) -> Lens:
    """The logit lens with one read per example and target, at columns that differ by example."""
    shown, place = columns.unique(return_inverse=True)
    lens = logit_lens(model, batch, n_loops, positions=shown.tolist())
    reads = (torch.arange(len(batch), device=place.device)[:, None] * len(shown) + place).flatten()
    return replace(
        lens,
        heads_input=lens.heads_input[:, reads],
        example=lens.example[reads],
        position=lens.position[reads],
    )


def _reciprocal(rank: Int[Tensor, ...]) -> Float[Tensor, ...]:
    return 1.0 / (rank + 1).double()


def _visit_table(lens: Lens | Decodability, times: int) -> pd.DataFrame:
    """The name, loop, layer and depth of each visit, every row so many times."""
    table = visit_table(lens.names, lens.loops, lens.layers, times)
    return table.assign(depth=[run + 1 for run in range(len(lens.names)) for _ in range(times)])
