"""Is a state that reads as a token also that token's embedding? Their cosine, visit by visit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.columns import Shown, shown_columns
from loopscope.interp.common.inputs import (
    Inputs,
    ReadoutColumn,
    as_batch,
    in_chunks,
    rows_at_once,
)
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.lens.lens import residuals
from loopscope.interp.lens.record import Lens, visit_table, visits_of
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class EmbeddingAlignment(OneScreen):
    """How well the state after each visit matches the embedding of the token that the logit lens
    reads from it.

    Attributes:
        names: The name of each visit, e.g. "loops.3.blocks.0".
        loops, layers: The iteration and block of each visit, from 0; None outside the loop.
        example, position: Int[Tensor, " read"], the row and the column of each read.
        top: Int[Tensor, "visit read"], the token id that the lens reads.
        cosine: Float[Tensor, "visit read"], between the state and the token's row of `W_E`.
        length: Float[Tensor, "visit read"], the length of the state over the length of that row.
        words: The token of each id as a text; None if the model has no vocabulary.
    """

    names: tuple[str, ...]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    example: Int[Tensor, " read"]
    position: Int[Tensor, " read"]
    top: Int[Tensor, "visit read"]
    cosine: Float[Tensor, "visit read"]
    length: Float[Tensor, "visit read"]
    words: tuple[str, ...] | None

    def frame(self) -> pd.DataFrame:
        """One row per visit and read. The columns are visit, loop, layer, example, position, top
        (the token), cosine and length.
        """
        visits, reads = self.top.shape
        frame = visit_table(self.names, self.loops, self.layers, reads).assign(
            example=self.example.repeat(visits).cpu().numpy(),
            position=self.position.repeat(visits).cpu().numpy(),
            top=self.top.flatten().cpu().numpy(),
            cosine=self.cosine.flatten().cpu().numpy(),
            length=self.length.flatten().cpu().numpy(),
        )
        if self.words is not None:
            frame["top"] = [self.words[token] for token in frame["top"]]
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: cosine and length over visits, one curve per position, means over examples."""
        from loopscope.interp.drawing.lenses import alignment

        return alignment(self, title)


@torch.no_grad()
@evaluated
def embedding_alignment(
    model: LoopedModel,
    inputs: Inputs,
    n_loops: int | None = None,
    *,
    positions: Shown = "real",
    readout: ReadoutColumn = None,
    batch_size: int = 512,
) -> EmbeddingAlignment:
    """Compare the state after every visit with a token's embedding: the token is the one that the
    logit lens reads from the state.

    Args:
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        positions: The columns to compare: "real" for all tokens except padding, "readout" for the
            answer position, "all" for padding too, or a list of columns.
        batch_size: How many rows run at a time.

    Returns:
        The cosine and the ratio of lengths, by visit and read.

    Raises:
        ValueError: A logit is not finite, or a column is out of range.

    Source:
        DiscoLoop, arXiv 2607.00341.
    """
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    at_once = rows_at_once(model, batch, batch_size)
    columns, shown = shown_columns(batch, positions)
    visits, embedding = visits_of(model, n_loops), widened(model.W_E)
    tops, cosines, lengths = [], [], []
    for part, read in zip(
        in_chunks(batch, at_once, "alignment"), columns.split(at_once), strict=True
    ):
        states = torch.stack(list(residuals(model, part, read, n_loops).values.values()))
        top = Lens.of(model, model.normalize(states), visits, read).top(1).tokens[..., 0]
        states, rows = widened(states), embedding[top]
        length, other = states.norm(dim=-1), rows.norm(dim=-1)
        tops.append(top)
        cosines.append((states * rows).sum(-1) / (length * other))
        lengths.append(length / other)
    real = shown.flatten()
    example = torch.arange(len(batch), device=real.device).repeat_interleave(columns.shape[1])
    loops, layers, names = zip(*visits, strict=True)
    top, cosine, length = (torch.cat(x, dim=1)[:, real] for x in (tops, cosines, lengths))
    return EmbeddingAlignment(
        names,
        loops,
        layers,
        example[real],
        columns.flatten()[real],
        top,
        cosine,
        length,
        tuple(model.vocab.words) if model.vocab is not None else None,
    )
