"""Causal tracing: which states, by depth and position, does the answer depend on?

Each map is one patching sweep over the embedding (depth 0) and the residual stream after every
visit (depth 1, 2, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.ranking import top_token
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SITES = ("embed", "resid_post")


@dataclass(frozen=True)
class Trace(OneScreen):
    """The effect of patching single states, by depth and position.

    Depth counts visits: depth 0 is the embedding, and depth d the residual stream after d visits.

    Attributes:
        effect: Float[Tensor, "depth position"], a mean over the examples that have the position, in
            the unit that the function that made the map says. NaN if no example has the position.
        names: The hook point of each depth.
        loops, layers: The iteration and block of each depth, from 0; None for the embedding.
        positions: The patched columns.
        sweep: The patched runs, with the values of each example.
    """

    effect: Float[Tensor, "depth position"]
    names: tuple[str, ...]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    positions: tuple[int, ...]
    sweep: Sweep

    @classmethod
    def of(cls, sweep: Sweep, effect: Float[Tensor, " cell"]) -> Trace:
        """A sweep over depths and positions with one number per cell."""
        positions = tuple(dict.fromkeys(column for cell in sweep.cells for column in cell.columns))
        depths = sweep.cells[:: len(positions)]
        names, loops, layers = zip(
            *((cell.name, cell.loop, cell.layer) for cell in depths), strict=True
        )
        return cls(
            rearrange(effect, "(depth position) -> depth position", position=len(positions)),
            names,
            loops,
            layers,
            positions,
            sweep,
        )

    def frame(self) -> pd.DataFrame:
        """One row per depth and position. The columns are depth (0 is the embedding), name, loop,
        layer, position, effect and examples (how many have the position).
        """
        places = zip(range(len(self.names)), self.names, self.loops, self.layers, strict=True)
        rows = [(*place, position) for place in places for position in self.positions]
        frame = pd.DataFrame(rows, columns=["depth", "name", "loop", "layer", "position"]).astype(
            {"loop": "Int64", "layer": "Int64"}
        )
        return frame.assign(
            effect=self.effect.flatten().cpu().numpy(),
            examples=self.sweep.examples().cpu().numpy(),
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the effect by depth and position."""
        from loopscope.interp.drawing.effects import trace

        return trace(self, title)


@evaluated
def causal_tracing(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    answers: Int[Tensor, " batch"],
    position: int,
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> Trace:
    """Put single states of the corrupted run into the clean run, and count how often the top token
    changes.

    The states are the embedding and the residual stream after every visit, at one position.

    Args:
        clean: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        corrupted: The same inputs with another token of the same kind at `position`, such that the
            answers differ.
        answers: The token id of each clean input's answer. Its margin in the same runs is in
            `trace.sweep.also["logit_margin"]`.
        position: The column whose state is replaced.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        A `Trace` with one position. Its effect is the share of examples whose top token at the
        answer position changes, from 0 to 1.

    Source:
        Causal tracing of arXiv 2405.15071.
    """
    base, source = (as_batch(model, inputs, readout) for inputs in (clean, corrupted))
    with torch.no_grad():
        logits = model.readout(model.advance(begin_batch(model, base, n_loops)), base.readout)
    sweep = activation_patch(
        model,
        base,
        source,
        _top_changed(top_token(logits)),
        n_loops,
        sites=_SITES,
        positions=[position],
        direction="noise",
        also={"logit_margin": logit_margin(answers)},
    )
    return Trace.of(sweep, sweep.mean())


def denoising_map(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    answers: Int[Tensor, " batch"],
    positions: Literal["all"] | Sequence[int] = "all",
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> Trace:
    """Put single states of the clean run into the corrupted run, and measure how much of the
    answer's margin comes back.

    The states are the embedding and the residual stream after every visit, one position at a time.

    Args:
        clean: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        corrupted: The same inputs with some tokens replaced; in figure 11 the head entity and the
            first relation.
        answers: The token id of each clean input's answer.
        positions: The columns whose state is replaced, one by one; in figure 11 only that of the
            first relation, [1].
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        A `Trace`. Its effect is the mean margin on a scale where 0 is the corrupted run and 1 the
        clean run.

    Raises:
        ValueError: Both runs have the same mean margin, so there is no scale.

    Source:
        Figure 11 of arXiv 2604.07822.
    """
    metric = logit_margin(answers)
    sweep = activation_patch(
        model,
        clean,
        corrupted,
        metric,
        n_loops,
        sites=_SITES,
        positions=positions,
        direction="denoise",
        readout=readout,
    )
    return Trace.of(sweep, sweep.normalized())


def noising_map(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    answers: Int[Tensor, " batch"],
    positions: Literal["all"] | Sequence[int] = "all",
    n_loops: int | None = None,
    *,
    readout: ReadoutColumn = None,
) -> Trace:
    """Put single states of another run into the clean run, and measure how much the answer's margin
    changes.

    The states are the embedding and the residual stream after every visit, one position at a time.

    Args:
        clean: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        corrupted: Other inputs of the same lengths; in figure 21 random ones.
        answers: The token id of each clean input's answer.
        positions: The columns whose state is replaced, one by one.
        n_loops: The number of iterations; None means the number that the checkpoint records.

    Returns:
        A `Trace`. Its effect is the mean margin of the patched run minus that of the clean run, in
        logits.

    Source:
        Figure 21 of arXiv 2604.07822, a map of shortcuts.
    """
    metric = logit_margin(answers)
    sweep = activation_patch(
        model,
        clean,
        corrupted,
        metric,
        n_loops,
        sites=_SITES,
        positions=positions,
        direction="noise",
        readout=readout,
    )
    return Trace.of(sweep, sweep.mean(sweep.values - sweep.clean))


def _top_changed(tokens: Int[Tensor, " batch"]) -> Metric:
    """The metric that is 1 where the top token is not the given one, and else 0."""

    def top_changed(logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, " batch"]:
        return (top_token(logits) != tokens).to(logits.dtype)

    return top_changed
