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
    """The estimated effect of each feature on a metric: how much of the metric would be lost
    without it.

    Attributes:
        values: Float[Tensor, "batch column loop feature"], the feature's activation times the
            gradient of the metric along the feature's direction, in the metric's unit. The gradient
            goes through all that follows in the run.
        rest: Float[Tensor, "batch column loop"], the effect of the part of the state that the
            dictionary does not reconstruct. `values`, `rest` and `bias` sum to the gradient times
            the state.
        bias: Float[Tensor, "batch column loop"], the effect of the dictionary's bias.
        columns: Int[Tensor, "batch column"], the position of each entry in the input.
    """

    values: Float[Tensor, "batch column loop feature"]
    rest: Float[Tensor, "batch column loop"]
    bias: Float[Tensor, "batch column loop"]
    columns: Int[Tensor, "batch column"]

    def top(self, k: int = 10) -> pd.DataFrame:
        """The k largest effects by absolute value, largest first. The columns are example,
        position, loop, feature and effect.

        Raises:
            ValueError: k is below 1 or larger than the number of effects.
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
        """One row per effect that is not zero, in the columns of `top`."""
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
    """Estimate the effect of every feature of a dictionary on a metric, by gradient times
    activation.

    Args:
        dictionary: A dictionary of this model. For a transcoder the gradient is taken at the hook
            that it writes.
        inputs: A `Batch`, texts, or token ids.
        readout: For token ids, the column at which answers are read.
        metric: A function from the logits at the answer position, Float[Tensor, "batch d_vocab"],
            to one number per row, such as `logit_margin(answers)`.
        positions: The columns whose features are attributed to: "all", some columns, or None for
            the answer position.

    Returns:
        The effects by example, column, iteration and feature.

    Raises:
        KeyError: The model does not have a hook of the dictionary.
        ValueError: The dictionary is of another model, or the metric does not depend on its hook.

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
            " effect; train a dictionary of a hook that the run uses later"
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
