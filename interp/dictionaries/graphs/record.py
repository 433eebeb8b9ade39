"""The record of a graph of features: its nodes, and the effect of one on another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd

from loopscope.interp.common.shown import OneScreen


class FeatureNode(NamedTuple):
    """A node of a graph of features.

    Attributes:
        kind: "embed" the embedding of a token; "feature"; "error" what the dictionary leaves out of
            a state; "other" the dictionary's bias with the features that are no nodes; "answer" the
            metric.
        loop: The iteration; None for embeddings and the answer.
        position: The column of the token.
        feature: The feature, from 0; None for other nodes.
    """

    kind: Literal["embed", "feature", "error", "other", "answer"]
    loop: int | None
    position: int
    feature: int | None = None


class FeatureLink(NamedTuple):
    """An effect of one node on another.

    Attributes:
        source, target: The nodes' numbers.
        weight: The gradient of the target's activation (or of the metric) along what the source
            adds, times what it adds.
    """

    source: int
    target: int
    weight: float


@dataclass(frozen=True)
class FeatureGraph(OneScreen):
    """Features of one input, and first-order effects between them.

    Attributes:
        nodes: In the order of the run; the answer is the last one.
        links: By target.
        activations: Of features; None for other nodes.
        effects: Of features, the effect on the metric along all paths: `feature_attribution` of a
            run in which divisors of norms are held, as they are for links. None for other nodes.
        value: The metric of the run.
        metric: The metric's name.
        hook: Where the dictionary writes, within an iteration.
        n_loops: Iterations of the run.
        n_features: Of the dictionary.
        same_features: Whether a feature is the same at every iteration.
    """

    nodes: tuple[FeatureNode, ...]
    links: tuple[FeatureLink, ...]
    activations: tuple[float | None, ...]
    effects: tuple[float | None, ...]
    value: float
    metric: str
    hook: str
    n_loops: int
    n_features: int
    same_features: bool

    @property
    def total(self) -> float:
        """The sum of the links into the answer: the first-order change of the metric, divisors of
        norms held, when the embedding and all that stands at the hooks grow by the same share.
        """
        last = len(self.nodes) - 1
        return sum(link.weight for link in self.links if link.target == last)

    def frame(self) -> pd.DataFrame:
        """One row per link: source, source_loop, source_position, source_feature, the same of the
        target, weight.
        """
        sides = [
            f"{side}{part}"
            for side in ("source", "target")
            for part in ("", "_loop", "_position", "_feature")
        ]
        rows = [
            (*self.nodes[link.source], *self.nodes[link.target], link.weight) for link in self.links
        ]
        frame = pd.DataFrame(rows, columns=[*sides, "weight"])
        return frame.astype({side: "Int64" for side in sides if "_" in side})
