"""Circuits by position: they sum to the circuit over all positions, single edges are finite
differences, masked runs are patches by hand, and a circuit that is known is found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from circuits.by_hand import SHORT, check_masked_runs, difference
from circuits.compiled import ANSWER, EDGES, PLACES, asked, two_hops
from family_toys import TOYS
from family_toys import full as full_of
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.masked import MAX_BYTES, MaskedRuns
from loopscope.interp.circuits.names import Edge, Positions, end_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import Method, circuit_scores
from loopscope.interp.circuits.search import exact_scores, search_circuit
from loopscope.interp.circuits.selection import prune_circuit, select_circuit, smallest_circuit
from loopscope.interp.common.metrics import logit_diff
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from toy import POS, assert_close, full, padded, projection, toy

METHODS: tuple[Method, ...] = ("eap", "eap-ig-inputs", "eap-ig-activations", "ig-edges")


def over_all(circuit: Circuit) -> dict[tuple[str, ...], float]:
    """The sum of the scores of each edge's positions."""
    found: dict[tuple[str, ...], float] = defaultdict(float)
    for edge, score in zip(circuit.edges, circuit.scores, strict=True):
        found[tuple(name.partition("@")[0] for name in edge)] += score
    return found


@pytest.mark.parametrize(
    ("name", "method"), [*(("toy", m) for m in METHODS), ("huginn", "eap"), ("ouro", "ig-edges")]
)
def test_scores_by_position_sum_to_the_scores_over_all_positions(name: str, method: Method) -> None:
    model: LoopedModel = toy("learned") if name == "toy" else TOYS[name].make()
    pair = (full(1), full(2)) if name == "toy" else [full_of(TOYS[name], model, n) for n in (1, 2)]
    given = (model, *pair, difference, SHORT)
    whole, apart = (
        circuit_scores(*given, method=method, steps=2, by_position=by) for by in (False, True)
    )
    sums = over_all(apart)
    expected = {tuple(edge): score for edge, score in zip(whole.edges, whole.scores, strict=True)}
    assert sums.keys() == expected.keys()
    for edge, score in expected.items():
        assert sums[edge] == pytest.approx(score, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", ["toy", "toy_injected", "huginn", "nanbeige"])
@torch.no_grad()
def test_a_masked_run_is_every_other_edge_patched_by_hand(name: str) -> None:
    check_masked_runs(name, by_position=True)


def masked_metric(
    model: LoopedModel, pair: tuple[Batch, Batch], mask: Callable[..., Tensor]
) -> Tensor:
    """The mean of the metric in a run under a mask that is made of all edges."""
    graph = graph_of(model, pair[0], SHORT, None, by_position=True)
    other = Written.of(model, pair[1], graph)
    runs = MaskedRuns.of(model, graph, pair[0], other, "corrupted", 0, MAX_BYTES)
    return difference(runs.logits(mask(graph.every.double())[None])[0]).mean()


@torch.no_grad()
def test_the_score_of_a_gate_is_a_finite_difference() -> None:
    model, pair = toy("learned"), (full(1), full(2))
    found = circuit_scores(
        model, *pair, difference, SHORT, method="ig-edges", steps=1, by_position=True
    )
    graph = graph_of(model, pair[0], SHORT, None, by_position=True)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:5]
    for number, row in zip(order.tolist(), graph.numbers(found.edges)[order], strict=True):

        def moved(every: Tensor, by: float, row: Tensor = row) -> Tensor:
            gates = every / 2
            gates[tuple(row)] += by
            return gates

        up, down = (
            masked_metric(model, pair, lambda every, by=by: moved(every, by))
            for by in (1e-4, -1e-4)
        )
        assert found.scores[number] == pytest.approx(float(up - down) / 2e-4, rel=1e-6, abs=1e-8)


def test_the_scores_of_all_gates_sum_to_the_difference() -> None:
    kind = TOYS["ouro"]
    model = kind.make()
    given = (model, *(full_of(kind, model, seed) for seed in (1, 2)), difference, 1)
    errors = [
        circuit_scores(*given, method="ig-edges", steps=steps).call.first_order_error or 0.0
        for steps in (3, 30)
    ]
    assert errors[1] < 1e-2
    assert errors[1] < errors[0] / 30


def test_what_reads_a_prefix_both_ways_reaches_later_positions() -> None:
    kind = TOYS["hrm_text_prefix"]
    model = kind.make()
    pair = [full_of(kind, model, seed) for seed in (1, 2)]
    scores = circuit_scores(
        model, *pair, difference, 1, method="eap", heads=False, by_position=True
    )
    few = [
        scores.take(
            torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))[
                :200
            ].tolist(),
            "at random",
        )
        for seed in (0, 1)
    ]
    for circuit in few:
        said = evaluate_circuit(model, *pair, [circuit, prune_circuit(circuit)], difference)
        assert_close(said.faithfulness[0], said.faithfulness[1])


def written() -> set[tuple[str, str]]:
    """The edges of the compiled circuit, each at its positions: the question's column (the last but
    one) looks up, and the blank's carries and looks up again.
    """
    ask, blank = PLACES - 2, PLACES - 1
    places = {"embed": ask, "loops.0": ask, "loops.1": blank, "loops.2": blank}
    found = set()
    for writer, reader in EDGES:
        at = next(place for name, place in places.items() if writer.startswith(name))
        found.add((f"{writer}@{at}", f"{reader}@{at}"))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_written_circuit_is_found_at_its_positions(method: Method) -> None:
    right, wrong = ([ANSWER + entity for entity in row] for row in ((1, 2, 0), (2, 0, 1)))
    model, metric = two_hops(), logit_diff(right, wrong)
    pair = (model, asked([0, 1, 2]), asked([1, 2, 0]))
    scores = circuit_scores(*pair, metric, method=method, by_position=True)
    for rule in ("top", "greedy"):
        assert {tuple(e) for e in select_circuit(scores, len(EDGES), rule).edges} == written()
    found = smallest_circuit(*pair, scores, metric, 0.999)
    assert {tuple(edge) for edge in found.edges} == written()
    said = evaluate_circuit(*pair, found, metric, minimality=True)
    assert said.least_loss is not None
    for share, value in ((said.faithfulness, 1), (said.completeness, 0), (said.least_loss, 1)):
        assert_close(share, torch.full_like(share, value))


def test_the_written_circuit_is_found_by_exact_search() -> None:
    right, wrong = ([ANSWER + entity for entity in row] for row in ((1, 2, 0), (2, 0, 1)))
    model, metric = two_hops(), logit_diff(right, wrong)
    pair = (model, asked([0, 1, 2]), asked([1, 2, 0]))
    scores = circuit_scores(*pair, metric, by_position=True, heads=True)
    given = select_circuit(scores, 80, "top", prune=False)
    exact = exact_scores(*pair, given, metric)
    assert {tuple(e) for e, s in zip(exact.edges, exact.scores, strict=True) if abs(s) > 1e-9} == (
        written()
    )
    assert {tuple(e) for e in search_circuit(*pair, given, metric, 0.01).edges} == written()


def test_edges_lead_only_to_readers_from_which_the_readout_can_be_reached() -> None:
    model = toy("learned")
    graph = graph_of(model, full(1), 1, None, by_position=True)
    last = graph.stages[-2:]
    for stage, readers in ((last[0], slice(0, 4)), (last[1], slice(0, 1))):
        spans = graph.every[stage.readers][readers].any(1)
        assert spans.sum(1).eq(1).all()
        assert spans[:, graph.positions.readout].all()  # type: ignore[union-attr]
    assert graph.every[last[0].moving].any(1).all()
    assert graph.every[-1].any(0).sum() == 1


def test_a_circuit_by_position_is_saved_and_folded(tmp_path: Path) -> None:
    scores = circuit_scores(toy(), full(1), full(2), "kl", SHORT, method="eap", by_position=True)
    assert scores.positions == Positions(POS, POS - 1, True)
    scores.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == scores
    frame = scores.unrolled()
    assert sorted(set(frame["position"])) == list(range(POS))
    assert not any("@" in name for name in scores.folded()["component"])
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = replace(
        scores,
        edges=tuple(scores.edges[n] for n in order),
        scores=tuple(scores.scores[n] for n in order),
    )
    assert mixed == scores


def test_keys_and_values_feed_later_positions() -> None:
    causal, free = Positions(4, 3, True), Positions(3, 2, False)
    assert end_of("loops.0.blocks.0.attn.1.q@2").feeds(causal) == ("loops.0.blocks.0.attn.1@2",)
    assert end_of("loops.0.blocks.0.attn.2-3.k@2").feeds(causal) == tuple(
        f"loops.0.blocks.0.attn.{head}@{at}" for head in (2, 3) for at in (2, 3)
    )
    assert len(end_of("loops.0.blocks.0.attn@1").feeds(free)) == 3
    assert end_of("loops.0.blocks.0.mlp@1").feeds(causal) == ("loops.0.blocks.0.mlp@1",)


def test_what_has_no_positions_in_common_is_refused() -> None:
    model = toy()
    with pytest.raises(
        ValueError, match="needs inputs of one length that are read at one position"
    ):
        circuit_scores(model, padded(1), padded(2), projection(), SHORT, by_position=True)
    found = circuit_scores(
        model, full(1), full(2), projection(), SHORT, method="eap", by_position=True
    )
    shorter = [Batch(b.tokens[:, 1:], b.mask[:, 1:], b.readout - 1) for b in (full(1), full(2))]
    with pytest.raises(ValueError, match="a circuit by position holds for inputs of one kind"):
        evaluate_circuit(model, *shorter, found, projection())
    with pytest.raises(ValueError, match="both ends of an edge must be at one of"):
        replace(found, edges=(Edge("embed@0", "final@1"),), scores=(1.0,))
    with pytest.raises(ValueError, match="both ends of an edge must be at no position"):
        replace(found, positions=None)
    plain = circuit_scores(model, full(1), full(2), projection(), SHORT, method="eap")
    with pytest.raises(ValueError, match="all circuits must be by the same positions"):
        evaluate_circuit(model, full(1), full(2), [found, plain], projection())
