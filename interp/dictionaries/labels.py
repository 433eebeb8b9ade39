"""Features against labels that are known: which feature says what, and how well.

Axes: read (a token of an example), loop, feature, label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.finite import refuse_nonfinite
from loopscope.interp.common.shown import OneScreen, tidy
from loopscope.interp.dictionaries.dictionary import Dictionary

if TYPE_CHECKING:
    import plotly.graph_objects as go

_LEVELS = 10  # thresholds tried for each feature, from 0 to its largest activation
Best = tuple[Int[Tensor, " label"], Float[Tensor, " label"], Float[Tensor, " label"]]


@dataclass(frozen=True)
class FeatureLabels(OneScreen):
    """For each label and iteration, the feature that tells the label from the others best.

    A feature predicts a label at the reads where its activation is above a threshold. The feature
    and the threshold are chosen on one set of reads, and F1 is measured on another.

    Attributes:
        feature: Int[Tensor, "loop label"]; -1 if the reads of the choice do not hold the label.
        threshold: Float[Tensor, "loop label"], in units of the activation.
        chosen: Float[Tensor, "loop label"], F1 on the reads of the choice; NaN if they do not hold
            the label.
        f1: Float[Tensor, "loop label"], F1 on the other reads; NaN if either set of reads does not
            hold the label.
        same_features: Whether feature i is the same feature at every iteration.
    """

    feature: Int[Tensor, "loop label"]
    threshold: Float[Tensor, "loop label"]
    chosen: Float[Tensor, "loop label"]
    f1: Float[Tensor, "loop label"]
    same_features: bool

    def mean(self) -> Float[Tensor, " loop"]:
        """The mean F1 over labels, at each iteration."""
        return self.f1.nanmean(1)

    def kept(self, first: int, second: int) -> float:
        """The share of labels whose best feature is the same at two iterations, among the labels
        that both iterations have. NaN if there is no such label, or if each iteration has features
        of its own.

        Args:
            first, second: The two iterations, from 0.
        """
        if not self.same_features:
            return float("nan")
        both = self.chosen[first].isfinite() & self.chosen[second].isfinite()
        return float((self.feature[first] == self.feature[second])[both].double().mean())

    def frame(self) -> pd.DataFrame:
        """One row per iteration and label. The columns are loop, label, feature, threshold, chosen
        and f1.
        """
        names = ("feature", "threshold", "chosen", "f1")
        loops, labels = self.f1.shape
        columns = {name: getattr(self, name) for name in names}
        return tidy(columns, loop=range(loops), label=range(labels))

    def plot(self, title: str = "") -> go.Figure:
        """A picture: F1 of each label at each iteration."""
        from loopscope.interp.drawing.dictionaries import labels

        return labels(self, title)


@torch.no_grad()
def feature_labels(
    dictionary: Dictionary,
    states: Float[Tensor, "read loop d_in"],
    labels: Int[Tensor, "_read _loop"],
    held_states: Float[Tensor, "held loop d_in"],
    held_labels: Int[Tensor, "_held _loop"],
) -> FeatureLabels:
    """Find the feature that predicts each label best on some reads, and measure its F1 on other
    reads.

    Args:
        dictionary: The dictionary whose features are tried.
        states: Float[Tensor, "read loop d_in"], on which features and thresholds are chosen.
        labels: Int[Tensor, "read loop"], the label of each read at each iteration, from 0; -1
            leaves a read out at that iteration.
        held_states, held_labels: States and labels of the same form, on which F1 is measured.

    Returns:
        The best feature of each label at each iteration, with its F1.

    Raises:
        ValueError: There is not one label per read and iteration, no label at all, or a state that
            is not finite.
    """
    for x, y in ((states, labels), (held_states, held_labels)):
        if y.shape != x.shape[:2] or not bool((y >= 0).any()):
            raise ValueError(
                f"labels must be one per read and iteration, {list(x.shape[:2])}, and not all -1,"
                f" got the shape {list(y.shape)}"
            )
        refuse_nonfinite("the states to find features in", x)
    count = int(torch.stack([labels.max(), held_labels.max()]).max()) + 1
    codes = dictionary.encode(states).expand(-1, dictionary.n_loops, -1)
    held = dictionary.encode(held_states).expand(-1, dictionary.n_loops, -1)
    found = []
    for loop in range(dictionary.n_loops):
        known, tested = labels[:, loop] >= 0, held_labels[:, loop] >= 0
        feature, threshold, chosen = _best(codes[known, loop], labels[known, loop], count)
        right = _hot(held_labels[tested, loop], count)
        on = (held[tested, loop][:, feature] > threshold).float()
        f1 = _f1((on * right).sum(0), on.sum(0), right.sum(0))
        found.append((feature, threshold, chosen, f1.where(~chosen.isnan(), torch.nan)))
    parts = [torch.stack(part) for part in zip(*found, strict=True)]
    return FeatureLabels(parts[0], parts[1], parts[2], parts[3], dictionary.same_features)


def _best(codes: Float[Tensor, "read feature"], labels: Int[Tensor, " read"], count: int) -> Best:
    """For each label the feature and the threshold with the largest F1."""
    right, most = _hot(labels, count), codes.amax(0) if len(codes) else codes.new_zeros(0)
    best = codes.new_full((codes.shape[1], count), -1.0)
    level = torch.zeros_like(best)
    for share in [level / _LEVELS for level in range(_LEVELS)] if len(codes) else ():
        threshold = share * most
        on = (codes > threshold).float()
        f1 = _f1((on.T @ right), on.sum(0)[:, None], right.sum(0)).nan_to_num(-1.0)
        better = f1 > best
        best, level = f1.where(better, best), threshold[:, None].where(better, level)
    value, feature = best.max(0)
    threshold = level.gather(0, feature[None])[0]
    there = right.sum(0) > 0
    return feature.where(there, -1), threshold, value.where(there, torch.nan)


def _hot(labels: Int[Tensor, " read"], count: int) -> Float[Tensor, "read label"]:
    return F.one_hot(labels.long(), count).float()


def _f1(both: Tensor, said: Tensor, right: Tensor) -> Tensor:
    """F1 from counts; NaN where a label does not occur."""
    return (2 * both / (said + right)).where(right > 0, torch.nan)
