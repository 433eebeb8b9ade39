"""A circuit in the JSON that viewers of attribution graphs read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from loopscope.interp.circuits.names import EMBED, FINAL, end_of
from loopscope.interp.circuits.record import Circuit

_KINDS = {EMBED: "embedding", FINAL: "logit"}


class _Sent(NamedTuple):
    """A node as the viewer knows it."""

    layer: str
    feature: int
    position: int
    id: str
    component: str


def viewer_graph(
    circuit: Circuit, tokens: Sequence[str], answer: str = "", slug: str = "circuit"
) -> dict[str, Any]:
    """The graph of a circuit as circuit-tracer and Neuronpedia's viewer read it: `metadata`,
    `qParams`, `nodes` and `links`, to be written by `json.dump`.

    The viewer's layers are the visits of the run, from 0. Its features are the components of a
    visit: the head's number, and for attention as a whole and MLPs the numbers behind the heads'.
    In a circuit by position a node stands at the token of its position; else all nodes stand at the
    last token, because scores are then sums over positions. An edge into keys or values that
    several heads share, or that several positions read, is given to the heads at these positions in
    equal parts. Components
    of the shared blocks that act in several iterations are the viewer's groups (supernodes).

    Args:
        circuit: The circuit.
        tokens: The tokens of the input, or of one of the inputs, in words.
        answer: The answer in words.
        slug: The graph's name in an address.

    Raises:
        ValueError: No token, or fewer than a circuit by position has positions.

    Source:
        The JSON schema of Neuronpedia's attribution graphs (apps/webapp/app/api/graph in
        hijohnnylin/neuronpedia), version 1.0.0.
    """
    if not tokens:
        raise ValueError("the viewer's graph needs the tokens of an input, got none")
    if circuit.positions and len(tokens) < circuit.positions.size:
        raise ValueError(
            f"the viewer's graph needs a token for each of the circuit's"
            f" {circuit.positions.size} positions, got {len(tokens)}"
        )
    links = _links(circuit)
    sent = _sent(circuit, len(tokens) - 1)
    scores = dict.fromkeys(sent, 0.0)
    for (writer, _), weight in links.items():
        scores[writer] += abs(weight)
    influence = _influence({node: score for node, score in scores.items() if end_of(node).visit})
    nodes = [_node(node, to, influence.get(node), answer) for node, to in sent.items()]
    groups = _groups(circuit, sent)
    return {
        "metadata": {
            "slug": slug,
            "scan": circuit.call.checkpoint or "loopscope",
            "prompt_tokens": list(tokens),
            "prompt": "".join(tokens),
            "info": {"generator": {"name": "loopscope"}},
            "generation_settings": {"method": circuit.call.method, "metric": circuit.call.metric}
            | dict(circuit.call.settings),
            "pruning_settings": {"selection": circuit.call.selection},
        },
        "qParams": {
            "pinnedIds": [node for group in groups for node in group[1:]],
            "supernodes": groups,
            "linkType": "both",
            "clickedId": next((to.id for to in sent.values() if to.component == FINAL), ""),
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": sent[writer].id, "target": sent[reader].id, "weight": weight}
            for (writer, reader), weight in links.items()
        ],
    }


def _sent(circuit: Circuit, last: int) -> dict[str, _Sent]:
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
        found[node] = _Sent(layer, feature, at, f"{layer}_{feature}_{at}", end.component)
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


def _node(node: str, sent: _Sent, influence: float | None, answer: str) -> dict[str, Any]:
    return {
        "node_id": sent.id,
        "feature": sent.feature,
        "layer": sent.layer,
        "ctx_idx": sent.position,
        "feature_type": _KINDS.get(sent.component, "component"),
        "token_prob": 0.0,
        "is_target_logit": sent.component == FINAL,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{sent.layer}_{sent.feature}-0",
        "clerp": answer if sent.component == FINAL and answer else node,
        "influence": influence,
        "activation": None,
    }


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
