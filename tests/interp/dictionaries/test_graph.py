"""The graph of features: every link is a finite difference of a run that is held at the hooks, and
sums are first-order totals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

import family_toys
from dictionary_toys import FEATURES, K, dictionary, model
from family_toys import TOYS
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.controls import random_dictionary
from loopscope.interp.dictionaries.dictionary import Dictionary, Kind
from loopscope.interp.dictionaries.graphs.graph import feature_graph
from loopscope.interp.dictionaries.graphs.record import FeatureGraph, FeatureNode
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.viewer.graph import viewer_graph
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import LOOPS, BatchCentred, assert_close, hook_count, odd_one, padded, run, toy

pytestmark = pytest.mark.shapes
ROW, STEP = 1, 1e-5
BATCH = padded()[ROW : ROW + 1]
AT_PADDING = replace(BATCH, readout=BATCH.mask.sum(1))
metric = logit_diff(1, 2)
KINDS: tuple[Kind, ...] = ("per_iteration", "shared", "transcoder")
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Held:
    """Runs of one input in which some values are held.

    Attributes:
        own: A dictionary of the model.
        batch: One row.
    """

    own: Dictionary
    batch: Batch = BATCH
    model: LoopedModel = field(default_factory=model)

    @cached_property
    def divisors(self) -> list[str]:
        names = self.model.hook_names(self.own.n_loops)
        return [name for name in names if name.endswith("hook_scale")]

    @cached_property
    def names(self) -> list[str]:
        """What is held for a link."""
        return ["hook_embed", *self.own.reading.written, *self.divisors]

    @cached_property
    def values(self) -> Values:
        return self.seen({})[0]

    @cached_property
    def value(self) -> Tensor:
        return self.seen({})[1]

    def seen(self, held: Values) -> tuple[Values, Tensor]:
        """What passes the hooks of the dictionary and of norms, and the metric."""
        values: Values = {}

        def keep(value: Tensor, hook: object) -> None:
            values.setdefault(hook.name, value)  # type: ignore[attr-defined]

        def hold(value: Tensor, hook: object) -> Tensor:
            return held.get(hook.name, value)  # type: ignore[attr-defined]

        kept = list(dict.fromkeys([*self.names, *self.own.reading.names]))
        hooks = [(kept, keep), (self.names, hold)]
        with self.model.hooks(hooks, n_loops=self.own.n_loops), torch.no_grad():
            tokens, options = self.batch.tokens, self.batch.options
            logits = self.model(tokens, n_loops=self.own.n_loops, mask=self.batch.mask, **options)[
                [0], self.batch.readout
            ]
        return values, metric(logits).sum()

    def part(self, name: str, at: int, vector: Tensor) -> tuple[str, Tensor]:
        """A hook, and a vector that is added there at one token."""
        part = torch.zeros_like(self.values[name])
        part[0, at] = vector
        return name, part

    def parts(self, graph: FeatureGraph) -> dict[FeatureNode, tuple[str, Tensor]]:
        """The hook at which each source of the graph adds, and what it adds there, by hand."""
        own, values = self.own, self.values
        shown = {node[1:]: node for node in graph.nodes if node.kind == "feature"}
        found = {}
        for at in range(self.batch.tokens.shape[1]):
            embedding = values["hook_embed"][0, at]
            found[FeatureNode("embed", None, at)] = self.part("hook_embed", at, embedding)
            for loop, name in enumerate(own.reading.written):
                code = own.coder(loop).encode(values[own.reading.names[loop]][0, at])
                left, other = values[name][0, at], own.bias(loop).clone()
                for feature, size in enumerate(code.tolist()):
                    added = size * own.directions(loop)[feature]
                    node = shown.get((loop, at, feature))
                    if node is None:
                        other += added
                    else:
                        found[node] = self.part(name, at, added)
                    left = left - added
                error = left - own.bias(loop)
                found[FeatureNode("error", loop, at)] = self.part(name, at, error)
                found[FeatureNode("other", loop, at)] = self.part(name, at, other)
        return found

    def goal(self, node: FeatureNode, values: Values, value: Tensor) -> Tensor:
        """A target's activation, or the metric."""
        if node.loop is None or node.feature is None:
            return value
        state = values[self.own.reading.names[node.loop]][0, node.position]
        return self.own.coder(node.loop).encode(state)[node.feature]

    def slope(
        self, moved: Values, target: FeatureNode, names: Sequence[str] | None = None
    ) -> Tensor:
        """The central difference of a target when what is held at some points moves along some
        parts.
        """
        sides = []
        for step in (STEP, -STEP):
            held = {
                name: self.values[name] + step * moved.get(name, 0)
                for name in (self.names if names is None else names)
            }
            sides.append(self.goal(target, *self.seen(held)))
        return (sides[0] - sides[1]) / (2 * STEP)


def effects(graph: FeatureGraph) -> dict[FeatureNode, float]:
    """The features of a graph with their effects."""
    both = zip(graph.nodes, graph.effects, strict=True)
    return {node: effect for node, effect in both if effect is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_the_finite_difference_of_a_run_held_at_the_hooks(kind: Kind) -> None:
    own = dictionary(kind)
    graph = feature_graph(model(), own, BATCH, metric, most=6)
    held = Held(own)
    parts = held.parts(graph)
    order = torch.randperm(len(graph.links), generator=torch.Generator().manual_seed(0))
    for number in order[:12].tolist():
        link = graph.links[number]
        name, part = parts[graph.nodes[link.source]]
        expected = held.slope({name: part}, graph.nodes[link.target])
        assert link.weight == pytest.approx(float(expected), rel=1e-5, abs=1e-7)
    assert hook_count(model()) == 0


@pytest.mark.parametrize("name", ["parcae", "huginn", "hyperloop", "hrm_text", "spiral"])
def test_links_of_other_families_are_finite_differences_too(name: str) -> None:
    small = TOYS[name]
    other = small.make().requires_grad_(False)
    batch = family_toys.padded(small, other)
    states = loop_states(other, batch, family_toys.LOOPS)
    own = random_dictionary(states, Reading.of(other, family_toys.LOOPS), FEATURES, K)
    graph = feature_graph(other, own, batch, metric, row=ROW, most=4)
    held = Held(own, batch[ROW : ROW + 1], other)
    parts, largest = held.parts(graph), max(abs(link.weight) for link in graph.links)
    kinds = set()
    for link in graph.links[:: len(graph.links) // 8]:
        name, part = parts[graph.nodes[link.source]]
        expected = held.slope({name: part}, graph.nodes[link.target])
        assert link.weight == pytest.approx(float(expected), rel=1e-6, abs=1e-7 * largest)
        kinds.add(graph.nodes[link.source].kind)
    assert len(kinds) > 1
    assert graph.value == pytest.approx(float(held.value))


@pytest.mark.parametrize("most", [3, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_all_links_into_a_target_sum_to_its_first_order_total(kind: Kind, most: int) -> None:
    own = dictionary(kind)
    graph = feature_graph(model(), own, BATCH, metric, most=most)
    held = Held(own)
    assert graph.value == pytest.approx(float(held.value))
    values = {name: part for name, part in held.values.items() if name not in held.divisors}
    features = [n for n, node in enumerate(graph.nodes) if node.kind == "feature"]
    for number in [*features[-2:], len(graph.nodes) - 1]:
        expected = held.slope(values, graph.nodes[number])
        total = sum(link.weight for link in graph.links if link.target == number)
        assert total == pytest.approx(float(expected), rel=1e-6, abs=1e-6)
    assert graph.total == pytest.approx(
        float(held.slope(values, graph.nodes[-1])), rel=1e-6, abs=1e-9
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_of_largest_effect_are_shown_with_their_activations(kind: Kind) -> None:
    own = dictionary(kind)
    graph, every = (feature_graph(model(), own, BATCH, metric, most=most) for most in (7, 10_000))
    shown, held = effects(graph), Held(own)
    sizes = sorted((abs(effect) for effect in effects(every).values()), reverse=True)
    assert sorted(map(abs, shown.values()), reverse=True) == pytest.approx(sizes[:7])
    assert len(sizes) > 7
    parts = held.parts(graph)
    for number, node in enumerate(graph.nodes):
        if node.kind == "feature":
            name, part = parts[node]
            moved = held.slope({name: part}, graph.nodes[-1], [name, *held.divisors])
            assert shown[node] == pytest.approx(float(moved), rel=1e-5)
            activation = float(held.goal(node, held.values, held.value))
            assert graph.activations[number] == pytest.approx(activation)
        else:
            assert graph.activations[number] is graph.effects[number] is None


def test_an_effect_along_one_path_is_the_link() -> None:
    graph = feature_graph(model(), dictionary("shared"), BATCH, metric, most=40)
    last = len(graph.nodes) - 1
    into = {graph.nodes[link.source]: link.weight for link in graph.links if link.target == last}
    late = {node: effect for node, effect in effects(graph).items() if node.loop == LOOPS - 1}
    assert len(late) > 1
    assert {node: into[node] for node in late} == pytest.approx(late)


def test_weights_into_an_answer_that_is_linear_in_the_last_state_sum_to_it() -> None:
    own = dictionary("shared")
    graph, held = feature_graph(model(), own, BATCH, metric), Held(own)
    last, fixed = own.reading.written[-1], {name: held.values[name] for name in held.divisors}
    _, constant = held.seen(fixed | {last: held.values[last] * 0})
    assert graph.total == pytest.approx(float(held.value - constant))
    assert abs(graph.total) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_read_at_padding_has_its_features(kind: Kind) -> None:
    own, at = dictionary(kind), int(AT_PADDING.readout[0])
    assert not AT_PADDING.mask[0, at]
    graph = feature_graph(model(), own, AT_PADDING, metric, most=10_000)
    held = Held(own, AT_PADDING)
    assert graph.value == pytest.approx(float(held.value))
    read = [node for node in graph.nodes if node.kind == "feature" and node.position == at]
    assert {node.loop for node in read} == set(range(LOOPS))
    last = len(graph.nodes) - 1
    others = FeatureNode("other", LOOPS - 1, at)
    (other,) = [
        link.weight
        for link in graph.links
        if link.target == last and graph.nodes[link.source] == others
    ]
    bias = held.part(own.reading.written[-1], at, own.bias(LOOPS - 1))
    assert other == pytest.approx(float(held.slope(dict([bias]), graph.nodes[-1])), rel=1e-5)


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


def test_the_metric_of_a_row_sees_the_others_and_only_the_row_is_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, rows = dictionary("shared"), []
    begin = RecurrentDepth.begin

    def centred(logits: Tensor) -> Tensor:
        return metric(logits) - 2 * metric(logits).mean()

    def counted(self: RecurrentDepth, tokens: Tensor, *args: object, **options: object) -> object:
        if torch.is_grad_enabled():
            rows.append(len(tokens))
        return begin(self, tokens, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(RecurrentDepth, "begin", counted)
    graph = feature_graph(model(), own, padded(), centred, row=ROW, most=8)
    alone = feature_graph(model(), own, BATCH, metric, most=8)
    with torch.no_grad():
        whole = centred(run(model(), padded())[range(len(padded())), padded().readout])
    assert graph.value == pytest.approx(float(whole[ROW]))
    assert (graph.metric, graph.nodes) == ("centred", alone.nodes)
    assert graph.total == pytest.approx(alone.total * (1 - 2 / len(padded())))
    assert set(rows) == {1}
    rows.clear()
    with model().hooks([("hook_embed", lambda value, hook: None)]):
        hooked = feature_graph(model(), own, padded(), centred, row=ROW, most=8)
    assert set(rows) == {len(padded())}, "a hook of the caller's may be made for the whole batch"
    assert hooked.nodes == graph.nodes


def test_weights_are_summed_wider_than_a_narrow_model() -> None:
    narrow = toy(dtype=torch.bfloat16)
    own = replace(dictionary("shared"), reading=Reading.of(narrow, LOOPS))
    graph = feature_graph(narrow, own, BATCH, metric, most=30)
    for kind in ("embed", "error", "feature"):
        links = [link.weight for link in graph.links if graph.nodes[link.source].kind == kind]
        weights = torch.tensor(links, dtype=torch.float64)
        assert len(links) > 3
        assert not torch.equal(weights.bfloat16().double(), weights), kind


def test_rows_that_depend_on_each_other_are_run_together() -> None:
    odd = odd_one(BatchCentred)
    reading = Reading.of(odd, LOOPS)
    own = replace(dictionary("shared"), reading=reading)
    graph = feature_graph(odd, own, padded(), metric, row=ROW, most=8)
    with torch.no_grad():
        logits = run(odd, padded())[range(len(padded())), padded().readout]
    assert graph.value == pytest.approx(float(metric(logits)[ROW]))
    apart = feature_graph(odd, own, padded()[ROW:], metric, most=8)
    assert graph.value != pytest.approx(apart.value)


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
    with pytest.raises(ValueError, match="got a crosscoder"):
        feature_graph(model(), dictionary("crosscoder"), BATCH, metric)
    with pytest.raises(ValueError, match="row must be"):
        feature_graph(model(), own, BATCH, metric, row=1)
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        feature_graph(model(), own, BATCH, metric, most=0)
    late = Reading.of(model(), LOOPS, "blocks.1.hook_resid_mid", "blocks.0.hook_resid_post")
    later = replace(dictionary("transcoder"), reading=late)
    with pytest.raises(ValueError, match=r"'loops.0.blocks.1.hook_resid_mid' comes after 'loops"):
        feature_graph(model(), later, BATCH, metric)
    assert hook_count(model()) == 0
