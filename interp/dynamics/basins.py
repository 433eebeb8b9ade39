"""Runs of the same input from several first states: do they end in the same state, and in the same
answer?

Axes: start batch; `n` counts the numbers of a state that vary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.columns import Shown
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.metrics import Answers
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dynamics.changes import Space, checked_space, varying
from loopscope.interp.dynamics.starts import apart, changed_start, ended, starts
from loopscope.interp.dynamics.states import iteration_start
from loopscope.interp.dynamics.statistics import norm_of
from loopscope.models.basis.draws import checked_seed
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class RestartVote(OneScreen):
    """The answer of the unchanged run, and the answers that several runs together give.

    Attributes:
        single: Int[Tensor, " batch"], the answer (a token id) of the unchanged run.
        majority: Int[Tensor, " batch"], the answer of most runs; of equally frequent answers, that
            of the earliest run.
        steadiest: Int[Tensor, " batch"], the answer of the run with the smallest last step.
        share: Float[Tensor, " batch"], the share of runs that give the majority's answer.
    """

    single: Int[Tensor, " batch"]
    majority: Int[Tensor, " batch"]
    steadiest: Int[Tensor, " batch"]
    share: Float[Tensor, " batch"]

    def frame(self) -> pd.DataFrame:
        """One row per example. The columns are example, single, majority, steadiest (token ids) and
        share.
        """
        columns = {
            "single": self.single,
            "majority": self.majority,
            "steadiest": self.steadiest,
            "share": self.share,
        }
        return tidy(columns, example=range(len(self.single)))

    def accuracy(self, answers: Answers) -> pd.DataFrame:
        """How often each rule is right. The columns are rule, accuracy, gained and lost: the
        examples that a rule answers right and the single run wrong, and the reverse.

        Args:
            answers: The token id of each example's right answer.
        """
        tokens = torch.as_tensor(answers, device=self.single.device)
        if tokens.is_floating_point() or tokens.shape not in ((), self.single.shape):
            raise ValueError(
                f"one token per row is needed: there are {len(self.single)} rows, got answers of"
                f" the shape {list(tokens.shape)} ({tokens.dtype})"
            )
        before, rows = self.single == tokens, []
        for rule in ("single", "majority", "steadiest"):
            right = getattr(self, rule) == tokens
            gained, lost = int((right & ~before).sum()), int((before & ~right).sum())
            rows.append((rule, float(right.double().mean()), gained, lost))
        return pd.DataFrame(rows, columns=["rule", "accuracy", "gained", "lost"])

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the share of runs that give the majority's answer, example by example."""
        from loopscope.interp.drawing.stability import agreement

        return agreement(self, title)


@dataclass(frozen=True)
class Basins(OneScreen):
    """The last states and answers of runs of the same inputs from several first states.

    Attributes:
        space: "state" compares states h, "direction" compares h / ||h|| at each column.
        tol: Two last states count as the same if their relative distance is below this number.
        moved: Float[Tensor, "start batch"], how far the first state was moved, as a share of its
            norm. Start 0 is the unchanged run, so its entry is 0.
        distance: Float[Tensor, "start batch"], the relative distance from the last state of start
            0: ||end - end of start 0|| / ||end of start 0||.
        basin: Int[Tensor, "start batch"], the number of the last state among the distinct last
            states of its example, in the order in which the starts reach them. Start 0 has the
            number 0.
        residual: Float[Tensor, "start batch"], the relative step of the last iteration, ||h_T -
            h_{T-1}|| / ||h_{T-1}||.
        answers: Int[Tensor, "start batch"], the top token at the answer position.
    """

    space: Space
    tol: float | int
    moved: Float[Tensor, "start batch"]
    distance: Float[Tensor, "start batch"]
    basin: Int[Tensor, "start batch"]
    residual: Float[Tensor, "start batch"]
    answers: Int[Tensor, "start batch"]

    @property
    def same_state(self) -> Float[Tensor, " batch"]:
        """The share of the other starts that end in the same state as the unchanged run."""
        return (self.basin[1:] == 0).double().mean(0)

    @property
    def same_answer(self) -> Float[Tensor, " batch"]:
        """The share of the other starts that give the same answer as the unchanged run."""
        return (self.answers[1:] == self.answers[0]).double().mean(0)

    def vote(self) -> RestartVote:
        """Combine the answers of all runs, by majority and by the smallest last step."""
        same = (self.answers[:, None] == self.answers[None]).sum(1)
        winner, steady = same.argmax(0), self.residual.argmin(0)
        example = torch.arange(self.answers.shape[1], device=self.answers.device)
        share = same.amax(0).double() / len(self.answers)
        return RestartVote(
            self.answers[0], self.answers[winner, example], self.answers[steady, example], share
        )

    def frame(self) -> pd.DataFrame:
        """One row per start and example. The columns are start, example, moved, distance, basin,
        residual and answer (a token id).
        """
        runs, batch = self.answers.shape
        columns = {
            "moved": self.moved,
            "distance": self.distance,
            "basin": self.basin,
            "residual": self.residual,
            "answer": self.answers,
        }
        return tidy(columns, start=range(runs), example=range(batch))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: which starts of each example end in the same state, and in the same answer."""
        from loopscope.interp.drawing.stability import basins

        return basins(self, title)


@torch.no_grad()
@evaluated
def basins(
    model: LoopedModel,
    inputs: Inputs,
    n_starts: int = 8,
    scale: float | int | None = None,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    space: Space = "state",
    tol: float | int = 1e-2,
    seed: int = 0,
    batch_size: int = 128,
) -> Basins:
    """Run the same inputs from several first states, and compare the last states and the answers.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_starts: The number of runs, with the unchanged run (start 0).
        scale: The norm of the random change of the first state, as a share of that state's norm. If
            the first state is all zeros, the state before the second iteration is changed instead.
            None draws a new first state for models that draw it from a seed (such as Huginn), and
            means 0.1 for all other models.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns of the state that are compared and changed: "real" for all tokens
            except padding, "readout" for the answer position, "all" for padding too, or a list of
            columns.
        space: "state" compares states h. "direction" compares h / ||h|| at each column, for a
            residual stream whose length grows without bound.
        tol: Two last states count as the same if their relative distance is below this number.
        seed: Start i is drawn with the seed `seed` + i. The seed of the unchanged run is left out,
            so later starts use the next higher one.
        batch_size: How many rows run at a time.

    Returns:
        The last states and answers by start and example.

    Raises:
        ValueError: There are fewer than two starts, the scale is not above 0, a run from a state of
            zeros has a single iteration, or the rows of the model depend on one another.

    Source:
        Many first states: arXiv 2605.21488 (breadth); spurious fixed points: arXiv 2601.10679.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    _check(n_starts, scale, tol)
    seed = checked_seed(seed)
    whole = varying(model, batch, positions, None)
    start = changed_start(model, batch, whole, None, n_loops)
    stop, size = iteration_start(model, start, n_loops), rows_at_once(model, batch, batch_size)
    pieces: list[dict[str, Tensor]] = []
    for rows, free in zip(in_chunks(batch, size, "basins"), whole.split(size), strict=True):
        runs = starts(model, rows, free, n_starts, scale, n_loops, stop, seed)
        firsts, ends = [], []
        for state in runs:
            firsts.append(free.joined(list(free.values(model, state).values()), 1)[:, 0])
            ends.append(ended(model, free, state, rows.readout, checked_space(space)))
        states = torch.stack([end.state for end in ends])
        pieces.append(
            {
                "moved": apart(torch.stack(firsts), firsts[0]),
                "distance": apart(states, states[0]),
                "basin": _numbered(states, tol),
                "residual": torch.stack([end.residual for end in ends]),
                "answers": torch.stack([end.answers for end in ends]),
            }
        )
    found = {name: torch.cat([piece[name] for piece in pieces], dim=1) for name in pieces[0]}
    return Basins(space, tol, **found)


def _check(n_starts: int, scale: float | int | None, tol: float | int) -> None:
    checked_count(n_starts, "n_starts", least=2)
    checked_number(tol, "tol", above=0)
    if scale is not None:
        checked_number(scale, "scale", above=0)


@torch.no_grad()
@evaluated
def restart_vote(
    model: LoopedModel,
    inputs: Inputs,
    n_starts: int = 8,
    scale: float | int | None = None,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    seed: int = 0,
    batch_size: int = 128,
) -> RestartVote:
    """Run the same inputs from several first states, and combine the answers: by majority, and by
    the run that settles best.

    It returns `basins(...).vote()`.

    Args:
        inputs, n_starts, scale, n_loops, readout, positions, seed, batch_size: The runs, as
            `basins` describes them.

    Source:
        Choosing among restarts by the residual: arXiv 2605.21488.
    """
    found = basins(
        model, inputs, n_starts, scale, n_loops, readout=readout, positions=positions, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    return found.vote()


def _numbered(
    states: Float[Tensor, "start batch n"], tol: float | int
) -> Int[Tensor, "start batch"]:
    """For each state the number of the first distinct state that it is near to; the first state of
    each number stands for it.
    """
    numbers = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
    first = torch.ones_like(numbers, dtype=torch.bool)
    for i in range(1, len(states)):
        near = first[:i] & (norm_of(states[:i] - states[i]) / norm_of(states[:i]) < tol)
        first[i] = ~near.any(0)
        new = numbers[:i].amax(0) + 1
        numbers[i] = torch.where(
            near.any(0), numbers[:i].gather(0, near.int().argmax(0)[None])[0], new
        )
    return numbers
