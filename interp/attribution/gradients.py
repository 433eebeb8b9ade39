"""Gradients of a metric with respect to activations, each with its own iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.collecting import keeping
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.metrics import measure, measure_graphed, metric_name
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.precision import widened
from loopscope.models.basis.names import NamesFilter
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.cache import LoopCache
from loopscope.models.core.state import State, checked_loops


@differentiated
def gradients(
    model: LoopedModel,
    inputs: Inputs,
    metric: Metric,
    names: NamesFilter,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> tuple[LoopCache, LoopCache]:
    """Take activations from one run, and the gradient of a metric with respect to each of them.

    The gradient is that of the metric's sum over the rows. Each iteration has activations and
    gradients of its own.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        metric: A function from the logits at the answer position, Float[Tensor, "batch d_vocab"],
            to one number per row, such as `logit_margin(answers)`.
        names: The activations to take: a hook name, a pattern, a list of both, or a function from a
            name to a bool.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        Two caches with the same hook names: the activations, and their gradients.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    seen: dict[str, Tensor] = {}

    def watch(value: Tensor, hook: HookPoint) -> Tensor:
        assert hook.name is not None, "every hook point is named when it is made"
        own = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        # a tensor of this point alone: an injected input is the same object at every iteration
        seen[hook.name] = own
        return own

    with torch.enable_grad(), model.hooks([(names, watch)], n_loops=n_loops):
        state = model.advance(begin_batch(model, batch, n_loops))
        total = measure_graphed(metric, logits_read(model, state, batch.readout)).sum()
        found = torch.autograd.grad(total, list(seen.values()), allow_unused=True)
    grads = {
        name: torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(seen.items(), found, strict=True)
    }
    return LoopCache({k: v.detach() for k, v in seen.items()}, n_loops), LoopCache(grads, n_loops)


def logits_read(
    model: LoopedModel, state: State, columns: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_vocab"]:
    """Logits at one column of each row; the final norm is run at all columns, so that its sites
    have every position.
    """
    read = at_columns(model.read_state(state), columns)
    return model.unembed(read[:, None])[:, 0]


@torch.no_grad()
def activations_with_metric(
    model: LoopedModel, batch: Batch, metric: Metric, names: Sequence[str], n_loops: int
) -> tuple[dict[str, Tensor], Float[Tensor, " batch"]]:
    """Activations of a run, and its metric."""
    with keeping(model, names, n_loops) as seen:
        state = model.advance(begin_batch(model, batch, n_loops))
        return seen, measure(metric, logits_read(model, state, batch.readout))


def gradients_with_metric(
    model: LoopedModel, batch: Batch, metric: Metric, names: Sequence[str], n_loops: int
) -> tuple[dict[str, Tensor], dict[str, Tensor], Float[Tensor, " batch"]]:
    """Activations of a run, the metric's gradients, and the metric."""
    measured: list[Tensor] = []

    def remembered(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        value = measure_graphed(metric, logits)
        measured.append(value.detach())
        return value

    values, grads = gradients(model, batch, remembered, list(names), n_loops)
    return dict(values), dict(grads), measured[0]


def alone(
    model: LoopedModel, batch: Batch, metric: Metric, row: int, n_loops: int
) -> tuple[Batch, Metric, int]:
    """Make a batch of one example, with its metric and its row there, so that no other example is
    run.

    The metric is still a function of all examples' logits; those of the other examples are held
    fixed. The batch stays whole if its rows depend on each other, or if hooks may have been made
    for the whole batch.
    """
    if len(batch) == 1 or not model.batch_independent or model.any_hook():
        return batch, metric, row
    with torch.no_grad():
        end = model.advance(begin_batch(model, batch, n_loops))
        whole = widened(logits_read(model, end, batch.readout))
    number = torch.tensor([row], device=whole.device)

    def of_row(logits: Float[Tensor, "1 d_vocab"]) -> Float[Tensor, " 1"]:
        return measure(metric, whole.index_copy(0, number, logits))[number]

    of_row.__name__ = metric_name(metric)
    return batch[row : row + 1], of_row, 0
