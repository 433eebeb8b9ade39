"""Exit gates: the iteration after which a model's own gate exits, and the answers read there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

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
from loopscope.models.basis.numbers import checked_number
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.state import State, checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

GATE = "hook_exit_logit"


class ExitDistribution(NamedTuple):
    """The probability that a gate exits after each iteration.

    Attributes:
        pdf: Float[Tensor, "loop ..."], the probability of an exit after this iteration; over
            iterations they sum to 1.
        cdf: Float[Tensor, "loop ..."], the probability of an exit after this iteration or an
            earlier one.
    """

    pdf: Float[Tensor, "loop ..."]
    cdf: Float[Tensor, "loop ..."]

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the probability of an exit after each iteration, as a mean."""
        from loopscope.interp.drawing.lenses import exit_distribution

        return exit_distribution(self, title)


def exit_distribution(gate_logits: Float[Tensor, "loop ..."]) -> ExitDistribution:
    """Turn the logits of an exit gate into the probability of an exit after each iteration.

    The gate exits with probability lambda_t = sigmoid(logit_t) if it has not done so before, so
    that p_t = lambda_t prod_{s<t} (1 - lambda_s). The last iteration has the probability that is
    left; its own logit is not used.

    Args:
        gate_logits: The logits of the gate, iterations along the first axis, such as `gate_logits`
            returns.

    Returns:
        The probabilities, in the shape of the logits.

    Raises:
        ValueError: A logit is NaN.

    Source:
        Ouro (arXiv 2510.25741).
    """
    gate_logits = widened(gate_logits)
    if bool(gate_logits.isnan().any()):
        raise ValueError(
            f"the logits of an exit gate must be numbers, got NaN in loop"
            f" {int(gate_logits.isnan().nonzero()[0, 0])}; first_nonfinite(model, inputs) names the"
            " first activation that is not finite"
        )
    log_left = F.logsigmoid(-gate_logits).cumsum(0)
    first = torch.zeros_like(log_left[:1])
    log_before = torch.cat([first, log_left[:-1]])
    pdf = torch.cat([(log_before + F.logsigmoid(gate_logits))[:-1], log_before[-1:]]).exp()
    return ExitDistribution(pdf, torch.cat([-log_left[:-1].expm1(), first + 1.0]))


@torch.no_grad()
@evaluated
def gate_logits(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
) -> Float[Tensor, "loop batch"]:
    """Read the logit of the model's exit gate after every iteration, at the answer position.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        batch_size: How many rows run at a time.

    Returns:
        The logits by iteration and row.

    Raises:
        ValueError: The family has no exit gate.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    names = gate_names(model, n_loops)
    collected = []
    for rows in in_chunks(batch, rows_at_once(model, batch, batch_size), "gate"):
        seen: list[Tensor] = []

        def keep(
            logit: Tensor,
            hook: HookPoint,
            seen: list[Tensor] = seen,
            columns: Tensor = rows.readout,
        ) -> None:
            seen.append(widened(at_columns(logit, columns)))

        with model.hooks([(names, keep)], n_loops=n_loops):
            model.advance(begin_batch(model, rows, n_loops))
        collected.append(torch.stack(seen))
    return torch.cat(collected, dim=1)


@dataclass(frozen=True)
class GatedReadout(OneScreen):
    """Logits at every position, combined by an exit gate.

    Attributes:
        logits: Float[Tensor, "batch pos d_vocab"], the logits at the exit, or the mixture.
        iterations: Int[Tensor, "batch pos"], how many iterations are run until the exit; for the
            mixture, all of them.
        pdf: Float[Tensor, "loop batch pos"], the exit distribution.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    iterations: Int[Tensor, "batch pos"]
    pdf: Float[Tensor, "loop batch pos"]


@torch.no_grad()
@evaluated
def readout_at_threshold(
    model: LoopedModel,
    inputs: Inputs,
    threshold: float,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> GatedReadout:
    """Read each position after the iteration at which its cumulative exit probability reaches a
    threshold.

    A position that never reaches it is read after the last iteration. All iterations run; the exit
    only chooses the state that is unembedded. Hooks at `loops.{t}.hook_exit_logit` can change the
    choice.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        threshold: The cumulative probability, from 0 to 1. A gate that is saturated in float32
            exits even at 1, as in the release.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        The logits at the exit of each position.

    Raises:
        ValueError: The family has no exit gate, or the threshold is outside 0 to 1.

    Source:
        Ouro (arXiv 2510.25741) and its released forward pass.
    """
    threshold = checked_number(threshold, "threshold", least=0, most=1)
    batch, n_loops = as_batch(model, inputs, readout), checked_loops(n_loops, model.cfg.n_loops)
    states, gates = _run(model, batch, n_loops)
    pdf, cdf = exit_distribution(gates)
    step = (cdf >= threshold).int().argmax(0)
    logits = model.readout(states[0])
    for loop, state in enumerate(states[1:], start=1):
        logits = torch.where((step == loop)[..., None], model.readout(state), logits)
    return GatedReadout(logits, step + 1, pdf)


@torch.no_grad()
@evaluated
def readout_mixture(
    model: LoopedModel, inputs: Inputs, n_loops: int | None = None, *, readout: ReadoutColumn = None
) -> GatedReadout:
    """Average the logits of all iterations, weighted by the probability of an exit after each.

    The released model returns this mixture if it is called with labels.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        The mixture at every position.

    Raises:
        ValueError: The family has no exit gate.

    Source:
        Ouro (arXiv 2510.25741) and its released forward pass.
    """
    batch, n_loops = as_batch(model, inputs, readout), checked_loops(n_loops, model.cfg.n_loops)
    states, gates = _run(model, batch, n_loops)
    pdf = exit_distribution(gates).pdf
    logits = sum(
        p[..., None] * widened(model.readout(state)) for p, state in zip(pdf, states, strict=True)
    )
    assert isinstance(logits, Tensor), "a run has at least one iteration"
    return GatedReadout(logits, torch.full(batch.tokens.shape, n_loops, device=model.device), pdf)


def _run(
    model: LoopedModel, batch: Batch, n_loops: int
) -> tuple[list[State], Float[Tensor, "loop batch pos"]]:
    """The state and the gate's logit after every iteration."""
    logits: list[Tensor] = []

    def keep(logit: Tensor, hook: HookPoint) -> None:
        logits.append(logit)

    with model.hooks([(gate_names(model, n_loops), keep)], n_loops=n_loops):
        states = list(_after_iterations(model, begin_batch(model, batch, n_loops)))
    return states, torch.stack(logits)


def _after_iterations(model: LoopedModel, state: State) -> Iterator[State]:
    for end in model.iteration_ends(state.n_loops):
        state = model.advance(state, end)
        yield state


def gate_names(model: LoopedModel, n_loops: int) -> list[str]:
    """The hook points of the gate's logit; ValueError for a family that has no gate."""
    names = [f"loops.{loop}.{GATE}" for loop in range(n_loops)]
    absent = sorted(set(names) - set(model.hook_names(n_loops)))
    if absent:
        raise ValueError(
            f"this {type(model).__name__} has no exit gate to read: its calls have no hook point"
            f" {absent[0]!r}"
        )
    return names
