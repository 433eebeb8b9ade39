"""Circuits: scores are finite differences of single edges, masked runs are patches by hand, and a
circuit that is known is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuits.by_hand import (
    SHORT,
    added_by,
    check_masked_runs,
    difference,
    read_by_hand,
    recorded,
    stream_by_hand,
)
from circuits.compiled import ANSWER, EDGES, asked, two_hops
from family_toys import TOYS
from family_toys import full as full_of
from loopscope.interp.circuits.building import close, graph_of
from loopscope.interp.circuits.faithfulness import evaluate_circuit, shares_of
from loopscope.interp.circuits.masked import Replace
from loopscope.interp.circuits.names import Edge, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import Method, circuit_scores
from loopscope.interp.circuits.search import compare_scores, exact_scores, search_circuit
from loopscope.interp.circuits.selection import (
    NEUTRAL,
    prune_circuit,
    select_circuit,
    smallest_circuit,
)
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.common.pairs import Pair
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from toy import CentredStream, assert_close, full, hook_count, odd_one, projection, toy

METHODS: tuple[Method, ...] = ("eap", "eap-ig-inputs", "eap-ig-activations", "ig-edges")


SCORED = ["retrofit_llama", "huginn", "ouro", "hrm_text", "albert_groups", "smollm"]


@pytest.mark.parametrize("name", SCORED)
@torch.no_grad()
def test_a_score_is_the_finite_difference_of_one_edge(name: str) -> None:
    kind = TOYS[name]
    model = kind.make()
    clean, corrupted = full_of(kind, model, 1), full_of(kind, model, 2)
    scores = circuit_scores(model, clean, corrupted, difference, SHORT, method="eap")
    graph = graph_of(model, clean, SHORT, None)
    assert scores.edges == graph.edges
    there, base = (recorded(model, batch, graph) for batch in (clean, corrupted))
    last = model.schedule(SHORT)[-1].hook_names()[-1]
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))[:4]
    for number in [*order.tolist(), len(scores) - 1]:
        writer, reader = scores.edges[number]
        end, sides = end_of(reader), []
        at, new = added_by(graph, there, writer)
        change = new - added_by(graph, base, writer)[1]
        kind_of = end.component.partition(".")[0]
        site = f"{end.visit}.hook_resid_{'pre' if kind_of == 'attn' else 'mid'}"
        site = site if end.visit else last
        for share in (1e-4, -1e-4):
            stream = stream_by_hand(model, corrupted, base, {at: share * change}, site)
            sides.append(read_by_hand(model, corrupted, graph, base, reader, stream).mean())
        expected = (sides[0] - sides[1]) / 2e-4
        assert abs(scores.scores[number] - expected) <= 1e-6 * max(1, abs(expected))
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["hyperloop", "spiral", None])
def test_an_exact_score_is_a_patched_path(name: str | None) -> None:
    model: LoopedModel = odd_one(CentredStream) if name is None else TOYS[name].make()
    given = [full(seed) if name is None else full_of(TOYS[name], model, seed) for seed in (1, 2)]
    scores = circuit_scores(model, *given, difference, SHORT, method="eap", heads=False)
    ends = [(end_of(edge.writer), end_of(edge.reader)) for edge in scores.edges]
    mlps = [i for i, (a, b) in enumerate(ends) if (a.component, b.component) == ("mlp", "mlp")]
    chosen = [*mlps[::3], len(ends) - 1]
    exact = exact_scores(model, *given, scores.take(chosen, "some"), difference)
    for number, score in zip(chosen, exact.scores, strict=True):
        writer, reader = ends[number]
        into = Receiver("mlp", visit=reader.visit) if reader.visit else Receiver("readout")
        path = path_patch(
            model, *given, difference, Sender("mlp", visit=writer.visit), into, SHORT,
            direction="noise",
        )  # fmt: skip
        fall = float((path.clean - path.values).mean())
        assert abs(score - fall) <= 1e-9 * max(1.0, abs(fall))


@pytest.mark.parametrize(
    "name", ["toy", "toy_injected", "retrofit_olmo", "huginn", "ouro", "nanbeige"]
)
@torch.no_grad()
def test_a_masked_run_is_every_other_edge_patched_by_hand(name: str) -> None:
    check_masked_runs(name, by_position=False)


@pytest.mark.parametrize("method", METHODS[1:3])
def test_edges_into_the_readout_sum_to_the_difference(method: Method) -> None:
    found = circuit_scores(toy("learned"), full(1), full(2), projection(), SHORT, method=method)
    assert found.call.first_order_error is not None
    assert found.call.first_order_error < 1e-9


def two_hop_pair() -> tuple[LoopedModel, Batch, Batch, Callable[[Tensor], Tensor]]:
    """The compiled model, its questions and the same ones about other entities."""
    right, wrong = ([ANSWER + entity for entity in row] for row in ((1, 2, 0), (2, 0, 1)))
    return two_hops(), asked([0, 1, 2]), asked([1, 2, 0]), logit_diff(right, wrong)


def named(circuit: Circuit) -> set[tuple[str, str]]:
    return {tuple(edge) for edge in circuit.edges}


@pytest.mark.parametrize("method", METHODS)
def test_the_written_circuit_is_found_by_every_estimate(method: Method) -> None:
    model, clean, corrupted, metric = two_hop_pair()
    assert model(clean.tokens)[:, -1, ANSWER:].argmax(-1).tolist() == [1, 2, 0]
    scores = circuit_scores(model, clean, corrupted, metric, method=method)
    for rule in ("top", "greedy"):
        assert named(select_circuit(scores, len(EDGES), rule)) == EDGES
    found = smallest_circuit(model, clean, corrupted, scores, metric, 0.999)
    assert named(found) == EDGES
    said = evaluate_circuit(model, clean, corrupted, found, metric, minimality=True)
    assert_close(said.faithfulness, torch.ones(1, dtype=torch.float64))
    assert_close(said.completeness, torch.zeros(1, dtype=torch.float64))
    assert said.least_loss is not None
    assert_close(said.least_loss, torch.ones(1, dtype=torch.float64))
    frame = found.folded().set_index("component")
    assert frame.loc["blocks.0.attn.0", "loops"] == (0, 2)
    assert frame.loc["blocks.0.attn.1", "loops"] == (1,)


def test_the_written_circuit_is_found_by_exact_search() -> None:
    model, clean, corrupted, metric = two_hop_pair()
    scores = circuit_scores(model, clean, corrupted, metric)
    found = search_circuit(model, clean, corrupted, scores, metric, 0.01)
    assert named(found) == EDGES
    exact = exact_scores(model, clean, corrupted, scores, metric)
    assert {
        tuple(e) for e, s in zip(exact.edges, exact.scores, strict=True) if abs(s) > 1e-9
    } == EDGES
    agreed = compare_scores(scores, exact, (4,))
    assert agreed["overlap"].tolist() == [1.0]
    with pytest.raises(ValueError, match="two scorings of the same edges are needed"):
        compare_scores(found, exact)


def test_the_search_does_not_depend_on_how_many_edges_a_run_tries() -> None:
    model = toy("learned")
    pair = (model, full(1), full(2))
    scores = circuit_scores(*pair, projection(), 1, heads=False)
    given = (*pair, scores, projection(), 1.0)
    one, several = (search_circuit(*given, together=n) for n in (1, 5))
    assert one.edges == several.edges
    assert_close(torch.tensor(one.scores), torch.tensor(several.scores))
    assert 0 < len(one) < one.n_possible


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("how", NEUTRAL)
def test_pruning_changes_nothing(how: Replace, by_position: bool) -> None:
    model, clean, corrupted = toy("learned"), full(1), full(2)
    given = (model, clean, corrupted)
    scores = circuit_scores(*given, projection(), SHORT, method="eap", by_position=by_position)
    loose = select_circuit(scores, 60, "top", prune=False)
    tight = prune_circuit(loose)
    assert len(tight) < len(loose) == 60
    said = evaluate_circuit(*given, [loose, tight], projection(), replace=how)
    assert_close(said.values[0], said.values[1])


@pytest.mark.parametrize("how", ["corrupted", "mean", "zero", "resample"])
def test_the_curve_goes_from_nothing_to_the_whole_model(how: str) -> None:
    model, clean, corrupted = toy("learned"), full(1), full(2)
    scores = circuit_scores(model, clean, corrupted, projection(), SHORT, heads=False)
    circuits = [select_circuit(scores, n) for n in (0, 9, len(scores))]
    said = evaluate_circuit(model, clean, corrupted, circuits, projection(), replace=how)  # type: ignore[arg-type]
    assert_close(said.values[0], said.replaced)
    assert_close(said.values[-1], said.whole)
    frame = said.frame()
    assert frame["edge_share"].tolist() == [0.0, frame["edges"][1] / len(scores), 1.0]
    x, y = frame["edge_share"], frame["faithfulness"]
    area = sum(
        (b - a) * (s + t) / 2 for (a, b), (s, t) in zip(pairwise(x), pairwise(y), strict=True)
    )
    assert said.cpr == pytest.approx(area)
    assert frame["weight_share"].iloc[-1] == 1.0


@pytest.mark.shapes
@pytest.mark.parametrize("by_position", [False, True])
def test_shares_of_numbered_edges_are_those_of_their_circuits(by_position: bool) -> None:
    model, clean, corrupted = toy("learned"), full(1), full(2)
    given = model, clean, corrupted
    scores = circuit_scores(*given, projection(), SHORT, by_position=by_position)
    chosen = [range(0, len(scores), 2), [], [5, 3], range(len(scores))]
    circuits = [scores.take(each, "some") for each in chosen]
    said = evaluate_circuit(*given, circuits, projection())
    kept, left = shares_of(model, Pair(*given[1:]), scores, projection(), chosen, chosen[:3])
    assert_close(kept, said.faithfulness)
    assert_close(left, said.completeness[:3])
    assert float(kept[0]) != pytest.approx(float(kept[2]))


def test_a_saved_circuit_is_the_same(tmp_path: Path) -> None:
    scores = circuit_scores(toy(), full(1), full(2), "kl", SHORT, checkpoint="toy")
    scores.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == scores
    assert len(scores.frame()) == len(scores)
    assert scores.folded_edges()["edges"].sum() == len(scores)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no circuit"):
        Circuit.load(tmp_path / "other.json")


def test_what_cannot_be_a_circuit_is_refused() -> None:
    model, clean, corrupted = toy(), full(1), full(2)
    with pytest.raises(ValueError, match="method must be one of eap"):
        circuit_scores(model, clean, corrupted, projection(), method="acdc")  # type: ignore[arg-type]
    scores = circuit_scores(model, clean, corrupted, projection(), SHORT, method="eap")
    with pytest.raises(ValueError, match=re.escape(f"n_edges must be in 0..{len(scores)}")):
        select_circuit(scores, len(scores) + 1)
    with pytest.raises(ValueError, match="a node is 'embed', 'final'"):
        replace(scores, edges=(Edge("embed", "nowhere"),), scores=(1.0,))
    kind = TOYS["training_free_neox"]
    other = kind.make()
    with pytest.raises(ValueError, match="must have the site 'hook_resid_mid'"):
        circuit_scores(other, full_of(kind, other, 1), full_of(kind, other, 2), difference)
    ouro = TOYS["ouro"].make()
    given = full_of(TOYS["ouro"], ouro, 1), full_of(TOYS["ouro"], ouro, 2)
    with pytest.raises(ValueError, match=r"its heads cannot be nodes; pass heads=False"):
        circuit_scores(ouro, *given, difference, heads=True)


def test_tensors_are_close_by_their_largest_entry() -> None:
    logits = torch.tensor([0.0, 8.0, -3.0])
    assert close(logits + 1e-5, logits)
    assert not close(logits + 1e-2, logits)
    assert not close(logits + torch.nan, logits)


def test_steps_are_taken_one_by_one_where_rows_depend_on_each_other() -> None:
    model = odd_one(CentredStream)
    pair = (full(1), full(2), difference, SHORT)
    many = circuit_scores(model, *pair, method="eap-ig-activations", steps=2)
    halves = []
    for share in (0.25, 0.75):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loopscope.interp.circuits.scores._midpoints", lambda steps, s=share: [s])
            one = circuit_scores(model, *pair, method="eap-ig-activations", steps=1)
            halves.append(torch.tensor(one.scores))
    final = torch.tensor([edge.reader == "final" for edge in many.edges])
    found = torch.tensor(many.scores)[~final]
    assert_close(found, torch.stack(halves).mean(0)[~final])


def test_undefined_numbers_are_refused() -> None:
    model = toy()
    pair = (full(1), full(2))
    scores = circuit_scores(model, *pair, difference, SHORT, method="eap", heads=False)
    with pytest.raises(ValueError, match="scores must be finite"):
        replace(scores, scores=(float("nan"), *scores.scores[1:]))
    with pytest.raises(ValueError, match="threshold must be a number and at least 0"):
        search_circuit(model, *pair, scores, difference, float("nan"))
