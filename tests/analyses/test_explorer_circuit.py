"""The explorer's circuit between two questions: every number against the public call or a run by
hand, without a browser.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from dash import no_update

from explored import A_TEXT, B_TEXT, around
from looks.marks import hard_to_see
from loopscope.analyses.explorer import circuit as part_of_page
from loopscope.analyses.explorer import edges
from loopscope.analyses.explorer.callbacks import Explorer
from loopscope.analyses.explorer.circuit import CircuitPart, choose_edge
from loopscope.analyses.explorer.edges import patch_edge, score_edges
from loopscope.analyses.explorer.questions import Query, ask, ask_beside
from loopscope.analyses.explorer.sentences import edge_said, kept_said
from loopscope.analyses.explorer.view import circuit_figure, edge_mark
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.masked import MaskedRuns
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.search import exact_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.interp.common.metrics import logit_margin, margin
from loopscope.interp.drawing.circuit_places import spots
from loopscope.interp.drawing.circuits import MOST
from loopscope.models.core.base import LoopedModel
from toy import LOOPS, toy

SHORT = 2
PAIR = {"a": A_TEXT, "b": B_TEXT}
LAST = "loops.1.blocks.1.mlp@5 → final@5"


@pytest.fixture
def part() -> CircuitPart:
    return CircuitPart(Explorer(around(toy()), LOOPS, LOOPS))


@pytest.fixture
def pair(part: CircuitPart) -> tuple[Query, Query]:
    a, b = part.explorer.pair(PAIR)
    return a, b


def model_of(part: CircuitPart) -> LoopedModel:
    return part.explorer.subject.model


def asked(part: CircuitPart, count: int = 30) -> dict[str, Any]:
    """The pair that the opened part shows."""
    shown: dict[str, Any] = part.show_circuit(True, PAIR, SHORT, count)[1]
    return shown


def test_the_scores_are_those_of_the_public_call_and_edges_are_taken_greedily(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    a, b = pair
    metric = logit_margin(torch.tensor([a.answer_id]))
    public = circuit_scores(model_of(part), a.batch, b.batch, metric, SHORT, by_position=True)
    found = score_edges(model_of(part), a, b, SHORT)
    assert found.circuit.edges == public.edges
    assert found.circuit.scores == pytest.approx(public.scores, abs=1e-12)
    for count in (1, 7, 40):
        chosen = select_circuit(public, count, prune=False)
        assert found.first(count).edges == chosen.edges


def test_the_effect_of_an_edge_is_the_exact_score_and_a_run_by_hand(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    (a, b), model = pair, model_of(part)
    scored = score_edges(model, a, b, SHORT)
    few = scored.circuit.take([0, 40, 200, len(scored.circuit) - 1], "few")
    exact = exact_scores(model, a.batch, b.batch, few, a.metric)
    for number, fall in enumerate(exact.scores):
        before, after = patch_edge(model, a, b, few.take([number], "one"))
        assert before.margin - after.margin == pytest.approx(fall, abs=1e-9)
    assert max(map(abs, exact.scores)) > 1e-3
    name = "loops.1.blocks.1.hook_mlp_out"
    _, cache = model.run_with_cache(
        b.batch.tokens, n_loops=SHORT, mask=b.batch.mask, names_filter=name
    )

    def put(value: torch.Tensor, hook: object) -> torch.Tensor:
        value = value.clone()
        value[:, a.readout] = cache[name][:, a.readout]
        return value

    logits = model.run_with_hooks(
        a.batch.tokens, n_loops=SHORT, mask=a.batch.mask, fwd_hooks=[(name, put)]
    )[:, a.readout].detach()
    after = patch_edge(model, a, b, scored.one(LAST))[1]
    assert after.margin == pytest.approx(
        float(margin(logits, torch.tensor([a.answer_id]))), abs=1e-9
    )
    assert [token for token, _ in after.top] == model.to_str_tokens(logits[0].topk(5).indices)
    assert not model.any_hook()


@pytest.mark.shapes
def test_what_is_said_of_an_edge_has_both_effects_and_both_answers(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    shown = asked(part)
    said, wrong, look, mark, took = part.show_edge(LAST.replace("→", "->"), shown, 30)
    assert (wrong, look) == ("", "")
    assert took.startswith("edge ")
    one = part.scored(*pair, SHORT).one(LAST)
    before, after = patch_edge(model_of(part), *pair, one)
    exact = exact_scores(model_of(part), *(each.batch for each in pair), one, pair[0].metric)
    name, sentence, table = said.children
    assert name.children[0].children == LAST
    assert name.children[1].to_plotly_json()["props"]["data-copy"] == LAST
    numbers = re.findall(r"-?\d+\.\d+", sentence.children)
    assert numbers == [
        f"{before.margin:.2f}", f"{after.margin:.2f}", f"{exact.scores[0]:.3f}",
        f"{one.scores[0]:.3f}", f"{before.top[0][1]:.3f}", f"{after.top[0][1]:.3f}",
    ]  # fmt: skip
    assert f"says {before.top[0][0]} (p" in sentence.children
    assert f"and {after.top[0][0]} (p" in sentence.children
    assert f"{after.margin:.2f} logits" in str(table)
    assert "shapes" in str(mark.to_plotly_json())


def test_the_circuit_alone_keeps_what_the_public_call_says(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    a, b = pair
    scores = circuit_scores(model_of(part), a.batch, b.batch, a.metric, SHORT, by_position=True)
    chosen = select_circuit(scores, 25, prune=False)
    found = evaluate_circuit(model_of(part), a.batch, b.batch, chosen, a.metric)
    said, took = part.show_kept(asked(part), 25)
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d+", said)]
    wanted = [found.values, found.faithfulness, found.replaced, found.whole, found.completeness]
    assert numbers == pytest.approx([float(each) for each in wanted], abs=0.0051)
    assert took.startswith("circuit alone ")


def test_scores_are_computed_once_for_a_question_and_only_when_the_part_is_open(
    part: CircuitPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        assert part.explorer.lock.locked()
        calls.append(args[3])
        return score_edges(*args)

    monkeypatch.setattr(part_of_page, "score_edges", counted)
    assert part.show_circuit(False, PAIR, SHORT, 30) == (*[no_update] * 6, "")
    assert part.show_circuit(True, None, SHORT, 30) == (*[no_update] * 6, "")
    assert calls == []
    shown = asked(part)
    assert shown == {**PAIR, "read": None, "n_loops": SHORT}
    assert part.show_circuit(True, PAIR, SHORT, 60, None, None, shown)[1] is no_update
    part.show_kept(shown, 60)
    part.show_edge(LAST, shown, 60)
    assert calls == [SHORT]
    part.show_circuit(True, PAIR, 1, 3)
    assert calls == [SHORT, 1]


def test_the_scores_of_the_oldest_question_are_forgotten(
    part: CircuitPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part_of_page, "REMEMBERED", 2)
    a, b = part.explorer.pair(PAIR)
    first = part.scored(a, b, 1)
    part.scored(b, a, 1)
    assert part.scored(a, b, 1) is first
    part.scored(a, b, 2)
    assert list(part.known) == [(b.text, a.text, 5, 1), (a.text, b.text, 5, 2)]


def test_what_cannot_be_had_is_one_sentence_and_takes_nothing_away(part: CircuitPart) -> None:
    shown = asked(part)
    for count, why in ((0, ", got 0"), (10**6, ", got 1000000"), (None, "")):
        kept, of, wrong, caption, options, look, _ = part.show_circuit(True, PAIR, SHORT, count)
        assert re.fullmatch(rf"the circuit has between 1 and \d+ edges{why}\.", wrong)
        assert (kept, of, caption, options, look) == (
            no_update, shown, no_update, no_update, "stale",
        )  # fmt: skip
        assert part.show_kept(shown, count)[1] == ""
    same = {"a": A_TEXT, "b": A_TEXT}
    assert "every score is 0; type another B" in part.show_circuit(True, same, SHORT, 30)[2]
    said, wrong, look, _, _ = part.show_edge("embed@1 -> nowhere@1", shown, 30)
    assert (said, look) == (no_update, "stale")
    assert re.search(r"such as \S+ → final@5, but 'embed@1 -> nowhere@1' is none of the", wrong)
    assert wrong.endswith(" edges between A and B after 2 iterations.")
    once = part.show_circuit(True, PAIR, 1, 30)[1]
    assert part.show_edge(LAST, once, 30)[1].endswith(" after 1 iteration.")
    assert part.show_edge("  ", shown, 30)[:3] == ("", "", "")
    assert part.show_edge(LAST, None, 30)[::2] == (no_update, "stale", "")
    assert part.show_kept(None, 30)[0] is no_update


def test_a_family_without_a_circuit_says_why(
    part: CircuitPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(part)
    sites = model.edge_sites()
    monkeypatch.setattr(model, "edge_sites", lambda: (["hook_other"], *sites[1:]))
    refused = part.show_circuit(True, PAIR, SHORT, 30)
    assert refused[2] == "a circuit begins at 'hook_embed', which RecurrentDepth lacks."
    assert part.known == {}


def test_positions_and_heads_are_told_apart_where_that_is_quick(
    part: CircuitPart, pair: tuple[Query, Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(part)
    whole = score_edges(model, *pair, SHORT).circuit
    assert (whole.positions is not None, "attn.3.q" in str(whole.edges)) == (True, True)
    monkeypatch.setattr(edges, "QUICK_EDGES", 700)
    heads = score_edges(model, *pair, SHORT).circuit
    assert (heads.positions, "attn.3.q" in str(heads.edges)) == (None, True)
    monkeypatch.setattr(edges, "QUICK_EDGES", len(heads) - 1)
    plain = score_edges(model, *pair, SHORT).circuit
    assert (plain.positions, "attn.3.q" in str(plain.edges)) == (None, False)


def test_a_drawn_line_names_its_edge_and_the_chosen_one_is_marked(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    circuit = part.scored(*pair, SHORT).first(200)
    plain = circuit_figure(circuit, pair[0])
    drawn = go.Figure(plain)
    assert hard_to_see(drawn) == []
    lines = [trace for trace in plain["data"] if trace["mode"] == "lines" and "customdata" in trace]
    named = [cell for trace in lines for cell in trace["customdata"] if cell is not None]
    sizes = sorted((abs(score) for score in circuit.scores), reverse=True)[:MOST]
    assert {name for name, _ in named} <= {edge.text for edge in circuit.edges}
    assert sorted({abs(score) for _, score in named}, reverse=True) == pytest.approx(sizes)
    point = {"customdata": list(lines[0]["customdata"][0])}
    assert choose_edge({"points": [point]}) == (lines[0]["customdata"][0][0], None)
    assert choose_edge({"points": [{"customdata": "embed@1<br>score 3"}]}) == (no_update, None)
    assert choose_edge(None) == (no_update, None)
    (mark,) = edge_mark(circuit, Edge.from_text(LAST))
    places = [tuple(map(float, place.split(","))) for place in mark["path"][1:].split(" L")]
    at = spots(circuit)
    for (x, y), node in ((places[0], "loops.1.blocks.1.mlp@5"), (places[-1], "final@5")):
        assert (x, y) == pytest.approx((at[node].x, at[node].y), abs=1e-4)
    assert edge_mark(circuit, Edge("embed@0", "final@0")) == []
    by_size = sorted(range(200), key=lambda number: -abs(circuit.scores[number]))
    marks = [edge_mark(circuit, circuit.edges[number]) for number in by_size]
    assert list(map(len, marks)) == [1] * MOST + [0] * 50
    drawn.update_layout(shapes=[mark])
    shown = part.show_circuit(True, PAIR, SHORT, 200, None, LAST)
    assert shown[0]["layout"]["shapes"] == [mark]
    assert len(shown[4]) == MOST
    arrow = LAST.replace("→", "->")
    assert part.show_circuit(True, PAIR, SHORT, 200, None, arrow)[0]["layout"]["shapes"] == [mark]
    assert part.show_circuit(True, PAIR, SHORT, 200, None, "embed")[0]["layout"]["shapes"] == []


def test_an_edge_without_a_line_in_the_picture_is_patched_and_said_to_have_none(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    shown, scored = asked(part), part.scored(*pair, SHORT)
    far, unseen = scored.circuit.edges[scored.order[40]].text, "has no line for it."
    for count, sentence in ((30, f"The picture of the first 30 edges {unseen}"), (41, "")):
        said, _, _, mark, _ = part.show_edge(far, shown, count)
        assert said.children[1].children.partition(" after. ")[2] == sentence
        assert bool(mark.to_plotly_json()["operations"][0]["params"]["value"]) == (count == 41)
    alone = part.show_edge(far, shown, 1)[0].children[1].children
    assert alone.endswith(f" The picture of the first edge {unseen}")


def test_a_wrong_number_of_edges_takes_no_edge_away(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    shown = asked(part)
    whole = part.show_edge(LAST, shown, 30)[0].children[1].children
    for count in (None, 0, 10**6):
        assert part.show_circuit(True, PAIR, SHORT, count)[1] == shown
        assert part.show_circuit(True, PAIR, SHORT, count, before=shown)[1] is no_update
        said, wrong, look, mark, _ = part.show_edge(LAST, shown, count)
        assert (said.children[1].children, wrong, look) == (whole, "", "")
        assert mark.to_plotly_json()["operations"][0]["params"]["value"] == []
        assert part.show_kept(shown, count)[0] is no_update


def test_the_caption_says_how_the_edges_were_taken(
    part: CircuitPart, pair: tuple[Query, Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = part.scored(*pair, SHORT)
    total = len(scored.circuit)
    largest = sorted(range(total), key=lambda number: -abs(scored.circuit.scores[number]))[:100]
    assert set(scored.order[:100]) != set(largest), "greedy edges are not those of largest score"
    taken = f" of {total} edges by position, taken greedily from the answer backwards, by "
    for count, first in (
        (1, "The first"),
        (100, "The first 100"),
        (200, "The first 200 (the 150 strongest of them are drawn)"),
    ):
        said = part.show_circuit(True, PAIR, SHORT, count)[3]
        assert said.startswith(first + taken)
        assert said.endswith(" A dotted line is what a head moves between positions.")
    assert part.show_kept(asked(part), 1)[0].startswith("With this edge alone, and all others as")
    monkeypatch.setattr(edges, "QUICK_EDGES", 700)
    part.known.clear()
    said = part.show_circuit(True, PAIR, SHORT, 100)[3]
    assert "edges over all positions, taken greedily" in said
    assert "dotted" not in said
    refused = part.show_edge(LAST, asked(part), 30)[1]
    why = r"after 2 iterations; they are over all positions, because .* at most 700 edges\.$"
    assert re.search(why, refused)


def test_no_number_is_a_negative_zero(part: CircuitPart, pair: tuple[Query, Query]) -> None:
    one = part.scored(*pair, SHORT).one(LAST)
    before = replace(patch_edge(model_of(part), *pair, one)[0], margin=-0.0004)
    after = replace(before, margin=-0.0001)
    tiny = replace(one, scores=(-0.0002,))
    said = edge_said(tiny, before, after, pair[0])
    assert "from 0.00 to 0.00 logits" in said
    assert "edge is 0.000 logits, its score estimates 0.000." in said
    found = evaluate_circuit(model_of(part), *(each.batch for each in pair), one, pair[0].metric)
    kept = kept_said(replace(found, replaced=found.replaced * 0 - 1e-4))
    assert "-0.00" not in kept
    assert "from 0.00 (no edge" in kept


def test_one_patch_runs_the_model_itself_once(
    part: CircuitPart, pair: tuple[Query, Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, rows = part.scored(*pair, SHORT).one(LAST), []
    run = MaskedRuns._run

    def counted(runs: MaskedRuns, masks: torch.Tensor) -> torch.Tensor:
        rows.append(len(masks))
        return run(runs, masks)

    monkeypatch.setattr(MaskedRuns, "_run", counted)
    patch_edge(model_of(part), *pair, one)
    assert rows == [2], "every edge, and all but the one"


def test_a_stream_that_edges_do_not_make_is_refused(
    part: CircuitPart, pair: tuple[Query, Query]
) -> None:
    model, one = model_of(part), part.scored(*pair, SHORT).one(LAST)
    with (
        model.hooks([("loops.0.blocks.0.hook_resid_post", lambda value, hook: value * 2)]),
        pytest.raises(ValueError, match=r"components. outputs must sum to the residual stream"),
    ):
        patch_edge(model, *pair, one)


def test_an_edge_is_read_as_it_is_written() -> None:
    edge = Edge("embed@2", "loops.0.blocks.1.attn.3.q@2")
    assert Edge.from_text(edge.text) == edge
    assert Edge.from_text(f" {edge.writer}->{edge.reader} ") == edge
    for text in ("embed", "embed →", "-> final", "embed → final → final", ""):
        with pytest.raises(ValueError, match=f"two names with an arrow .* got {text!r}"):
            Edge.from_text(text)


def test_the_column_at_which_the_answer_is_read_is_the_circuits(part: CircuitPart) -> None:
    shown = part.show_circuit(True, PAIR, SHORT, 10, 2)
    assert shown[1]["read"] == 2
    assert all(option.value.endswith("@2") for option in shown[4] if "final" in option.value)
    a = ask(part.explorer.subject, A_TEXT, LOOPS, 2)
    b = ask_beside(part.explorer.subject, B_TEXT, a, LOOPS, 2)
    assert part.scored(a, b, SHORT).circuit.positions.readout == 2  # type: ignore[union-attr]
