"""Early exit: the iteration after which a criterion on answers or states lets an example stop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.dynamics.answered import dynamics_and_lens
from loopscope.interp.dynamics.states import Dynamics
from loopscope.interp.exits.halting import Stops, check_iterations, first_stop
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.models.basis.numbers import checked_count, checked_number
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops


@dataclass(frozen=True)
class Criterion(ABC):
    """A rule for early exit: an example exits once a condition holds in `hits` iterations in a row.

    Attributes:
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
        of_states: Whether the condition looks at states; otherwise it looks at answers.
    """

    hits: int = field(default=1, kw_only=True)
    min_loops: int = field(default=1, kw_only=True)
    of_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_count(self.hits, "hits")
        checked_count(self.min_loops, "min_loops")

    @abstractmethod
    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        """Whether each read meets the condition after each iteration. False if an earlier iteration
        is needed and there is none.
        """


@dataclass(frozen=True)
class Thresholded(Criterion):
    """A criterion that compares a number of each iteration with a threshold.

    Attributes:
        threshold: The threshold, in the unit of the number.
    """

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number(self.threshold, "threshold", infinite=True)


@dataclass(frozen=True)
class KLBelow(Thresholded):
    """Exit when the answer hardly changes: KL(p_t || p_{t-1}) of successive answers is below a
    threshold (arXiv 2502.05171).

    Attributes:
        threshold: The largest KL, in nats.
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
    """

    threshold: float = 1e-3

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return lens.kl() < self.threshold


@dataclass(frozen=True)
class EntropyBelow(Thresholded):
    """Exit when the answer is certain: its entropy is below a threshold.

    Attributes:
        threshold: The largest entropy, in nats.
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
    """

    threshold: float = 3.0

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return lens.entropy() < self.threshold


@dataclass(frozen=True)
class TopStable(Criterion):
    """Exit when the most likely token has been the same in the last `hits` iterations.

    Attributes:
        hits: How many iterations the token must stay.
        min_loops: The number of iterations before which no example exits.
    """

    hits: int = field(default=5, kw_only=True)

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        top = lens.top(1).tokens[..., 0]
        return torch.cat([torch.zeros_like(top[:1], dtype=torch.bool), top[1:] == top[:-1]])


@dataclass(frozen=True)
class CosineAbove(Thresholded):
    """Exit when the state hardly turns: the cosine of h_t and h_{t-1} is above a threshold. h_0 is
    the input of the first iteration.

    Attributes:
        threshold: The smallest cosine.
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
    """

    threshold: float = 0.999
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).state_cosine()[1:, :, 0] > self.threshold


@dataclass(frozen=True)
class StepBelow(Thresholded):
    """Exit when the state hardly moves: ||h_t - h_{t-1}|| / ||h_{t-1}|| is below a threshold. h_0
    is the input of the first iteration.

    Attributes:
        threshold: The largest step, as a share of the state's length.
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
    """

    threshold: float = 0.03
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).step_norm(relative=True)[1:, :, 0] < self.threshold


@dataclass(frozen=True)
class AccelerationBelow(Thresholded):
    """Exit when the steps of the state hardly change: ||h_t - 2 h_{t-1} + h_{t-2}|| is below a
    threshold (arXiv 2509.23314).

    Attributes:
        threshold: The largest acceleration, in units of the state; it has no default.
        hits: How many iterations in a row must meet the condition.
        min_loops: The number of iterations before which no example exits.
    """

    hits: int = field(default=2, kw_only=True)
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).second_difference()[1:, :, 0] < self.threshold


@dataclass(frozen=True, kw_only=True)
class Exits(Stops):
    """The iteration after which a criterion lets each example exit, and the answer there.

    Attributes:
        criterion: The criterion.
    """

    criterion: Criterion


@evaluated
def exits(
    model: LoopedModel,
    inputs: Inputs,
    criterion: Criterion,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> Exits:
    """Run all iterations, and find after which one a criterion lets each example exit.

    To compare several criteria on one run, use `apply_criterion`.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        criterion: The rule, such as `KLBelow()` or `StepBelow(0.03)`.
        n_loops: The number of iterations that are run, after which an example that never exits is
            read. None means the number that the checkpoint records.

    Returns:
        The exits of all examples.
    """
    batch = as_batch(model, inputs, readout)
    if not criterion.of_states:
        return apply_criterion(readout_lens(model, batch, n_loops), criterion)
    states, lens = dynamics_and_lens(model, batch, checked_loops(n_loops, model.cfg.n_loops))
    return apply_criterion(lens, criterion, states)


def apply_criterion(lens: Lens, criterion: Criterion, states: Dynamics | None = None) -> Exits:
    """Find after which iteration a criterion lets each read of a `readout_lens` exit; one lens
    serves any number of criteria.

    Args:
        lens: The answers after every iteration, from `readout_lens`.
        criterion: The rule, such as `KLBelow()` or `StepBelow(0.03)`.
        states: For criteria that look at states: `dynamics(..., positions="readout")` of the same
            inputs and iterations.

    Returns:
        The exits of all reads.

    Raises:
        ValueError: The criterion looks at states but `states` is missing or of other reads, or the
            lens has visits instead of iterations, as a `logit_lens` has.
    """
    check_iterations(lens)
    met = criterion.met(lens, states)
    holds = torch.zeros_like(met)
    for loop in range(max(criterion.hits, criterion.min_loops) - 1, len(met)):
        holds[loop] = met[loop + 1 - criterion.hits : loop + 1].all(0)
    stop, halted = first_stop(holds)
    return Exits(
        criterion=criterion,
        lens=lens,
        iterations=stop + 1,
        halted=halted,
        logits=lens.logits_at(stop),
    )


def _of(states: Dynamics | None, lens: Lens) -> Dynamics:
    if states is None:
        raise ValueError(
            "this criterion reads states: give it dynamics(model, inputs, n_loops,"
            ' positions="readout") of the same run'
        )
    wanted = (len(lens.loops) + 1, len(lens.example), 1)
    if states.states.shape[:3] != wanted:
        raise ValueError(
            f"the states must be those of the lens's reads, [point, batch, pos] = {list(wanted)},"
            f" got {list(states.states.shape[:3])}"
        )
    return states
