"""What cannot be a circuit, a measurement or a file of one is refused in a sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from circuits.by_hand import SHORT, difference
from family_toys import TOYS
from family_toys import full as full_of
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.record import Circuit, CircuitCall
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.search import compare_scores, exact_scores
from loopscope.interp.circuits.selection import select_circuit, smallest_circuit
from loopscope.interp.common.inputs import begin_batch
from loopscope.interp.drawing.circuit_page import circuit_page
from loopscope.models.basis.tokens import Batch
from toy import assert_close, full, hook_count, projection, random_tokens, toy


@pytest.fixture(scope="module")
def scores() -> Circuit:
    """All edges of a toy without heads."""
    given = (toy("learned"), full(1), full(2), projection(), SHORT)
    return circuit_scores(*given, method="eap", heads=False, checkpoint="a toy")


@pytest.mark.parametrize("name", ["inkling2_loop", "melt", "nanbeige_mhc"])
def test_components_that_read_more_than_the_stream_have_no_circuit(name: str) -> None:
    model = TOYS[name].make()
    given = [full_of(TOYS[name], model, seed) for seed in (1, 2)]
    with pytest.raises(ValueError, match="also reads earlier additions from elsewhere"):
        circuit_scores(model, *given, difference, SHORT, method="eap", heads=False)
    assert hook_count(model) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_runs_in_few_digits_are_measured(dtype: torch.dtype) -> None:
    model = toy("learned").to(dtype)
    both = [full(1).repeat(9), full(2).repeat(9)]
    found = circuit_scores(model, *both, difference, SHORT, method="eap", heads=False)
    said = evaluate_circuit(model, *both, found, difference)
    assert_close(said.faithfulness, torch.ones_like(said.faithfulness))


def test_streams_that_an_iteration_adds_to_are_measured_under_autocast() -> None:
    model, both = toy("learned", injection=True).float(), [full(1), full(2)]
    found = circuit_scores(model, *both, difference, SHORT, method="eap", heads=False)
    with torch.autocast("cpu", torch.bfloat16):
        said = evaluate_circuit(model, *both, found, difference)
    assert_close(said.faithfulness, torch.ones_like(said.faithfulness))


def test_inputs_that_do_not_differ_have_no_share(scores: Circuit) -> None:
    with pytest.raises(ValueError, match="faithfulness is a share of the metric's difference"):
        evaluate_circuit(toy("learned"), full(1), full(1), scores, projection())
    with pytest.raises(ValueError, match="faithfulness is a share of the metric's difference"):
        smallest_circuit(toy("learned"), full(1), full(1), scores, projection())


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_a_circuit_by_mean_or_zero_is_as_faithful_as_was_wanted(how: str, scores: Circuit) -> None:
    given = (toy("learned"), full(1), full(2))
    found = smallest_circuit(*given, scores, projection(), 0.8, replace=how)  # type: ignore[arg-type]
    said = evaluate_circuit(*given, found, projection(), replace=how)  # type: ignore[arg-type]
    assert float(said.faithfulness[0]) >= 0.8
    assert len(found) == int(found.call.selection.split(",")[0].split()[1])


@torch.no_grad()
def test_the_mean_at_a_column_of_padding_is_that_of_the_rows_read_there(scores: Circuit) -> None:
    model, mask = toy("learned"), (torch.arange(7) < 4).long().expand(3, 7)
    same, other = (
        Batch(tokens * mask, mask, torch.full((3,), 4))
        for tokens in (random_tokens(1)[:1].repeat(3, 1), random_tokens(2))
    )
    said = evaluate_circuit(model, other, same, scores, projection(), replace="mean")
    end = model.advance(begin_batch(model, same, SHORT))
    assert_close(said.replaced, projection()(model.readout(end, same.readout)))


def test_a_record_of_numpys_numbers_can_be_saved(scores: Circuit, tmp_path: Path) -> None:
    settings = {
        "steps": np.int64(5),
        "threshold": np.float32(0.5),
        "direction": "noise",
        "weights": torch.tensor([1.0, 2.0, 0.5]),
        "layers": (np.int64(1), [np.bool_(True), None]),
        "grid": np.arange(4).reshape(2, 2),
    }
    call = replace(scores.call, settings=settings, checkpoint=tmp_path)
    record = replace(scores, call=call)
    assert record.call.settings == {
        "steps": 5,
        "threshold": 0.5,
        "direction": "noise",
        "weights": [1.0, 2.0, 0.5],
        "layers": [1, [True, None]],
        "grid": [[0, 1], [2, 3]],
    }
    record.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == record


@pytest.mark.parametrize("wrong", [{1, 2}, [1, Path("here")], 1j, np.array([None, object()])])
def test_a_setting_that_no_file_can_hold_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"setting must be text, a number, .*, got steps="):
        CircuitCall("exact", "margin", settings={"steps": wrong})


def test_a_word_is_no_metric(scores: Circuit) -> None:
    given = (toy("learned"), full(1), full(2))
    with pytest.raises(ValueError, match="or the word 'kl'; got 'margin'"):
        circuit_scores(*given, "margin", SHORT)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="or the word 'kl'; got 'margin'"):
        evaluate_circuit(*given, scores, "margin")  # type: ignore[arg-type]


def test_the_checkpoints_name_and_the_order_of_edges_do_not_get_lost(scores: Circuit) -> None:
    few = select_circuit(scores, 4, "top", prune=False)
    exact = exact_scores(toy("learned"), full(1), full(2), few, projection())
    assert exact.call.checkpoint == "a toy"
    turned = replace(few, edges=few.edges[::-1], scores=few.scores[::-1])
    assert compare_scores(turned, exact).equals(compare_scores(few, exact))


def test_scorings_are_compared_by_at_least_one_edge(scores: Circuit) -> None:
    with pytest.raises(ValueError, match=r"a size must be at least 1, got 0"):
        compare_scores(scores, scores, (0, 3))
    none = scores.take([], "none")
    with pytest.raises(ValueError, match="of 0 edges"):
        compare_scores(none, none)
    with pytest.raises(ValueError, match="at least one edge is needed"):
        exact_scores(toy("learned"), full(1), full(2), none, projection())


@pytest.mark.parametrize(
    "wrong",
    [
        {"edges": [["embed", "final"]]},
        {"edges": [["embed", "final", "high"]]},
        {"positions": [3]},
        {"call": {"method": "eap"}},
    ],
)
def test_a_file_with_a_wrong_field_is_refused(
    wrong: dict[str, Any], scores: Circuit, tmp_path: Path
) -> None:
    path = tmp_path / "circuit.json"
    scores.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    with pytest.raises(ValueError, match="lacks a field, or one is not what"):
        Circuit.load(path)


def test_a_frozen_visit_is_refused_by_what_it_is() -> None:
    model = toy("learned")
    model._schedules.made[SHORT] = [
        replace(visit, frozen="attn" if visit.index else "") for visit in model.schedule(SHORT)
    ]
    with pytest.raises(ValueError, match=r"loops\.0\.blocks\.1 is frozen"):
        circuit_scores(model, full(1), full(2), projection(), SHORT)


def test_gates_have_no_base_run() -> None:
    given = (toy("learned"), full(1), full(2), projection(), SHORT)
    with pytest.raises(ValueError, match="has no base run, got direction='noise'"):
        circuit_scores(*given, method="ig-edges", direction="noise")


def test_a_circuit_that_is_not_pruned_is_drawn(scores: Circuit) -> None:
    found = circuit_scores(
        toy("learned"), full(1), full(2), projection(), SHORT, method="eap", by_position=True
    )
    page = circuit_page(select_circuit(found, 10, "top", prune=False), "not pruned")
    assert page.count("<script") >= 1
