"""The graph of features: every link is a finite difference of a run that is held at the hooks, and
sums are first-order totals.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dictionary_toys import FEATURES, dictionary, model
from loopscope.interp.circuits.viewer import viewer_graph
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.attribution import feature_attribution
from loopscope.interp.dictionaries.dictionary import Dictionary, Kind
from loopscope.interp.dictionaries.graph import FeatureGraph, FeatureNode, feature_graph
from toy import LOOPS, assert_close, hook_count, padded, run

pytestmark = pytest.mark.shapes
ROW, STEP = 1, 1e-5
BATCH = padded()[ROW : ROW + 1]
metric = logit_diff(1, 2)
DIVISORS = [name for name in model().hook_names(LOOPS) if name.endswith("hook_scale")]
KINDS: tuple[Kind, ...] = ("per_iteration", "shared", "transcoder")
Values = dict[str, Tensor]


def seen(own: Dictionary, held: Values) -> tuple[Values, Tensor]:
    """What passes the hooks of a dictionary and of norms, and the metric, when some are held."""
    values: Values = {}
    names = ["hook_embed", *own.reading.written, *DIVISORS]

    def keep(value: Tensor, hook: object) -> None:
        values.setdefault(hook.name, value)  # type: ignore[attr-defined]

    def hold(value: Tensor, hook: object) -> Tensor:
        return held.get(hook.name, value)  # type: ignore[attr-defined]

    hooks = [(list(dict.fromkeys([*names, *own.reading.names])), keep), (names, hold)]
    with model().hooks(hooks, n_loops=LOOPS), torch.no_grad():
        logits = run(model(), BATCH)[[0], BATCH.readout]
    return values, metric(logits).sum()


def own_parts(own: Dictionary, graph: FeatureGraph) -> dict[FeatureNode, tuple[str, Tensor]]:
    """The hook at which each source of the graph adds, and what it adds there, by hand."""
    values, _ = seen(own, {})
    shown = {node[1:]: node for node in graph.nodes if node.kind == "feature"}
    found = {}
    for at in range(BATCH.tokens.shape[1]):
        part = torch.zeros_like(values["hook_embed"])
        part[0, at] = values["hook_embed"][0, at]
        found[FeatureNode("embed", None, at)] = "hook_embed", part
        for loop, name in enumerate(own.reading.written):
            code = own.coder(loop).encode(values[own.reading.names[loop]][0, at])
            left, other = values[name][0, at], own.bias(loop).clone()
            for feature, size in enumerate(code.tolist()):
                added = size * own.directions(loop)[feature]
                node = shown.get((loop, at, feature))
                if node is None:
                    other += added
                else:
                    part = torch.zeros_like(values[name])
                    part[0, at] = added
                    found[node] = name, part
                left = left - added
            for kind, vector in (("error", left - own.bias(loop)), ("other", other)):
                part = torch.zeros_like(values[name])
                part[0, at] = vector
                found[FeatureNode(kind, loop, at)] = name, part  # type: ignore[arg-type]
    return found


def goal(own: Dictionary, node: FeatureNode, values: Values, value: Tensor) -> Tensor:
    """A target's activation, or the metric."""
    if node.loop is None or node.feature is None:
        return value
    state = values[own.reading.names[node.loop]][0, node.position]
    return own.coder(node.loop).encode(state)[node.feature]


def slope(own: Dictionary, moved: Values, target: FeatureNode) -> Tensor:
    """The central difference of a target when what is held at the hooks moves along some parts."""
    values, _ = seen(own, {})
    names = ["hook_embed", *own.reading.written, *DIVISORS]
    sides = []
    for step in (STEP, -STEP):
        held = {name: values[name] + step * moved.get(name, 0) for name in names}
        sides.append(goal(own, target, *seen(own, held)))
    return (sides[0] - sides[1]) / (2 * STEP)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_the_finite_difference_of_a_run_held_at_the_hooks(kind: Kind) -> None:
    own = dictionary(kind)
    graph = feature_graph(model(), own, BATCH, metric, most=6)
    parts = own_parts(own, graph)
    order = torch.randperm(len(graph.links), generator=torch.Generator().manual_seed(0))
    for number in order[:12].tolist():
        link = graph.links[number]
        name, part = parts[graph.nodes[link.source]]
        expected = slope(own, {name: part}, graph.nodes[link.target])
        assert link.weight == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    assert hook_count(model()) == 0


@pytest.mark.parametrize("most", [3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_all_links_into_a_target_sum_to_its_first_order_total(kind: Kind, most: int) -> None:
    own = dictionary(kind)
    graph = feature_graph(model(), own, BATCH, metric, most=most)
    values, value = seen(own, {})
    assert graph.value == pytest.approx(float(value))
    values = {name: part for name, part in values.items() if name not in DIVISORS}
    features = [n for n, node in enumerate(graph.nodes) if node.kind == "feature"]
    for number in [*features[-2:], len(graph.nodes) - 1]:
        expected = slope(own, values, graph.nodes[number])
        total = sum(link.weight for link in graph.links if link.target == number)
        assert total == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    assert graph.total == pytest.approx(
        float(slope(own, values, graph.nodes[-1])), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_of_largest_effect_are_shown_with_their_activations(kind: Kind) -> None:
    own = dictionary(kind)
    graph = feature_graph(model(), own, BATCH, metric, most=7)
    top = feature_attribution(model(), own, BATCH, metric).top(7)
    shown = {
        node: (effect, activation)
        for node, effect, activation in zip(
            graph.nodes, graph.effects, graph.activations, strict=True
        )
        if node.kind == "feature"
    }
    assert len(shown) == 7
    values, value = seen(own, {})
    for _, at, loop, feature, effect in top.itertuples(index=False):
        node = FeatureNode("feature", int(loop), int(at), int(feature))
        assert shown[node][0] == pytest.approx(effect)
        assert shown[node][1] == pytest.approx(float(goal(own, node, values, value)))
    rest = [n for n, node in enumerate(graph.nodes) if node.kind != "feature"]
    assert {graph.activations[n] for n in rest} == {graph.effects[n] for n in rest} == {None}


def test_weights_into_an_answer_that_is_linear_in_the_last_state_sum_to_it() -> None:
    own = dictionary("shared")
    graph = feature_graph(model(), own, BATCH, metric)
    nothing, value = seen(own, {})
    last = own.reading.written[-1]
    _, constant = seen(own, {name: nothing[name] for name in DIVISORS} | {last: nothing[last] * 0})
    assert graph.total == pytest.approx(float(value - constant))
    assert abs(graph.total) > 0.1


def test_one_row_of_several_has_the_graph_of_the_row_alone() -> None:
    own = dictionary("shared")
    answers = torch.arange(len(padded()))
    alone = feature_graph(model(), own, BATCH, logit_diff(ROW, 2), most=8)
    among = feature_graph(model(), own, padded(), logit_diff(answers, 2), row=ROW, most=8)
    assert among.nodes == alone.nodes
    assert [link[:2] for link in among.links] == [link[:2] for link in alone.links]
    assert among.value == pytest.approx(alone.value)
    assert [link.weight for link in among.links] == pytest.approx(
        [link.weight for link in alone.links]
    )


def test_with_all_features_shown_the_other_nodes_are_the_bias() -> None:
    own = dictionary("shared")
    graph = feature_graph(model(), own, BATCH, metric, most=10_000)
    parts = own_parts(own, graph)
    last, name = len(graph.nodes) - 1, own.reading.written[-1]
    at = int(BATCH.readout[0])
    bias = torch.zeros_like(parts[FeatureNode("error", LOOPS - 1, at)][1])
    bias[0, at] = own.bias(LOOPS - 1)
    (weight,) = [
        link.weight
        for link in graph.links
        if link.target == last and graph.nodes[link.source].kind == "other"
    ]
    assert weight == pytest.approx(float(slope(own, {name: bias}, graph.nodes[-1])), rel=1e-5)


def test_links_go_forward_and_through_no_other_hook() -> None:
    graph = feature_graph(model(), dictionary("shared"), BATCH, metric, most=20)
    frame = graph.frame()
    assert len(frame) == len(graph.links)
    between = frame[(frame["source"] == "feature") & (frame["target"] == "feature")]
    assert len(between) > 0
    assert (between["target_loop"] - between["source_loop"]).eq(1).all()
    assert (between["target_position"] >= between["source_position"]).all()
    into = frame[frame["target"] == "answer"]
    assert into["source_loop"].eq(LOOPS - 1).all()
    assert set(frame[frame["source"] == "embed"]["target_loop"]) == {0}


def test_the_viewers_graph_has_the_features_and_all_weights() -> None:
    own = dictionary("shared")
    graph = feature_graph(model(), own, BATCH, metric, most=12)
    tokens = [f"<{n}>" for n in range(BATCH.tokens.shape[1])]
    made = viewer_graph(graph, tokens, answer="<a>")
    nodes = {node["node_id"]: node for node in made["nodes"]}
    assert len(nodes) == len(graph.nodes)
    kinds = [node["feature_type"] for node in made["nodes"]]
    assert kinds.count("cross layer transcoder") == 12
    assert kinds.count("logit") == 1
    answer = made["qParams"]["clickedId"]
    assert nodes[answer]["clerp"] == "<a>"
    into = [link["weight"] for link in made["links"] if link["target"] == answer]
    assert_close(torch.tensor(sum(into)).double(), torch.tensor(graph.total).double())
    for node, activation in zip(graph.nodes, graph.activations, strict=True):
        if node.kind == "feature":
            sent = nodes[f"{node.loop}_{node.feature}_{node.position}"]
            assert (sent["activation"], sent["ctx_idx"]) == (activation, node.position)
            assert sent["clerp"] == f"feature {node.feature}, loop {node.loop}"
    errors = [node for node in made["nodes"] if node["feature_type"].endswith("error")]
    assert {node["feature"] for node in errors} == {FEATURES}
    for name, *ids in made["qParams"]["supernodes"]:
        feature, at = re.fullmatch(r"feature (\d+)@(\d+)", name).groups()  # type: ignore[union-attr]
        assert len(ids) > 1
        assert {tuple(each.split("_")[1:]) for each in ids} == {(feature, at)}
    with pytest.raises(ValueError, match="needs a token for each of the graph's"):
        viewer_graph(graph, tokens[:1])


def test_what_cannot_be_a_graph_of_features_is_refused() -> None:
    own = dictionary("shared")
    with pytest.raises(ValueError, match="got a crosscoder dictionary"):
        feature_graph(model(), dictionary("crosscoder"), BATCH, metric)
    with pytest.raises(ValueError, match="row must be"):
        feature_graph(model(), own, BATCH, metric, row=1)
    with pytest.raises(ValueError, match="and most=0"):
        feature_graph(model(), own, BATCH, metric, most=0)
