"""Attribution to features: gradient times activation.

Axes: batch, column (one that is read), loop, feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.attribution.gradients import gradients
from loopscope.interp.common.columns import at_positions, read_columns
from loopscope.interp.common.inputs import Inputs, Metric, ReadoutColumn, as_batch
from loopscope.interp.common.modes import differentiated
from loopscope.interp.common.places import Picked
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.models.basis.numbers import checked_integer
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class FeatureAttribution(OneScreen):
    """First-order effects of features on a metric: what would be lost without them.

    Attributes:
        values: Float[Tensor, "batch column loop feature"], the activation times the metric's
            gradient along the feature's direction, all that follows in the run included.
        rest: Float[Tensor, "batch column loop"], the same of what the dictionary leaves out. With
            the bias, `values` and `rest` sum to the gradient times the state.
        bias: Float[Tensor, "batch column loop"], the same of the dictionary's bias.
        columns: Int[Tensor, "batch column"], the column of each entry.
    """

    values: Float[Tensor, "batch column loop feature"]
    rest: Float[Tensor, "batch column loop"]
    bias: Float[Tensor, "batch column loop"]
    columns: Int[Tensor, "batch column"]

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest effects: example, position, loop, feature, effect, by falling size.

        Raises:
            ValueError: k outside 1..the number of effects.
        """
        flat = self.values.flatten()
        k = checked_integer(k, "k")
        if not 1 <= k <= len(flat):
            raise ValueError(f"k must be in 1..{len(flat)}, the number of effects, got {k}")
        chosen = flat.abs().topk(k).indices
        example, column, loop, feature = torch.unravel_index(chosen, self.values.shape)
        columns = {
            "example": example.tolist(),
            "position": self.columns[example, column].tolist(),
            "loop": loop.tolist(),
            "feature": feature.tolist(),
            "effect": flat[chosen].tolist(),
        }
        return pd.DataFrame(columns)

    def frame(self) -> pd.DataFrame:
        """One row per effect that is not zero, as `top` gives it."""
        return self.top(max(1, int((self.values != 0).sum())))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the largest mean effects, by feature and iteration."""
        from loopscope.interp.drawing.dictionaries import attribution

        return attribution(self, title)


@differentiated
def feature_attribution(
    model: LoopedModel,
    dictionary: Dictionary,
    inputs: Inputs,
    metric: Metric,
    *,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
) -> FeatureAttribution:
    """The effect of every feature on a metric, by gradient times activation.

    Args:
        dictionary: Of this model. For a transcoder the gradient is that of what it writes.
        inputs: A batch, texts, or tokens with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, "
            batch"].
        positions: Columns whose features are attributed to; None means the readout.

    Raises:
        KeyError, ValueError: As for `splice`.

    Source:
        Marks et al. 2024 (arXiv 2403.19647), sparse feature circuits.
    """
    dictionary.check(model)
    batch, reading = as_batch(model, inputs, readout), dictionary.reading
    first = model.edge_sites()[0][:1]  # which the answers depend on where they depend on no other
    names = list(dict.fromkeys([*first, *reading.names, *reading.written]))
    values, grads = gradients(model, batch, metric, names, reading.n_loops)
    if not any(bool(grads[name].any()) for name in reading.written):
        raise ValueError(
            f"the metric does not depend on {reading.target!r}, so features written there have no"
            " effect; train a dictionary of a hook that the run goes on from"
        )
    columns = read_columns(batch, positions)

    def stacked(found: dict[str, Tensor], sites: list[str]) -> Tensor:
        return torch.stack([widened(at_positions(found[site], columns)) for site in sites], 2)

    read, written = stacked(dict(values), reading.names), stacked(dict(values), reading.written)
    slope = stacked(dict(grads), reading.written)
    with torch.no_grad():
        shape = read.shape[:2]
        codes = dictionary.encode(read.flatten(0, 1)).expand(-1, reading.n_loops, -1)
        codes = codes.unflatten(0, shape)
        effects, bias = [], []
        for loop in range(reading.n_loops):
            along = slope[:, :, loop].to(codes.dtype)
            effects.append(codes[:, :, loop] * (along @ dictionary.directions(loop).T.to(along)))
            bias.append(along @ dictionary.bias(loop).to(along))
        found, shift = torch.stack(effects, 2), torch.stack(bias, 2)
        rest = (slope * written).sum(-1) - found.sum(-1) - shift
    return FeatureAttribution(found, rest, shift, columns)
