"""A circuit or a graph of features in the JSON that viewers of attribution graphs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from loopscope.interp.circuits.names import EMBED, FINAL, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.dictionaries.graph import FeatureGraph, FeatureNode

_KINDS = {EMBED: "embedding", FINAL: "logit"}
_OF_FEATURES = {
    "embed": "embedding",
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "other": "component",
    "answer": "logit",
}
"""The viewer's word for each kind of node of a graph of features."""


class _Sent(NamedTuple):
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


class _Graph(NamedTuple):
    """The parts of a viewer's graph."""

    about: dict[str, Any]
    nodes: Sequence[dict[str, Any]]
    links: Mapping[tuple[str, str], float]
    groups: Sequence[list[str]]


def viewer_graph(
    circuit: Circuit | FeatureGraph, tokens: Sequence[str], answer: str = "", slug: str = "circuit"
) -> dict[str, Any]:
    """The graph of a circuit or of features as circuit-tracer and Neuronpedia's viewer read it:
    `metadata`, `qParams`, `nodes` and `links`, to be written by `json.dump`.

    Of a circuit the viewer's layers are the visits of the run, from 0. Its features are the
    components of a visit: the head's number, and for attention as a whole and MLPs the numbers
    behind the heads'. In a circuit by position a node stands at the token of its position; else all
    nodes stand at the last token, because scores are then sums over positions. An edge into keys or
    values that several heads share, or that several positions read, is given to the heads at these
    positions in equal parts. Components of the shared blocks that act in several iterations are the
    viewer's groups (supernodes).

    Of a graph of features the viewer's layers are the iterations, from 0, and its features those of
    the dictionary, with their activations. The two numbers behind them are the error and the other
    features with the bias. Where a feature is the same at every iteration, its nodes at one token
    are a group.

    Args:
        circuit: The circuit, or the graph that `feature_graph` made.
        tokens: The tokens of the input, or of one of the inputs, in words.
        answer: The answer in words.
        slug: The graph's name in an address.

    Raises:
        ValueError: No token, or fewer than there are positions.

    Source:
        The JSON schema of Neuronpedia's attribution graphs (apps/webapp/app/api/graph in
        hijohnnylin/neuronpedia), version 1.0.0.
    """
    _check_tokens(circuit, tokens)
    graph = (
        _of_features(circuit, answer)
        if isinstance(circuit, FeatureGraph)
        else _of_circuit(circuit, len(tokens) - 1, answer)
    )
    last = [node["node_id"] for node in graph.nodes if node["is_target_logit"]]
    return {
        "metadata": {
            "slug": slug,
            "prompt_tokens": list(tokens),
            "prompt": "".join(tokens),
            "info": {"generator": {"name": "loopscope"}},
            **graph.about,
        },
        "qParams": {
            "pinnedIds": [node for group in graph.groups for node in group[1:]],
            "supernodes": list(graph.groups),
            "linkType": "both",
            "clickedId": next(iter(last), ""),
            "sg_pos": "",
        },
        "nodes": list(graph.nodes),
        "links": [
            {"source": source, "target": target, "weight": weight}
            for (source, target), weight in graph.links.items()
        ],
    }


def _check_tokens(circuit: Circuit | FeatureGraph, tokens: Sequence[str]) -> None:
    """Refuse fewer tokens than there are positions."""
    if not tokens:
        raise ValueError("the viewer's graph needs the tokens of an input, got none")
    if isinstance(circuit, FeatureGraph):
        what, size = "graph", 1 + max(node.position for node in circuit.nodes)
    else:
        what, size = "circuit", circuit.positions.size if circuit.positions else 1
    if len(tokens) < size:
        raise ValueError(
            f"the viewer's graph needs a token for each of the {what}'s {size} positions, got"
            f" {len(tokens)}"
        )


def _of_circuit(circuit: Circuit, last: int, answer: str) -> _Graph:
    """The parts of a circuit's graph."""
    links, call = _links(circuit), circuit.call
    sent = _sent(circuit, last, answer)
    scores = dict.fromkeys(sent, 0.0)
    for (writer, _), weight in links.items():
        scores[writer] += abs(weight)
    influence = _influence({node: score for node, score in scores.items() if end_of(node).visit})
    about = {
        "scan": call.checkpoint or "loopscope",
        "generation_settings": {"method": call.method, "metric": call.metric} | dict(call.settings),
        "pruning_settings": {"selection": call.selection},
    }
    return _Graph(
        about,
        [to.fields(influence.get(node), None) for node, to in sent.items()],
        {(sent[writer].id, sent[reader].id): weight for (writer, reader), weight in links.items()},
        _groups(circuit, sent),
    )


def _of_features(graph: FeatureGraph, answer: str) -> _Graph:
    """The parts of a graph of features."""
    sent = [_of_feature(graph, node, answer) for node in graph.nodes]
    influence = _influence(
        {to.id: abs(e) for to, e in zip(sent, graph.effects, strict=True) if e is not None}
    )
    about = {
        "scan": f"loopscope: {graph.hook}",
        "generation_settings": {"method": "gradient times activation", "metric": graph.metric},
        "pruning_settings": {"features": len(influence)},
    }
    return _Graph(
        about,
        [to.fields(influence.get(to.id), a) for to, a in zip(sent, graph.activations, strict=True)],
        {(sent[link.source].id, sent[link.target].id): link.weight for link in graph.links},
        _same_features(graph, sent) if graph.same_features else [],
    )


def _same_features(graph: FeatureGraph, sent: Sequence[_Sent]) -> list[list[str]]:
    """The viewer's groups: a name, and one feature at one token in several iterations."""
    groups: dict[str, list[str]] = {}
    for node, to in zip(graph.nodes, sent, strict=True):
        if node.kind == "feature":
            groups.setdefault(f"feature {node.feature}@{node.position}", []).append(to.id)
    return [[name, *nodes] for name, nodes in groups.items() if len(nodes) > 1]


def _of_feature(graph: FeatureGraph, node: FeatureNode, answer: str) -> _Sent:
    """A node of a graph of features as the viewer knows it."""
    behind = {"error": graph.n_features, "other": graph.n_features + 1}
    number = behind.get(node.kind, 0) if node.feature is None else node.feature
    layers = {"embed": "E", "answer": str(graph.n_loops)}
    names = {"feature": f"feature {number}", "answer": answer or graph.metric}
    name = names.get(node.kind, node.kind)
    where = "" if node.loop is None else f", loop {node.loop}"
    layer = layers.get(node.kind, str(node.loop))
    return _Sent(layer, number, node.position, _OF_FEATURES[node.kind], name + where)


def _sent(circuit: Circuit, last: int, answer: str) -> dict[str, _Sent]:
    """Every node that is an end of a link, in the order of the run."""
    visits = {place.name: number for number, place in enumerate(circuit.schedule)}
    ends = [edge.writer for edge in circuit.edges]
    ends += [node for edge in circuit.edges for node in circuit.passed_on(edge.reader)]
    nodes = circuit.in_order(ends)
    heads = [end_of(node).component.removeprefix("attn.") for node in nodes]
    n_heads = max((int(head) + 1 for head in heads if head.isdecimal()), default=0)
    found = {}
    for node in nodes:
        end = end_of(node)
        head = end.component.removeprefix("attn.")
        number = int(head) if head.isdecimal() else n_heads + (end.component == "mlp")
        ends_at = {EMBED: "E", FINAL: str(len(visits))}
        layer = ends_at.get(end.component) or str(visits[end.visit])
        feature = number if end.visit else 0
        at = last if end.position is None else end.position
        kind = _KINDS.get(end.component, "component")
        found[node] = _Sent(
            layer, feature, at, kind, answer if kind == "logit" and answer else node
        )
    return found


def _links(circuit: Circuit) -> dict[tuple[str, str], float]:
    """The weight of each pair of nodes: queries, keys and values together."""
    found: dict[tuple[str, str], float] = {}
    for edge, score in zip(circuit.edges, circuit.scores, strict=True):
        readers = circuit.passed_on(edge.reader)
        for reader in readers:
            pair = edge.writer, reader
            found[pair] = found.get(pair, 0.0) + score / len(readers)
    return found


def _influence(scores: Mapping[str, float]) -> dict[str, float]:
    """For each component the share of all scores that it and those above it have, which the
    viewer's threshold is compared with.
    """
    order = sorted(scores, key=lambda node: -scores[node])
    total = sum(scores.values()) or 1.0
    shares = accumulate(scores[node] / total for node in order)
    return dict(zip(order, shares, strict=True))


def _groups(circuit: Circuit, sent: Mapping[str, _Sent]) -> list[list[str]]:
    """The viewer's groups: a name, and the nodes of one component, at one position if they have
    positions, in several iterations.
    """
    groups: dict[tuple[str, int | None], list[str]] = {}
    for node, to in sent.items():
        key = circuit.folded_name(node), circuit.end(node).position
        groups.setdefault(key, []).append(to.id)
    return [
        [name if at is None else f"{name}@{at}", *nodes]
        for (name, at), nodes in groups.items()
        if len(nodes) > 1
    ]
