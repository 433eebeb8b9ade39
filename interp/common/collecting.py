"""Collecting activations: the values that pass some hook points, each reduced as it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State

Reduce = Callable[[Tensor, str], Tensor]


class Collected(NamedTuple):
    """Activations of one run.

    Attributes:
        values: The reduced activation of each hook point, by its name, in the order of the run.
        end: The state at which the run stopped.
    """

    values: dict[str, Tensor]
    end: State


def collect(
    model: LoopedModel,
    batch: Batch,
    names: Sequence[str],
    n_loops: int,
    *,
    reduce: Reduce | None = None,
    until: int | None = None,
) -> Collected:
    """Run a batch and keep the activations at some hook points.

    Args:
        names: Hook names of a call with `n_loops` iterations.
        reduce: From an activation and its hook name to the tensor that is kept (some columns, a
            mean, ...); None keeps the activation itself.
        until: The visit before which the run stops, as an index into the schedule; None runs to
            the end.

    Raises:
        KeyError: A name that the call does not have, or no name at all.
    """
    with keeping(model, names, n_loops, reduce) as values:
        end = model.advance(begin_batch(model, batch, n_loops), until)
    return Collected(values, end)


@contextmanager
def keeping(
    model: LoopedModel, names: Sequence[str], n_loops: int, reduce: Reduce | None = None
) -> Iterator[dict[str, Tensor]]:
    """Inside the `with` block runs of the model write their activations into the dictionary; the
    arguments are those of `collect`.
    """
    values: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        name = str(hook.name)
        values[name] = value if reduce is None else reduce(value, name)

    with model.hooks([(list(names), keep)], n_loops=n_loops):
        yield values


@torch.no_grad()
@evaluated
def recorded(
    model: LoopedModel, batch: Batch, names: Sequence[str], n_loops: int
) -> dict[str, Tensor]:
    """Activations at some hook points of the visits; nothing after the last of them is computed."""
    wanted = set(names)
    last = max(visit.index for visit in model.schedule(n_loops) if wanted & set(visit.hook_names()))
    return collect(model, batch, names, n_loops, until=last + 1).values
