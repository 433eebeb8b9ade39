"""The first place of a run at which an activation is not finite."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import position_axis
from loopscope.models.core.state import checked_loops

_OF_KERNELS = ("attn.hook_attn_scores", "attn.hook_pattern")


class NonFinite(NamedTuple):
    """The place of an activation that holds NaN or infinity.

    Attributes:
        name: The hook point, or "logits" for the output of the head.
        row: The row of the batch, from 0.
        position: The column, from 0.
    """

    name: str
    row: int
    position: int


@torch.no_grad()
@evaluated
def first_nonfinite(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> NonFinite | None:
    """Find the first activation of a run that holds NaN or infinity.

    Hooks that are on the model act. Padding is searched too, because attention multiplies it by
    zero and leaves NaN as it is. A score of -inf is a mask and does not count. Attention scores and
    patterns are searched only where they already have a hook, because the run does not compute them
    otherwise.

    Args:
        inputs: A `Batch`, texts, or token ids.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        readout: The column at which the logits are read, for token ids; None means the last column.

    Returns:
        The first hook point in the order of the run, with its first row and position. None if all
        activations are finite.
    """
    if readout is None and isinstance(inputs, Tensor):
        readout = -1
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    found: list[NonFinite] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        if not found:
            found.extend(_first_of(str(hook.name), value))

    hooked = model.hooked_points()
    names = [
        name
        for name in model.hook_names(n_loops)
        if not name.endswith(_OF_KERNELS) or name in hooked
    ]
    with model.hooks([(names, look)], n_loops=n_loops):
        logits = model.readout(model.advance(begin_batch(model, batch, n_loops)), batch.readout)
    for row in (~logits.isfinite()).any(-1).nonzero().flatten().tolist():
        found.append(NonFinite("logits", row, int(batch.readout[row])))
    return found[0] if found else None


def refuse_nonfinite(what: str, values: Tensor) -> None:
    """Refuse values of which no statistic can be computed; `what` names them in the plural."""
    wrong = values[~values.isfinite()]
    if len(wrong):
        raise ValueError(
            f"{what} hold {wrong[0].item()}, so nothing can be computed from them;"
            " first_nonfinite(model, inputs) names the first activation that is not finite"
        )


def _first_of(name: str, value: Tensor) -> list[NonFinite]:
    """The first row and position of one activation that is not finite, if there is one."""
    wrong = ~value.isfinite()
    if name.endswith("attn.hook_attn_scores"):
        wrong &= value != -torch.inf
    if value.ndim > 2:
        wrong = wrong.movedim(position_axis(name), 1).flatten(2).any(-1)
    return [NonFinite(name, *index) for index in wrong.nonzero()[:1].tolist()]
