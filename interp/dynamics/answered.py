"""The motion of the state together with the answers after every iteration, from one run."""

from __future__ import annotations

import torch
from torch import Tensor

from loopscope.interp.common.columns import Shown, read_columns
from loopscope.interp.common.modes import evaluated
from loopscope.interp.dynamics.states import Dynamics, trajectory
from loopscope.interp.lens.lens import heads_input_of, iterations_of
from loopscope.interp.lens.record import Lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State


@torch.no_grad()
@evaluated
def dynamics_and_lens(
    model: LoopedModel,
    batch: Batch,
    n_loops: int,
    *,
    positions: Shown = "readout",
    part: str = "resid",
    batch_size: int = 512,
) -> tuple[Dynamics, Lens]:
    """The records of `dynamics` and `readout_lens`, which would take two runs.

    Args:
        positions, part, batch_size: As for `dynamics`; the lens reads the readout in any case.
    """
    read: list[Tensor] = []  # piece by piece of the batch, and in a piece iteration by iteration

    def ended(state: State, rows: Batch) -> None:
        read.append(heads_input_of(model, state, rows))

    path = trajectory(model, batch, n_loops, positions, part, batch_size, ended)
    heads_input = torch.stack([torch.cat(read[loop::n_loops]) for loop in range(n_loops)])
    return path, Lens.of(model, heads_input, iterations_of(n_loops), read_columns(batch, None))
