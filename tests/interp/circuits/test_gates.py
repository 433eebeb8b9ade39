"""Scores by gates and masked runs: how often the model runs, and how much is held at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from circuits.by_hand import SHORT, difference
from family_toys import TOYS
from family_toys import full as full_of
from loopscope.interp.circuits.building import graph_of
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.gradients import Written
from loopscope.interp.circuits.graph import Graph
from loopscope.interp.circuits.masked import MaskedRuns
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.scores import Method, circuit_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import State
from toy import CentredStream, assert_close, full, odd_one, projection, toy

Given = tuple[LoopedModel, Batch, Batch]


def given_of(name: str) -> Given:
    if name == "toy":
        return toy("learned"), full(1), full(2)
    model = TOYS[name].make()
    return model, full_of(TOYS[name], model, 1), full_of(TOYS[name], model, 2)


def masked(given: Given, n_loops: int, max_bytes: int, heads: bool | None = None) -> MaskedRuns:
    model, clean, corrupted = given
    graph = graph_of(model, clean, n_loops, heads)
    other = Written.of(model, corrupted, graph)
    return MaskedRuns.of(model, graph, clean, other, "corrupted", 0, max_bytes)


def kept(runs: MaskedRuns) -> int:
    """The bytes that the gradient of a run with half open gates keeps besides the weights."""
    weights = {value.untyped_storage().data_ptr() for value in runs.model.parameters()}
    gates = (0.5 * runs.graph.every.to(runs.replacement.outputs)).requires_grad_()
    seen: dict[int, tuple[int, Tensor]] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes(), value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        runs.logits(gates[None])
    return sum(size for place, (size, _) in seen.items() if place not in weights)


def share_of_all(logits: Tensor) -> Tensor:
    """A metric in which every row depends on all rows."""
    chosen = logits[:, 1]
    return chosen / (1 + chosen.square().sum())


@pytest.mark.parametrize("metric", [difference, share_of_all])
@pytest.mark.parametrize(("name", "by_position"), [("toy", True), ("ouro", False)])
def test_scores_by_gates_do_not_depend_on_how_many_examples_run_at_once(
    name: str, by_position: bool, metric: Callable[[Tensor], Tensor]
) -> None:
    found = [
        circuit_scores(
            *given_of(name), metric, SHORT, method="ig-edges", steps=2, by_position=by_position,
            max_bytes=limit,
        )
        for limit in (1, 1 << 29)
    ]  # fmt: skip
    assert found[0].edges == found[1].edges
    assert_close(*(torch.tensor(each.scores, dtype=torch.float64) for each in found))


REFUSED = {"training_free_neox", "inkling2_loop", "melt", "melt_raw", "nanbeige_mhc"}


@pytest.mark.parametrize("name", ["toy", *sorted(TOYS.keys() - REFUSED)])
def test_the_gradient_keeps_no_more_than_was_allowed(name: str) -> None:
    given = given_of(name)
    whole = kept(masked(given, 1, 1 << 40))
    limit = int(0.9 * whole)
    parts = masked(given, 1, limit).by_examples()
    assert torch.equal(torch.cat([part.batch.tokens for part in parts]), given[1].tokens)
    assert len(parts) > 1
    assert max(map(kept, parts)) <= limit < whole


def test_examples_run_together_as_far_as_they_fit_besides_the_weights() -> None:
    given = given_of("ouro")
    one = kept(masked(given, 1, 1).by_examples()[0])
    for limit, sizes in ((3 * one, [3]), (3 * one - 1, [2, 1]), (2 * one - 1, [1, 1, 1])):
        parts = masked(given, 1, limit).by_examples()
        assert [len(part.batch) for part in parts] == sizes


def test_what_the_gradient_of_a_plain_sum_keeps_grows_with_the_iterations() -> None:
    sizes = [kept(masked(given_of("toy"), n_loops, 1 << 40)) for n_loops in (4, 8)]
    assert sizes[0] < sizes[1] < 2.1 * sizes[0]


def test_examples_that_depend_on_each_other_stay_together() -> None:
    given = odd_one(CentredStream), full(1), full(2)
    runs = masked(given, SHORT, 1, heads=False)
    assert [len(part.batch) for part in runs.by_examples()] == [len(full(1))]


@pytest.mark.parametrize("steps", [1, 3])
def test_each_input_runs_once_before_the_gates_do(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, advance = toy("learned"), [], LoopedModel.advance

    def counted(self: LoopedModel, state: State, *args: Any, **options: Any) -> Any:
        rows.append(len(state.resid))
        return advance(self, state, *args, **options)

    monkeypatch.setattr(LoopedModel, "advance", counted)
    pair = full(1), full(2)
    circuit_scores(model, *pair, difference, SHORT, method="ig-edges", steps=steps)
    whole = [count for count in rows if count == len(pair[0])]  # heads are told apart in one row
    assert len(whole) == 2 + 1 + steps  # the two inputs, all edges kept, the steps


def test_masks_of_circuits_are_made_when_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pair = toy("learned"), (full(1), full(2))
    scores = circuit_scores(model, *pair, projection(), SHORT, method="eap")
    circuits = [select_circuit(scores, size) for size in range(20, 80, 10)]
    expected = evaluate_circuit(model, *pair, circuits, projection())
    alive: list[weakref.ref[Tensor]] = []
    most, marked, run = [], Graph.marked, MaskedRuns._run

    def watched(self: Graph, numbers: Tensor) -> Tensor:
        made = marked(self, numbers)
        alive.append(weakref.ref(made))
        return made

    def counting(self: MaskedRuns, masks: Tensor) -> Tensor:
        most.append((len(masks), sum(each() is not None for each in alive)))
        return run(self, masks)

    monkeypatch.setattr(Graph, "marked", watched)
    monkeypatch.setattr(MaskedRuns, "_run", counting)
    found = evaluate_circuit(model, *pair, circuits, projection(), max_bytes=1)
    assert_close(found.values, expected.values)
    assert len(alive) == len(circuits)
    assert len(most) == 2 + 2 * len(circuits)  # the ends, and each circuit with what is left
    assert max(most) == (1, 1)


def test_an_unknown_edge_of_the_last_circuit_is_refused_before_any_circuit_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, pair = toy("learned"), (full(1), full(2))
    scores = circuit_scores(model, *pair, projection(), SHORT, method="eap")
    circuit = select_circuit(scores, 20)
    edges = (*circuit.edges[:-1], Edge("loops.1.blocks.0.mlp", "loops.0.blocks.0.mlp"))
    monkeypatch.setattr(MaskedRuns, "_run", lambda self, masks: pytest.fail("a circuit was run"))
    with pytest.raises(ValueError, match=r"but loops\.1\.\S+ -> loops\.0\.\S+ is none"):
        evaluate_circuit(model, *pair, [circuit, replace(circuit, edges=edges)], projection())


@pytest.mark.parametrize(
    ("name", "method"),
    [*(("toy", method) for method in get_args(Method)), ("ouro", "ig-edges")],
)
def test_a_stream_with_another_writer_is_refused_by_every_method(name: str, method: Method) -> None:
    model, *pair = given_of(name)
    site = "loops.0.blocks.0.hook_resid_post"
    with (
        model.hooks([(site, lambda value, hook: value * 2)]),
        pytest.raises(ValueError, match="something else writes to the residual stream"),
    ):
        circuit_scores(model, *pair, difference, SHORT, method=method)
