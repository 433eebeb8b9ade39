"""Several first states of the same input, and the ends of the runs from them.

Axes: start batch; `n` counts the numbers of a state that vary.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import begin_batch, sample_of
from loopscope.interp.common.ranking import top_token
from loopscope.interp.dynamics.changes import Space, Varying, added, checked_start
from loopscope.interp.dynamics.states import iteration_start
from loopscope.interp.dynamics.statistics import norm_of
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State

_SCALE = 0.1  # of a change of the first state, where a model draws none


class RunEnd(NamedTuple):
    """The end of a run: its last state, how far the last iteration moved it, and its answers."""

    state: Float[Tensor, "batch n"]
    residual: Float[Tensor, " batch"]
    answers: Int[Tensor, " batch"]


def changed_start(
    model: LoopedModel, batch: Batch, free: Varying, start: int | None, n_loops: int
) -> int:
    """The iteration before which a change of a share of the state's norm begins, as
    `checked_start`; None means one iteration later where a state of zeros is handed to that one.
    """
    first = checked_start(model, batch, free.names, start, n_loops)
    if start is not None or first + 1 == n_loops:
        return first
    state = begin_batch(model, sample_of(model, batch), n_loops)
    state = model.advance(state, iteration_start(model, first, n_loops))
    return first + int(not any(bool(x.any()) for x in free.values(model, state).values()))


def starts(
    model: LoopedModel, batch: Batch, free: Varying, n_starts: int, scale: float | int | None,
    n_loops: int, stop: int, seed: int,
) -> Iterator[State]:  # fmt: skip
    """The states before the first iteration: that of the run itself, then the others."""
    first = model.advance(begin_batch(model, batch, n_loops), stop)
    yield first
    values = free.values(model, first)
    own = batch.options.get("seed") or 0  # what a run without a seed draws, too
    seeds = (each for each in itertools.count(seed + 1) if each != own)
    for each in itertools.islice(seeds, n_starts - 1):
        if scale is None and _draws(model):
            options = {k: v for k, v in batch.options.items() if k not in ("state", "seed")}
            drawn = replace(batch, options={**options, "seed": each})
            yield model.advance(begin_batch(model, drawn, n_loops), stop)
            continue
        generator = seeded(each)
        change = free.draw(values, 1, generator)
        change = free.matched(values, change, _SCALE if scale is None else scale)
        yield free.beside(first, values, change, added)


def _draws(model: LoopedModel) -> bool:
    """Whether a model's runs begin with a state that is drawn from a seed."""
    return "seed" in inspect.signature(model.embed).parameters


def ended(model: LoopedModel, free: Varying, state: State, readout: Tensor, space: Space) -> RunEnd:
    """Run a state to the end."""
    ends = model.iteration_ends(state.n_loops)
    if len(ends) > 1 and state.visit <= ends[-2]:
        state = model.advance(state, ends[-2])
    before = _measured(model, free, state, space)
    state = model.advance(state, ends[-1])
    after = _measured(model, free, state, space)
    answers = top_token(model.readout(model.advance(state), readout))
    return RunEnd(after, apart(after[None], before)[0], answers)


def _measured(
    model: LoopedModel, free: Varying, state: State, space: Space
) -> Float[Tensor, "batch n"]:
    """The numbers of each example's state that vary."""
    return free.measured(list(free.values(model, state).values()), 1, space)[:, 0]


def apart(
    states: Float[Tensor, "start batch n"], reference: Float[Tensor, "batch n"]
) -> Float[Tensor, "start batch"]:
    """The distance of each state from the reference, as a share of the reference's norm."""
    return norm_of(states - reference) / norm_of(reference)
