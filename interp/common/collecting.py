"""Collecting activations: the values that pass some hook points, each reduced as it passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.inputs import begin_batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State
from loopscope.models.core.tokens import Batch

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


def last_visit(model: LoopedModel, names: Sequence[str], n_loops: int) -> int:
    """The visit after the last of some hook points, as an index into the schedule; the schedule's
    length where one of the points comes after all visits.
    """
    schedule = model.schedule(n_loops)
    after = set(names) & set(model.edge_sites()[1])
    wanted = set(names)
    last = [visit.index + 1 for visit in schedule if wanted & set(visit.hook_names())]
    return len(schedule) if after else max(last, default=0)
