"""Ranks over effective depth: against one run per question, and what the shipped checkpoint
shows.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from golden_cases import GOLDEN
from loopscope.analyses.common.inputs_of import open_inputs
from loopscope.analyses.figures.circuit import ranks
from loopscope.analyses.figures.circuit.ranks import RanksConfig
from loopscope.interp.drawing.labels import label
from loopscope.models.core.base import LoopedModel

HOPS, LOOPS, QUESTIONS = 5, 3, 4


def slow_rank(model: LoopedModel, text: str, name: str, column: int, word: str) -> int:
    """Rank, 0 for the top, of a word where one block of one run ends."""
    cache = model.run_with_cache(
        model.to_tokens(text), n_loops=LOOPS, names_filter=f"{name}.hook_resid_post"
    )[1]
    logits = model.unembed(model.normalize(cache[f"{name}.hook_resid_post"]))[0, column].detach()
    return sum(float(logit) > float(logits[model.to_single_token(word)]) for logit in logits)


@pytest.fixture(scope="module")
def full() -> ranks.Ranks:
    return ranks.run(RanksConfig(n_loops=8))


@pytest.mark.parametrize("at", ["own", "readout"])
def test_each_rank_is_that_of_a_run_of_its_own(at: str) -> None:
    config = RanksConfig(hops=HOPS, n_loops=LOOPS, per_hop=QUESTIONS, at=at)  # type: ignore[arg-type]
    record, asked = ranks.run(config), open_inputs(config)
    model, graph, group = asked.subject.model, asked.subject.graph, asked.group(HOPS)
    assert graph is not None
    assert record.texts == group.texts
    assert record.names == tuple(visit.name for visit in model.schedule(LOOPS))
    assert record.targets == ("hop 1", "hop 2", "hop 3", "hop 4", "answer", "control")
    own = at == "own"
    assert record.at == (
        *(f"relation {k}" if own else "readout" for k in (1, 2, 3, 4)),
        "readout",
        "readout",
    )
    for visit in (0, 3, 5):
        for target in (1, 4):
            column = target + 1 if own else HOPS
            found = [
                slow_rank(model, text, record.names[visit], column, graph.walk(text)[target + 1])
                for text in group.texts
            ]
            expected = torch.tensor(found, dtype=torch.float64)
            assert record.mean[visit, target] == pytest.approx(
                float((1 + expected).prod() ** (1 / QUESTIONS)) - 1, rel=1e-9
            )
            assert record.low[visit, target] == pytest.approx(
                float(expected.quantile(0.25)), rel=1e-9
            )
            assert record.high[visit, target] == pytest.approx(
                float(expected.quantile(0.75)), rel=1e-9
            )
            assert record.top[visit, target] == found.count(0) / QUESTIONS


def test_one_hop_comes_to_the_top_with_every_block(full: ranks.Ranks) -> None:
    assert full.hops == 6
    assert full.arrivals() == [1, 2, 3, 4, 5, 6, None]
    assert full.mean[:, -1].min() > 10
    assert full.frame()["loop"].tolist()[4 * 7 : 6 * 7] == [2] * 14
    table = full.summary().set_index("target")
    assert table.loc["answer", "first on top at depth"] == 6
    assert table.loc["control", "first on top at depth"] == "never"
    assert len(full.frame()) == 16 * 7


def test_the_control_is_no_entity_of_the_question() -> None:
    asked = open_inputs(RanksConfig(per_hop=6))
    group, graph = asked.group(9), asked.subject.graph
    assert graph is not None
    answers = asked.answers(group)
    names, tokens = ranks._targets(asked, group, answers, ())
    assert names[-1] == "control"
    for text, row in zip(group.texts, tokens.tolist(), strict=True):
        walk = graph.walk(text)
        assert asked.subject.model.to_str_tokens(torch.tensor(row[:-1])) == walk[1:]
        (control,) = asked.subject.model.to_str_tokens(torch.tensor(row[-1:]))
        assert control.startswith("<e_")
        assert control not in walk
    assert torch.equal(ranks._targets(asked, group, answers, ())[1], tokens)


@pytest.mark.shapes
def test_tokens_that_are_tracked_are_read_at_the_readout_of_each_input() -> None:
    texts = ("<e_3><r_1>", "<e_4><r_2><r_3><r_1>")
    record = ranks.run(RanksConfig(text=texts, track=("<e_5>", "<r_2>"), n_loops=LOOPS))
    model = open_inputs(RanksConfig(text=texts)).subject.model
    assert record.targets == ("<e_5>", "<r_2>")
    assert record.at == ("readout", "readout")
    found = [
        slow_rank(model, text, "loops.1.blocks.0", column, "<e_5>")
        for text, column in zip(texts, (1, 3), strict=True)
    ]
    assert record.mean[2, 0] == pytest.approx(
        ((1 + found[0]) * (1 + found[1])) ** 0.5 - 1, rel=1e-9
    )


@pytest.mark.shapes
def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ValueError, match="got '49'"):
        ranks.run(RanksConfig(checkpoint=str(GOLDEN / "ouro"), tokens=(5, 7), track=("49",)))
    with pytest.raises(ValueError, match=r"must have one hop count, got \[1, 2\]"):
        ranks.run(RanksConfig(text=("<e_3><r_1>", "<e_4><r_2><r_3>")))


def test_a_curve_and_a_band_for_each_target_and_names_where_they_arrive(full: ranks.Ranks) -> None:
    figure = ranks.figure(full)
    curves = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [trace.name for trace in curves] == list(full.targets)
    assert len(figure.data) == 2 * len(curves)
    assert [y - 1 for y in curves[5].y] == pytest.approx(full.mean[:, 5].tolist())
    assert (figure.layout.yaxis.tickvals[0], figure.layout.yaxis.ticktext[0]) == (1, "0")
    assert figure.layout.yaxis.type == "log"
    assert figure.layout.yaxis.range[0] > figure.layout.yaxis.range[1]
    notes = {note.text: note.x for note in figure.layout.annotations}
    assert {name: notes[name] for name in ("hop 1", "2", "5", "answer")} == {
        "hop 1": 1,
        "2": 2,
        "5": 5,
        "answer": 6,
    }
    assert notes["control"] == 16
    assert notes["loop 0"] == 1.5
    one = ranks.figure(replace(full, texts=full.texts[:1]))
    assert len(one.data) == len(curves)
    assert one.layout.title.text == label(full.texts[0])


def test_targets_that_never_arrive_have_labels_apart_and_in_their_order() -> None:
    record = ranks.run(RanksConfig(hops=14, n_loops=9, per_hop=20))
    late = [
        target
        for target, depth in zip(record.targets, record.arrivals(), strict=True)
        if depth is None
    ]
    notes = {
        note.text: note.y
        for note in ranks.figure(record).layout.annotations
        if note.xanchor == "left"
    }
    assert sorted(notes) == sorted(late)
    assert len(late) > 2
    heights = [
        notes[target]
        for target in sorted(
            late, key=lambda name: float(record.mean[-1, record.targets.index(name)])
        )
    ]
    assert all(below - above > 0.05 for above, below in pairwise(heights))
