"""The pictures of sparse dictionaries: training, quality, labels, profiles and attributions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
import torch

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, curves

if TYPE_CHECKING:
    from loopscope.interp.dictionaries.attribution import FeatureAttribution
    from loopscope.interp.dictionaries.dictionary import Dictionary
    from loopscope.interp.dictionaries.examples import TopExamples
    from loopscope.interp.dictionaries.labels import FeatureLabels
    from loopscope.interp.dictionaries.quality import DictionaryQuality

_SHOWN = 12  # features of an attribution that are drawn


def training(record: Dictionary, title: str) -> go.Figure:
    """The share of the variance that each step's batch leaves unexplained."""
    several = len(record.losses) > 1
    steps = list(range(record.losses.shape[1]))
    rows = [
        Curve(f"loop {i}" if several else record.kind, steps, losses.tolist())
        for i, losses in enumerate(record.losses)
    ]
    return curves([CurvePanel("variance unexplained", rows, "step", log=True)], title)


def quality(record: DictionaryQuality, title: str) -> go.Figure:
    """The shares explained and recovered, how many features are on, and how many turn on."""
    loops = list(range(len(record.explained)))
    frame = record.frame()
    shares = [
        Curve("variance explained", loops, record.explained.tolist()),
        Curve("answers recovered", loops, record.recovered.tolist()),
    ]
    counts = [
        Curve("on in at least one token", loops, frame["live"].tolist()),
        Curve("turned on there in at least one", loops, frame["new"].tolist()),
    ]
    panels = [
        CurvePanel("share kept by the dictionary", shares, "loop"),
        CurvePanel(
            "features on per token", [Curve("features", loops, record.active.tolist())], "loop"
        ),
        CurvePanel("features", counts, "loop"),
    ]
    return curves(panels, title)


def labels(record: FeatureLabels, title: str) -> go.Figure:
    """F1 of the best feature of each label at each iteration."""
    loops = list(range(len(record.f1)))
    names = list(range(record.f1.shape[1]))
    texts = [["" for _ in loops] for _ in names]
    cells = CellMap(
        title="F1 of the best feature, on held-out tokens",
        columns=loops,
        rows=names,
        values=record.f1.T.tolist(),
        unit="F1",
        texts=texts if len(names) > _SHOWN else None,
        axes=("loop", "label"),
    )
    return cell_maps([cells], title)


def profiles(record: TopExamples, title: str) -> go.Figure:
    """The mean length of what each feature writes, over the iterations."""
    loops = list(range(record.profile.shape[1]))
    rows = [
        Curve(f"feature {feature}", loops, profile.tolist())
        for feature, profile in zip(record.features, record.profile, strict=True)
    ]
    return curves([CurvePanel("mean length of what is written", rows, "loop")], title)


def attribution(record: FeatureAttribution, title: str) -> go.Figure:
    """The summed effects of the features that matter most, by iteration, as means over
    examples.
    """
    effects = record.values.sum(1).mean(0)
    top = effects.abs().amax(0).topk(min(_SHOWN, effects.shape[1])).indices
    top = top[torch.argsort(effects.abs().amax(0)[top])]
    cells = CellMap(
        title="mean effect on the metric",
        columns=list(range(len(effects))),
        rows=[f"feature {feature}" for feature in top.tolist()],
        values=effects[:, top].T.tolist(),
        unit="effect",
        scale="signed",
        axes=("loop", ""),
    )
    return cell_maps([cells], title)
