"""Each block of the loop over iterations: its output's trajectory, and its changing attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.columns import Shown, ShownColumns, at_positions, shown_columns
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    begin_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import heads_at, loop_and_layer, points_by_block
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dynamics.states import Dynamics
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import position_axis
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class LayerDynamics(OneScreen):
    """The trajectory of every block's output over iterations.

    Each block may settle at a fixed point of its own; the state then visits these points in a
    cycle.

    Attributes:
        names: The name of each block within an iteration, e.g. "blocks.0".
        layers: For each block the trajectory of the residual stream after it. The first point
            follows one iteration.
    """

    names: tuple[str, ...]
    layers: tuple[Dynamics, ...]

    def between_layers(self, relative: bool = False) -> Float[Tensor, "layer other batch pos"]:
        """The distance between the last outputs of each two blocks, at each column. With `relative`
        it is divided by the norm of the first block's output.
        """
        last = torch.stack([layer.states[-1] for layer in self.layers])
        distance: Tensor = torch.linalg.vector_norm(last[:, None] - last[None], dim=-1)
        return distance / torch.linalg.vector_norm(last, dim=-1)[:, None] if relative else distance

    def frame(self) -> pd.DataFrame:
        """The frames of all blocks, one below the other. The first columns are the block's name
        within an iteration and its layer, from 0.
        """
        frames = [layer.frame() for layer in self.layers]
        for name, frame in zip(self.names, frames, strict=True):
            frame.insert(0, "block", name)
            frame.insert(1, "layer", _layer_of(name))
        return pd.concat(frames, ignore_index=True)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: size, relative step and cosine of steps of each block's output."""
        from loopscope.interp.drawing.motion import layers

        return layers(self, title)


@torch.no_grad()
@evaluated
def layer_dynamics(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    batch_size: int = 512,
) -> LayerDynamics:
    """Collect the output of every block of the loop over iterations, to see at which points blocks
    settle.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns to collect: "real" for all tokens except padding, "readout" for the
            answer position, "all" for padding too, or a list of columns.
        batch_size: How many rows run at a time.

    Returns:
        One trajectory per block. A block has no point at an iteration that leaves it out.

    Raises:
        ValueError: A column is out of range.

    Source:
        The cyclic fixed points of arXiv 2604.11791.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    chosen = shown_columns(batch, positions)
    layers = points_by_block(model, n_loops, "hook_resid_post")
    seen: dict[str, list[Tensor]] = {
        name: [] for points in layers.values() for name in points.values()
    }

    def keep(resid: Tensor, name: str, shown: Tensor) -> None:
        seen[name].append(resid)

    _watch(model, batch, n_loops, chosen, list(seen), keep, batch_size)
    records = [
        Dynamics.of(
            torch.stack([torch.cat(seen[name]) for name in points.values()]),
            [loop + 1 for loop in points],
            chosen,
            "resid_post",
        )
        for points in layers.values()
    ]
    return LayerDynamics(tuple(layers), tuple(records))


@dataclass(frozen=True)
class AttentionDynamics(OneScreen):
    """How much the attention of each head changes from one iteration to the next, and how even it
    is.

    All values are means over examples and query positions.

    Attributes:
        names: The name of each block within an iteration, e.g. "blocks.0".
        change: Float[Tensor, "loop layer head"], the total variation (half the L1 distance, 0 to 1)
            between the pattern and that of one iteration earlier. NaN in the first iteration, and
            for a head that the layer does not have.
        entropy: Float[Tensor, "loop layer head"], of the pattern, in nats. NaN for a head that the
            layer does not have.
    """

    names: tuple[str, ...]
    change: Float[Tensor, "loop layer head"]
    entropy: Float[Tensor, "loop layer head"]

    def frame(self) -> pd.DataFrame:
        """One row per visit and head. The columns are visit (its name), loop, layer, head (all from
        0), change and entropy.
        """
        loops, heads = range(self.change.shape[0]), range(self.change.shape[2])
        places = [
            (f"loops.{loop}.{name}", loop, _layer_of(name), head)
            for loop, name, head in product(loops, self.names, heads)
        ]
        frame = pd.DataFrame(places, columns=["visit", "loop", "layer", "head"])
        return frame.assign(
            change=self.change.flatten().cpu().numpy(), entropy=self.entropy.flatten().cpu().numpy()
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: change and entropy of each head's pattern in every loop."""
        from loopscope.interp.drawing.motion import attention

        return attention(self, title)


@torch.no_grad()
@evaluated
def attention_dynamics(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
    positions: Shown = "real",
    batch_size: int = 64,
) -> AttentionDynamics:
    """Measure how much each head's attention pattern changes between iterations, and its entropy,
    to see whether attention settles.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The query positions to average over: "real" for all tokens except padding,
            "readout" for the answer position, "all" for padding too, or a list of columns.
        batch_size: How many rows run at a time.

    Returns:
        Change and entropy by iteration, layer and head.

    Raises:
        ValueError: No block of the loop has attention patterns.

    Source:
        Attention stabilisation: arXiv 2604.11791.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    chosen = shown_columns(batch, positions)
    layers = points_by_block(model, n_loops, "attn.hook_pattern")
    places = {
        name: (loop, i) for i, points in enumerate(layers.values()) for loop, name in points.items()
    }
    visits = {f"{v.name}.attn.hook_pattern": v for v in model.schedule(n_loops)}
    heads = {name: heads_at(visits[name]) for name in places}
    shape = (n_loops, len(layers), max(heads.values()))
    change, entropy = torch.full((2, *shape), torch.nan, dtype=torch.float64, device=model.device)
    for name, (loop, i) in places.items():
        entropy[loop, i, : heads[name]] = 0.0
        if (loop - 1, i) in places.values():
            change[loop, i, : heads[name]] = 0.0
    earlier: dict[tuple[int, int], Tensor] = {}

    def add(pattern: Tensor, name: str, shown: Tensor) -> None:
        loop, i = places[name]
        now = pattern[shown].unflatten(1, (heads[name], -1))
        before = earlier.pop((loop - 1, i), None)
        if before is not None:
            change[loop, i, : heads[name]] += (now - before).abs().sum((0, 2)) / 2
        entropy[loop, i, : heads[name]] += torch.special.entr(now).sum((0, 2))
        earlier[loop, i] = now

    _watch(model, batch, n_loops, chosen, list(places), add, batch_size)
    return AttentionDynamics(tuple(layers), change / chosen[1].sum(), entropy / chosen[1].sum())


def _layer_of(block: str) -> int | None:
    """The layer in a block's name within an iteration."""
    return loop_and_layer(f"loops.0.{block}")[1]


def _watch(
    model: LoopedModel,
    batch: Batch,
    n_loops: int,
    chosen: ShownColumns,
    names: list[str],
    see: Callable[[Tensor, str, Tensor], None],
    batch_size: int,
) -> None:
    """Call `see(value "batch pos d", name, shown)` at hook points, of the columns to show."""
    size = rows_at_once(model, batch, batch_size)
    chunks = zip(
        in_chunks(batch, size, "iterations"),
        *(x.split(size) for x in chosen),
        strict=True,
    )
    for rows, columns, shown in chunks:

        def look(
            value: Tensor, hook: HookPoint, columns: Tensor = columns, shown: Tensor = shown
        ) -> None:
            name = str(hook.name)
            see(
                at_positions(widened(value.movedim(position_axis(name), 1).flatten(2)), columns),
                name,
                shown,
            )

        with model.hooks([(names, look)], n_loops=n_loops):
            model.advance(begin_batch(model, rows, n_loops), model.iteration_ends(n_loops)[-1])
