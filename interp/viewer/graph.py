"""A circuit or a graph of features in the JSON that viewers of attribution graphs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopscope.interp.circuits.record import Circuit
from loopscope.interp.dictionaries.graphs.record import FeatureGraph
from loopscope.interp.viewer.circuits import circuit_parts
from loopscope.interp.viewer.features import feature_parts


def viewer_graph(
    graph: Circuit | FeatureGraph, tokens: Sequence[str], answer: str = "", slug: str = "circuit"
) -> dict[str, Any]:
    """Convert a circuit or a graph of features to the JSON that circuit-tracer and Neuronpedia's
    viewer read.

    Of a circuit, the viewer's layers are the visits of the run, from 0. Its features are the
    components of a visit: first the heads by their number, then attention as a whole and the MLP.
    In a circuit by position a node stands at the token of its position. Otherwise all nodes stand
    at the last token, because the scores are sums over positions. An edge into keys or values that
    several heads or positions share is divided equally among them. Components of the shared blocks
    that act in several iterations are the viewer's groups (supernodes).

    Of a graph of features, the viewer's layers are the iterations, from 0. Its features are those
    of the dictionary, with their activations, and two more: the error of the dictionary, and all
    other features together with the bias. If a feature is the same at every iteration, its nodes at
    one token are a group.

    The viewer does not know some kinds of nodes, which get the nearest kind: "cross layer
    transcoder" for a feature of any dictionary, "mlp reconstruction error" for the error of the
    dictionary, and "component" for heads, MLPs and the other features with the bias.

    Args:
        graph: The circuit, or the graph that `feature_graph` made.
        tokens: The tokens of the input, or of one of the inputs, in words.
        answer: The answer in words.
        slug: The graph's name in the viewer's address.

    Returns:
        The entries `metadata`, `qParams`, `nodes` and `links`, to be written by `json.dump`.

    Raises:
        ValueError: There is no token, or there are fewer tokens than positions.

    Source:
        The JSON schema of Neuronpedia's attribution graphs (apps/webapp/app/api/graph in
        hijohnnylin/neuronpedia), version 1.0.0.
    """
    _check_tokens(graph, tokens)
    parts = (
        feature_parts(graph, answer)
        if isinstance(graph, FeatureGraph)
        else circuit_parts(graph, len(tokens) - 1, answer)
    )
    last = [node["node_id"] for node in parts.nodes if node["is_target_logit"]]
    return {
        "metadata": {
            "slug": slug,
            "prompt_tokens": list(tokens),
            "prompt": "".join(tokens),
            "info": {"generator": {"name": "loopscope"}},
            **parts.about,
        },
        "qParams": {
            "pinnedIds": [node for group in parts.groups for node in group[1:]],
            "supernodes": list(parts.groups),
            "linkType": "both",
            "clickedId": next(iter(last), ""),
            "sg_pos": "",
        },
        "nodes": list(parts.nodes),
        "links": [
            {"source": source, "target": target, "weight": weight}
            for (source, target), weight in parts.links.items()
        ],
    }


def _check_tokens(graph: Circuit | FeatureGraph, tokens: Sequence[str]) -> None:
    """Refuse fewer tokens than there are positions."""
    if not tokens:
        raise ValueError("the viewer's graph needs the tokens of an input, got none")
    if isinstance(graph, FeatureGraph):
        what, size = "graph", 1 + max(node.position for node in graph.nodes)
    else:
        what, size = "circuit", graph.positions.size if graph.positions else 1
    if len(tokens) < size:
        raise ValueError(
            f"the viewer's graph needs a token for each of the {what}'s {size} positions, got"
            f" {len(tokens)}"
        )
