"""A circuit as viewers of attribution graphs know it."""

from __future__ import annotations

from collections.abc import Mapping

from loopscope.interp.circuits.names import EMBED, FINAL, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.viewer.parts import ViewerNode, ViewerParts, influences

_KINDS = {EMBED: "embedding", FINAL: "logit"}


def circuit_parts(circuit: Circuit, last: int, answer: str) -> ViewerParts:
    """The parts of a circuit's graph."""
    links, call = _links(circuit), circuit.call
    sent = _sent(circuit, last, answer)
    scores = dict.fromkeys(sent, 0.0)
    for (writer, _), weight in links.items():
        scores[writer] += abs(weight)
    influence = influences({node: score for node, score in scores.items() if end_of(node).visit})
    about = {
        "scan": call.checkpoint or "loopscope",
        "generation_settings": {"method": call.method, "metric": call.metric} | dict(call.settings),
        "pruning_settings": {"selection": call.selection},
    }
    return ViewerParts(
        about,
        [to.fields(influence.get(node), None) for node, to in sent.items()],
        {(sent[writer].id, sent[reader].id): weight for (writer, reader), weight in links.items()},
        _groups(circuit, sent),
    )


def _sent(circuit: Circuit, last: int, answer: str) -> dict[str, ViewerNode]:
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
        found[node] = ViewerNode(
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


def _groups(circuit: Circuit, sent: Mapping[str, ViewerNode]) -> list[list[str]]:
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
