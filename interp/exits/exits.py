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
    """Exit once a condition has been met in `hits` iterations in a row.

    Attributes:
        hits: How many iterations in a row must meet the condition.
        min_loops: No example exits before this many iterations.
        of_states: Whether the condition reads states; otherwise it reads answers.
    """

    hits: int = field(default=1, kw_only=True)
    min_loops: int = field(default=1, kw_only=True)
    of_states: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checked_count(self.hits, "hits")
        checked_count(self.min_loops, "min_loops")

    @abstractmethod
    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        """Whether each iteration meets the condition; False where there is no earlier iteration to
        compare with.
        """


@dataclass(frozen=True)
class Thresholded(Criterion):
    """A criterion that compares a number of each iteration with a threshold.

    Attributes:
        threshold: In the number's unit.
    """

    threshold: float

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_number(self.threshold, "threshold", infinite=True)


@dataclass(frozen=True)
class KLBelow(Thresholded):
    """KL(p_t || p_{t-1}) of successive answers below a threshold, in nats (arXiv 2502.05171)."""

    threshold: float = 1e-3

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return lens.kl() < self.threshold


@dataclass(frozen=True)
class EntropyBelow(Thresholded):
    """Entropy of the answer below a threshold, in nats."""

    threshold: float = 3.0

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return lens.entropy() < self.threshold


@dataclass(frozen=True)
class TopStable(Criterion):
    """The most likely token has not changed in any of the last `hits` iterations."""

    hits: int = field(default=5, kw_only=True)

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        top = lens.top(1).tokens[..., 0]
        return torch.cat([torch.zeros_like(top[:1], dtype=torch.bool), top[1:] == top[:-1]])


@dataclass(frozen=True)
class CosineAbove(Thresholded):
    """Cosine of h_t and h_{t-1} above a threshold, h_0 being the first iteration's input."""

    threshold: float = 0.999
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).state_cosine()[1:, :, 0] > self.threshold


@dataclass(frozen=True)
class StepBelow(Thresholded):
    """||h_t - h_{t-1}|| / ||h_{t-1}|| below a threshold, h_0 being the first iteration's input."""

    threshold: float = 0.03
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).step_norm(relative=True)[1:, :, 0] < self.threshold


@dataclass(frozen=True)
class AccelerationBelow(Thresholded):
    """||h_t - 2 h_{t-1} + h_{t-2}|| below a threshold, in units of the state, twice in a row (arXiv
    2509.23314).
    """

    hits: int = field(default=2, kw_only=True)
    of_states: ClassVar[bool] = True

    def met(self, lens: Lens, states: Dynamics | None) -> Bool[Tensor, "loop read"]:
        return _of(states, lens).second_difference()[1:, :, 0] < self.threshold


@dataclass(frozen=True, kw_only=True)
class Exits(Stops):
    """Where a criterion lets each example exit.

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
    """Run all iterations and find where a criterion lets each example exit. For several criteria
    use `apply_criterion`.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        n_loops: The cap, at which an example that never exits is read. None means what the
            checkpoint records.
    """
    batch = as_batch(model, inputs, readout)
    if not criterion.of_states:
        return apply_criterion(readout_lens(model, batch, n_loops), criterion)
    states, lens = dynamics_and_lens(model, batch, checked_loops(n_loops, model.cfg.n_loops))
    return apply_criterion(lens, criterion, states)


def apply_criterion(lens: Lens, criterion: Criterion, states: Dynamics | None = None) -> Exits:
    """Find where a criterion lets each read of a `readout_lens` exit.

    One lens serves any number of criteria.

    Args:
        lens: The answers after every iteration.
        states: `dynamics(..., positions="readout")` of the same inputs and iterations, for the
            criteria that read states.

    Raises:
        ValueError: The criterion reads states, but the states of the lens's reads are not given;
            or a lens of visits, such as a `logit_lens`.
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
