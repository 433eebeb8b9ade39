"""The record of probes at every place of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.places import Place
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.probes.logistic import Code
from loopscope.interp.probes.ridge import Linear

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Probe(OneScreen):
    """Linear probes of one property, one at each place of a run.

    Scores are measured on reads that were held out: accuracy for classes, R2 for numbers.

    Attributes:
        places: The places at which the states were read, in the order of the run.
        metric: "accuracy" or "R2".
        score: Float[Tensor, " place"], the score of each probe.
        constant: The score of the best constant answer, which uses no state.
        control: Float[Tensor, " place"], the score on the control task (random labels); None if it
            was not fitted.
        permuted: Float[Tensor, "permutation place"], the scores of probes that were fitted to
            shuffled targets.
        code: The description length of the classes of the fitted reads; None if it was not
            measured.
        maps: The probe at each place. It is an affine map from the state to one output per class,
            to the one output of a number, or for a logistic probe of two classes to the log-odds of
            the second class.
        classes: Int[Tensor, " class"], the target that each output stands for; None for numbers.
        n_train, n_test: How many reads were fitted, and how many held out.
    """

    places: tuple[Place, ...]
    metric: str
    score: Float[Tensor, " place"]
    constant: float
    control: Float[Tensor, " place"] | None
    permuted: Float[Tensor, "permutation place"]
    code: Code | None
    maps: tuple[Linear, ...]
    classes: Int[Tensor, " class"] | None
    n_train: int
    n_test: int

    def selectivity(self) -> Float[Tensor, " place"]:
        """The selectivity: the score minus the score on the control task (Hewitt & Liang, arXiv
        1909.03368).
        """
        if self.control is None:
            raise ValueError("selectivity needs the control task; call probe(..., control=True)")
        return self.score - self.control

    def p_value(self) -> Float[Tensor, " place"]:
        """The p value of the permutation test: (1 + n) / (1 + permutations), where n permutations
        score at least as well as the probe.

        A permutation whose score is NaN counts as one of the n. If the probe's score is NaN, so is
        its p value.
        """
        if not len(self.permuted):
            raise ValueError("a p value needs permutations; call probe(..., permutations=99)")
        as_good = (~(self.permuted < self.score)).sum(0).double()
        return ((1 + as_good) / (1 + len(self.permuted))).where(~self.score.isnan(), torch.nan)

    def frame(self) -> pd.DataFrame:
        """One row per place. The columns are place (the hook point), visit, loop, layer, site,
        score and constant. Others are there if they were asked for: control, selectivity, p_value,
        bits (of the description length) and compression (bits of uniform guessing over these bits).
        """
        rows = [(p.name, p.visit, p.loop, p.layer, p.site) for p in self.places]
        frame = pd.DataFrame(rows, columns=["place", "visit", "loop", "layer", "site"])
        frame = frame.astype({"loop": "Int64", "layer": "Int64"})
        frame = frame.assign(score=self.score.numpy(), constant=self.constant)
        if self.control is not None:
            frame["control"], frame["selectivity"] = (
                self.control.numpy(),
                self.selectivity().numpy(),
            )
        if len(self.permuted):
            frame["p_value"] = self.p_value().numpy()
        if self.code is not None:
            frame["bits"] = self.code.bits.numpy()
            frame["compression"] = self.code.compression().numpy()
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the score over places, with its controls."""
        from loopscope.interp.drawing.probes import probe

        return probe(self, title)
