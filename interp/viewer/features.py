"""A graph of features as viewers of attribution graphs know it."""

from __future__ import annotations

from collections.abc import Sequence

from loopscope.interp.dictionaries.graphs.record import FeatureGraph, FeatureNode
from loopscope.interp.viewer.parts import ViewerNode, ViewerParts, influences

_KINDS = {
    "embed": "embedding",
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "other": "component",
    "answer": "logit",
}
"""The viewer's word for each kind of node of a graph of features."""


def feature_parts(graph: FeatureGraph, answer: str) -> ViewerParts:
    """The parts of a graph of features."""
    sent = [_of_feature(graph, node, answer) for node in graph.nodes]
    influence = influences(
        {to.id: abs(e) for to, e in zip(sent, graph.effects, strict=True) if e is not None}
    )
    about = {
        "scan": f"loopscope: {graph.hook}",
        "generation_settings": {"method": "gradient times activation", "metric": graph.metric},
        "pruning_settings": {"features": len(influence)},
    }
    return ViewerParts(
        about,
        [to.fields(influence.get(to.id), a) for to, a in zip(sent, graph.activations, strict=True)],
        {(sent[link.source].id, sent[link.target].id): link.weight for link in graph.links},
        _same_features(graph, sent) if graph.same_features else [],
    )


def _same_features(graph: FeatureGraph, sent: Sequence[ViewerNode]) -> list[list[str]]:
    """The viewer's groups: a name, and one feature at one token in several iterations."""
    groups: dict[str, list[str]] = {}
    for node, to in zip(graph.nodes, sent, strict=True):
        if node.kind == "feature":
            groups.setdefault(f"feature {node.feature}@{node.position}", []).append(to.id)
    return [[name, *nodes] for name, nodes in groups.items() if len(nodes) > 1]


def _of_feature(graph: FeatureGraph, node: FeatureNode, answer: str) -> ViewerNode:
    """A node of a graph of features as the viewer knows it."""
    behind = {"error": graph.n_features, "other": graph.n_features + 1}
    number = behind.get(node.kind, 0) if node.feature is None else node.feature
    layers = {"embed": "E", "answer": str(graph.n_loops)}
    names = {"feature": f"feature {number}", "answer": answer or graph.metric}
    name = names.get(node.kind, node.kind)
    where = "" if node.loop is None else f", loop {node.loop}"
    layer = layers.get(node.kind, str(node.loop))
    return ViewerNode(layer, number, node.position, _KINDS[node.kind], name + where)
