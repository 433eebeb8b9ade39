"""The parts of a graph that viewers of attribution graphs read, whatever it was made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple


class ViewerNode(NamedTuple):
    """A node as the viewer knows it.

    Attributes:
        layer, feature, position: Its coordinates.
        kind: The viewer's word for its kind.
        label: Its name for a reader.
    """

    layer: str
    feature: int
    position: int
    kind: str
    label: str

    @property
    def id(self) -> str:
        """Its name for the viewer."""
        return f"{self.layer}_{self.feature}_{self.position}"

    def fields(self, influence: float | None, activation: float | None) -> dict[str, Any]:
        """The JSON of the node."""
        return {
            "node_id": self.id,
            "feature": self.feature,
            "layer": self.layer,
            "ctx_idx": self.position,
            "feature_type": self.kind,
            "token_prob": 0.0,
            "is_target_logit": self.kind == "logit",
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": f"{self.layer}_{self.feature}-0",
            "clerp": self.label,
            "influence": influence,
            "activation": activation,
        }


class ViewerParts(NamedTuple):
    """The parts of a viewer's graph."""

    about: dict[str, Any]
    nodes: Sequence[dict[str, Any]]
    links: Mapping[tuple[str, str], float]
    groups: Sequence[list[str]]


def influences(scores: Mapping[str, float]) -> dict[str, float]:
    """For each component the share of all scores that it and those above it have, which the
    viewer's threshold is compared with.
    """
    order = sorted(scores, key=lambda node: -scores[node])
    total = sum(scores.values()) or 1.0
    shares = accumulate(scores[node] / total for node in order)
    return dict(zip(order, shares, strict=True))
