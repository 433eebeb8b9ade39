"""Where a dictionary reads and writes: a hook of every iteration; and the states there.

Axes: read (a token of an example), loop, d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.fingerprint import described
from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked, points_by_block
from loopscope.interp.common.precision import widened
from loopscope.interp.probes.states import ReadStates
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

States = Float[Tensor, "read loop d_in"]


@dataclass(frozen=True)
class Reading:
    """The hook points that a dictionary reads and writes, and the model to which they belong.

    Attributes:
        hook: The hook that is read, named within an iteration: "blocks.1.hook_resid_post".
        target: The hook that is written. It differs from `hook` for a transcoder only.
        n_loops: The number of iterations of the runs.
        family: The model's family.
        mark: A hash of the model's weights and configuration; empty if the model is unknown.
    """

    hook: str
    target: str
    n_loops: int
    family: str = ""
    mark: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_loops", checked_loops(self.n_loops, None))

    @classmethod
    def of(
        cls,
        model: LoopedModel,
        n_loops: int | None = None,
        hook: str | None = None,
        target: str | None = None,
    ) -> Reading:
        """The hook points of a model.

        Args:
            n_loops: The number of iterations; None means the number that the checkpoint records.
            hook: The hook that is read; None means the residual stream after the last block of an
                iteration.
            target: The hook that is written; None means `hook`.

        Raises:
            KeyError: An iteration does not have the hook.
        """
        n_loops = checked_loops(n_loops, model.cfg.n_loops)
        hook = _last_residual(model, n_loops) if hook is None else hook
        mark = described((repr(model.cfg), list(model.state_dict().items())))
        found = cls(hook, target or hook, n_loops, model.cfg.family, mark)
        model.resolve_names([*found.names, *found.written], n_loops)
        return found

    @cached_property
    def names(self) -> list[str]:
        """The hook points that are read, one for each iteration."""
        return [f"loops.{loop}.{self.hook}" for loop in range(self.n_loops)]

    @cached_property
    def written(self) -> list[str]:
        """The hook points that are written, one for each iteration."""
        return [f"loops.{loop}.{self.target}" for loop in range(self.n_loops)]

    def check(self, model: LoopedModel) -> None:
        """Refuse a model that the dictionary was not trained on. A reading without `mark` accepts
        every model that has its hooks.

        Raises:
            KeyError: The model does not have a hook.
            ValueError: The model has other weights or another configuration.
        """
        if self.mark:
            own = Reading.of(model, self.n_loops, self.hook, self.target)
            if own.mark != self.mark:
                raise ValueError(
                    f"this dictionary was trained on a {self.family} model with other weights or"
                    " another configuration; train one on this model, or clear the mark of its"
                    " reading"
                )
        model.resolve_names([*self.names, *self.written], self.n_loops)


def _last_residual(model: LoopedModel, n_loops: int) -> str:
    """The residual after the last block that every iteration visits."""
    blocks = points_by_block(model, n_loops, model.lens_site)
    whole = [name for name, points in blocks.items() if len(points) == n_loops]
    if not whole:
        raise ValueError("no block is visited at every iteration; pass hook=")
    return f"{whole[-1]}.{model.lens_site}"


def checked_states(
    states: Float[Tensor, "read loop d_in"], n_loops: int
) -> Float[Tensor, "read loop d_in"]:
    """States to make a dictionary of, in float32 or wider, without the graph that they come from.

    Raises:
        ValueError: States that are not finite, or of another shape or number of iterations.
    """
    if states.ndim != 3 or states.shape[1] != n_loops:
        raise ValueError(
            f"states must be [read, {n_loops} iterations, width], got the shape"
            f" {list(states.shape)}"
        )
    refuse_nonfinite("the states to make a dictionary of", states)
    return widened(states.detach())


@torch.no_grad()
@evaluated
def loop_states(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    hook: str | None = None,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
    batch_size: int = 512,
) -> Float[Tensor, "read loop d_in"]:
    """Collect the states of tokens at one hook, over all iterations: the training data of a
    dictionary.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        hook: The hook, named within an iteration, such as "blocks.1.hook_mlp_out". None means the
            residual stream after the last block.
        positions: The tokens to take: "all" except padding, some columns, or None for the answer
            position.
        batch_size: How many rows run at a time.

    Returns:
        The states, one row per token, example by example, in float32 or wider. The axes are read,
        loop and d_in (the width of the hook).

    Raises:
        KeyError: An iteration does not have the hook.
        ValueError: A state is not finite, or a column is out of range.
    """
    batch = as_batch(model, inputs, readout)
    reading = Reading.of(model, n_loops, hook)
    states = ReadStates.of(model, batch, reading.names, positions, reading.n_loops, batch_size)
    rows = torch.arange(len(batch), device=model.device)
    parts = [torch.stack([part[n] for n in reading.names], 1) for _, part in states.chunks(rows)]
    return torch.cat(parts)
