"""What the explorer computes, draws and serves, without a browser."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from explored import A_TEXT, B_TEXT, around, serving
from language_toys import CAT, DOG, ouro_folder
from looks.marks import hard_to_see
from loopscope.analyses.common.configs import ExploreConfig, SourceConfig
from loopscope.analyses.common.subject import Subject, answer_logits, open_subject
from loopscope.analyses.explorer import app as explorer
from loopscope.analyses.explorer import callbacks, wiring
from loopscope.analyses.explorer.app import make_explorer
from loopscope.analyses.explorer.callbacks import Explorer, choose
from loopscope.analyses.explorer.model import (
    MarginCurve,
    PatchGrid,
    heads_of,
    lens_table,
    loops_of,
    margins,
    patch_cell,
    patch_grid,
)
from loopscope.analyses.explorer.questions import (
    MAX_TOKENS,
    SENTENCES,
    Query,
    ask,
    ask_beside,
    beginning,
    contrast,
    hint,
)
from loopscope.analyses.explorer.sentences import map_caption, top_table, verdict
from loopscope.analyses.explorer.view import (
    attention_figure,
    cell_mark,
    lens_figure,
    margin_figure,
    patch_figure,
)
from loopscope.interp.common.metrics import margin
from loopscope.interp.drawing.labels import label
from loopscope.models.core.base import LoopedModel
from toy import HEADS, LOOPS, ShortEnding, odd_one, toy

MOST = 6  # more iterations than the toy records


@pytest.fixture
def subject() -> Subject:
    return around(toy())


@pytest.fixture
def pair(subject: Subject) -> tuple[Query, Query]:
    a = ask(subject, A_TEXT, LOOPS)
    return a, ask_beside(subject, B_TEXT, a, LOOPS)


@pytest.fixture(scope="module")
def shipped() -> Subject:
    return open_subject(SourceConfig())


# Questions


def test_a_question_has_the_answer_that_is_known_else_the_models_own(subject: Subject) -> None:
    known = ask(subject, "  <w_1> <w_2><w_3> ", LOOPS)
    assert (known.text, known.answer, known.known, known.answer_id) == (
        "<w_1><w_2><w_3>",
        "<w_9>",
        True,
        9,
    )
    assert known.columns == ["0 <w_1>", "1 <w_2>", "2 <w_3>", "3 <pad>"]
    own = ask(subject, A_TEXT, LOOPS)
    logits = subject.model(own.batch.tokens, n_loops=LOOPS, mask=own.batch.mask)[0, 5]
    assert (own.readout, own.known, own.answer_id) == (5, False, int(logits.argmax()))
    assert own.answer == f"<w_{own.answer_id}>"
    assert any(ask(subject, A_TEXT, loops).answer != own.answer for loops in range(1, LOOPS)), (
        "the number of iterations must matter"
    )


def test_the_graph_knows_the_answer_but_not_of_a_lone_entity(shipped: Subject) -> None:
    question = shipped.questions[4][7]
    assert (ask(shipped, question.text, 8).answer, ask(shipped, question.text, 8).known) == (
        question.answer,
        True,
    )
    assert not ask(shipped, "<e_3>", 8).known
    assert not ask(shipped, "<r_3><e_3>", 8).known


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<w_3><w_77>", "'<w_77>' is not one of the 29 tokens"),
        ("", "at least one token, got an empty one"),
        ("<w_1>" * (MAX_TOKENS + 1), "at most 40 tokens, got 41"),
    ],
)
def test_a_text_that_cannot_be_asked_is_refused(subject: Subject, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ask(subject, text, LOOPS)


def test_a_text_longer_than_learned_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="at most n_ctx=11 positions in this model, got 12"):
        ask(around(toy("learned")), "<w_1>" * 12, LOOPS)


def test_b_must_be_as_long_as_a(subject: Subject) -> None:
    with pytest.raises(ValueError, match="B must have as many tokens as A, which has 5, got 2"):
        ask_beside(subject, "<w_1><w_2>", ask(subject, A_TEXT, LOOPS), LOOPS)


def test_a_contrast_is_as_long_and_has_another_answer_where_that_is_known(
    shipped: Subject, subject: Subject
) -> None:
    question = shipped.questions[5][0]
    first, second = (contrast(shipped, question.text, turn) for turn in (0, 1))
    assert shipped.answer_of(first) != question.answer
    assert first.partition(">")[2] == question.text.partition(">")[2]
    assert second in [other.text for other in shipped.questions[5][1:]]
    assert contrast(subject, "<w_1><w_2><w_3>") == "<w_1><w_2><w_4>"
    assert contrast(subject, A_TEXT) == A_TEXT


def test_the_hint_names_the_tokens_of_questions(shipped: Subject, subject: Subject) -> None:
    assert hint(shipped) == "<e_0> to <e_39>, <r_0> to <r_9>"
    assert hint(subject) == "<w_1> to <w_4>"


# Computing, against the slow and obvious


def test_the_lens_is_the_head_of_each_residual(subject: Subject, pair: tuple[Query, Query]) -> None:
    model, query = subject.model, pair[0]
    table = lens_table(model, query, 3)
    assert table.blocks == tuple(f"loops.{t}.blocks.{i}" for t in range(3) for i in range(2))
    assert table.closing == (1, 3, 5)
    _, cache = model.run_with_cache(query.batch.tokens, n_loops=3, mask=query.batch.mask)
    for row, (loop, layer) in enumerate((loop, layer) for loop in range(3) for layer in range(2)):
        probs = model.unembed(model.normalize(cache["resid_post", loop, layer]))[0].softmax(-1)
        best = probs.topk(5)
        torch.testing.assert_close(table.prob[row], best.values, atol=1e-9, rtol=0)
        assert [list(cell) for cell in table.top[row]] == [
            model.to_str_tokens(ids) for ids in best.indices
        ]


@pytest.mark.parametrize("family", [None, ShortEnding])
def test_the_margin_after_t_iterations_is_that_of_a_call_with_t(family: Any) -> None:
    subject = around(toy() if family is None else odd_one(family))
    query = ask(subject, A_TEXT, LOOPS)
    record = margins(subject.model, query, MOST)
    for loop in range(MOST):
        logits = subject.model(query.batch.tokens, n_loops=loop + 1, mask=query.batch.mask)[
            :, query.readout
        ].detach()
        assert float(record.margin[loop]) == pytest.approx(
            float(margin(logits, torch.tensor([query.answer_id]))), abs=1e-9
        )
        best = logits.softmax(-1)[0].topk(5)
        assert [word for word, _ in record.top[loop]] == [f"<w_{i}>" for i in best.indices.tolist()]
        assert [p for _, p in record.top[loop]] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert record.best == int(record.margin.argmax()) + 1


def test_attention_panels_are_the_cached_patterns(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    model, query = subject.model, pair[0]
    _, cache = model.run_with_cache(
        query.batch.tokens, n_loops=3, mask=query.batch.mask, names_filter="**.hook_pattern"
    )
    heads, loops = heads_of(model, query, 3, 2, 1), loops_of(model, query, 3, 1, 3)
    torch.testing.assert_close(heads.pattern, cache["pattern", 2, 1][0], atol=1e-9, rtol=0)
    torch.testing.assert_close(
        loops.pattern,
        torch.stack([cache["pattern", loop, 1][0, 3] for loop in range(3)]),
        atol=1e-9,
        rtol=0,
    )
    assert heads.titles == tuple(f"head {head}" for head in range(HEADS))
    assert loops.titles == ("loop 0", "loop 1", "loop 2")


def test_attention_of_a_block_that_an_iteration_lacks(subject: Subject) -> None:
    short = around(odd_one(ShortEnding))
    query = ask(short, A_TEXT, LOOPS)
    assert loops_of(short.model, query, 3, 1, 0).titles == ("loop 0", "loop 1")
    with pytest.raises(ValueError, match=r"blocks must be in 0\.\.0, got 1"):
        heads_of(short.model, query, 3, 2, 1)


@torch.no_grad()
def naive(
    model: LoopedModel, a: Query, b: Query, n_loops: int, block: str, position: int
) -> Tensor:
    """Logits at the readout of A with one residual of B, in one plain run."""
    name = f"{block}.hook_resid_post"
    _, cache = model.run_with_cache(
        b.batch.tokens, n_loops=n_loops, mask=b.batch.mask, names_filter=name
    )

    def replace(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[0, position] = cache[name][0, position]
        return value

    logits = model.run_with_hooks(
        a.batch.tokens, n_loops=n_loops, mask=a.batch.mask, fwd_hooks=[(name, replace)]
    )
    return logits[:, a.readout]


def test_every_cell_of_the_map_is_that_patch_alone(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    model, (a, b) = subject.model, pair
    grid = patch_grid(model, a, b, 2)
    assert grid.blocks == tuple(f"loops.{t}.blocks.{i}" for t in range(2) for i in range(2))
    assert (grid.stride, tuple(grid.margin.shape)) == (1, (4, 6))
    answer = torch.tensor([a.answer_id])
    for row, block in enumerate(grid.blocks):
        for position in range(6):
            logits = naive(model, a, b, 2, block, position)
            before, after = patch_cell(model, a, b, 2, block, position)
            assert float(grid.margin[row, position]) == pytest.approx(
                float(margin(logits, answer)), abs=1e-9
            )
            assert after.margin == pytest.approx(float(margin(logits, answer)), abs=1e-9)
            assert before.margin == pytest.approx(grid.margin_a, abs=1e-9)
            best = logits[0].softmax(-1).topk(5)
            assert [token for token, _ in after.top] == model.to_str_tokens(best.indices)
            assert [prob for _, prob in after.top] == pytest.approx(best.values.tolist(), abs=1e-9)
    assert len({round(float(value), 6) for value in grid.change.flatten()}) > 10, (
        "the cells must differ for this to test anything"
    )
    assert grid.margin_b == pytest.approx(
        float(margin(answer_logits(model, b.batch, 2), answer)), abs=1e-9
    )


def test_a_question_put_into_itself_changes_nothing(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    before, after = patch_cell(subject.model, pair[0], pair[0], LOOPS, "loops.1.blocks.0", 2)
    assert before == after


def test_a_smaller_budget_leaves_out_iterations_and_then_all(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    whole = patch_grid(subject.model, *pair, LOOPS)
    found = {}
    for budget in (5e6, 4e6, 3e6, 2.3e6, 2e6):
        grid = patch_grid(subject.model, *pair, LOOPS, budget)
        found[grid.stride] = grid
        rows = [
            row
            for row, block in enumerate(whole.blocks)
            if grid.stride and int(block.split(".")[1]) % grid.stride == 0
        ]
        assert grid.blocks == tuple(whole.blocks[row] for row in rows)
        torch.testing.assert_close(
            grid.margin, whole.margin[rows].reshape(len(rows), 6).to(grid.margin), atol=1e-9, rtol=0
        )
        assert (grid.margin_a, grid.margin_b) == pytest.approx(
            (whole.margin_a, whole.margin_b), abs=1e-9
        )
    assert set(found) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("block", "position", "error", "sentence"),
    [
        ("loops.9.blocks.0", 0, KeyError, "n_loops=4 the iterations are loops.0 to loops.3"),
        ("loops.0.blocks.0", 6, ValueError, "0..5, got 6"),
    ],
)
def test_a_cell_that_does_not_exist_leaves_no_hook(
    subject: Subject,
    pair: tuple[Query, Query],
    block: str,
    position: int,
    error: type[Exception],
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence):
        patch_cell(subject.model, *pair, LOOPS, block, position)
    assert not subject.model.any_hook()


@pytest.mark.shapes
def test_no_hook_stays_after_anything(subject: Subject, pair: tuple[Query, Query]) -> None:
    lens_table(subject.model, pair[0], LOOPS)
    heads_of(subject.model, pair[0], LOOPS, 0, 0)
    patch_grid(subject.model, *pair, LOOPS)
    patch_cell(subject.model, *pair, LOOPS, "loops.1.blocks.0", 2)
    assert not subject.model.any_hook()


# Figures and sentences


def valid(figure: dict[str, Any]) -> go.Figure:
    """Plotly's own check of a figure that is plain data, and that all of it can be seen."""
    drawn = go.Figure(figure)
    assert hard_to_see(drawn) == []
    return drawn


def test_the_lens_figure_has_the_top_tokens_and_five_on_hover(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    table = lens_table(subject.model, pair[0], 3)
    figure = valid(lens_figure(table, pair[0]))
    assert figure.data[0].y == ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1")
    assert figure.data[0].text[4][2] == label(table.top[4][2][0])
    assert figure.data[0].customdata[4][2].count("<br>") == 6
    assert figure.data[0].customdata[4][2].startswith("loops.2.blocks.0.hook_resid_post<br>")
    assert "after loop 2 · block 0, at 2 " in figure.data[0].customdata[4][2]
    assert valid(lens_figure(table, pair[0], every_block=False)).data[0].y == ("0.1", "1.1", "2.1")
    assert (figure.layout.yaxis.title.text, figure.layout.template.layout.font.size is None) == (
        "loop.block",
        True,
    )


def test_the_margin_figure_marks_the_best_the_chosen_and_the_trained() -> None:
    record = MarginCurve(
        torch.tensor([-1.0, 2.5, 2.0, -0.5]),
        ((("<a>", 0.2),), (("<b>", 0.5),), (("<b>", 0.5),), (("<c>", 0.3),)),
    )
    figure = valid(margin_figure(record, 3, 4))
    assert figure.data[0].x == (1, 2, 3, 4)
    assert figure.data[1].x == (1, 2, 3)
    assert (figure.data[2].x, figure.data[2].y) == ((2,), (2.5,))
    assert [note.text for note in figure.layout.annotations] == [
        "best: 2",
        "shown: 3",
        "trained: 4",
    ]
    assert figure.layout.yaxis.title.text == "margin (logits)"
    assert [note.text for note in valid(margin_figure(record, 4, 4)).layout.annotations] == [
        "best: 2",
        "shown: 4",
    ]


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (4, 1), (5, 2)])
def test_attention_panels_stand_inside_the_figure_without_touching(
    subject: Subject, count: int, rows: int
) -> None:
    query = ask(subject, A_TEXT, LOOPS)
    panels = loops_of(subject.model, query, count, 0, 2)
    figure = valid(attention_figure(panels, query))
    assert len(figure.data) == count
    boxes = [
        (figure.layout[f"xaxis{i or ''}"].domain, figure.layout[f"yaxis{i or ''}"].domain)
        for i in (0, *range(2, count + 1))
    ]
    assert len({y for _, y in boxes}) == rows
    assert all(0 <= low < high <= 1 for box in boxes for low, high in box)
    for i, (x, y) in enumerate(boxes):
        assert all(
            x[1] <= u[0] or u[1] <= x[0] or y[1] <= v[0] or v[1] <= y[0] for u, v in boxes[i + 1 :]
        )
    assert [axis.title.text for axis in (figure.layout.xaxis, figure.layout.yaxis)][
        1
    ] == "from position (query)"


def test_the_patching_figure_and_its_frame(subject: Subject, pair: tuple[Query, Query]) -> None:
    grid = patch_grid(subject.model, *pair, 2)
    figure = valid(patch_figure(grid, *pair))
    assert figure.data[0].x[0] == "0 &lt;w_3&gt; / &lt;w_4&gt;"
    assert figure.data[0].x[1] == "1 &lt;w_8&gt;"
    assert (
        figure.data[0].zmax == -figure.data[0].zmin == pytest.approx(float(grid.change.abs().max()))
    )
    frame = go.Figure(
        {"layout": {"shapes": cell_mark(list(grid.blocks), "loops.1.blocks.0", 3)}}
    ).layout.shapes[0]
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (2.5, 3.5, 1.5, 2.5)
    assert cell_mark(list(grid.blocks), "loops.9.blocks.0", 3) == []
    empty = patch_grid(subject.model, *pair, 2, 0)
    assert "would take long" in valid(patch_figure(empty, *pair)).layout.annotations[0].text


@pytest.mark.shapes
def test_a_click_names_the_block_and_position_of_its_cell(
    subject: Subject, pair: tuple[Query, Query]
) -> None:
    grid = patch_grid(subject.model, *pair, 3)
    figure = patch_figure(grid, *pair)
    point = {"x": figure["data"][0]["x"][4], "y": figure["data"][0]["y"][3]}
    shown = {"blocks": list(grid.blocks)}
    assert choose({"points": [point]}, shown)[:2] == ("loops.1.blocks.1", 4)


def test_the_sentences_say_which_answer_is_measured_and_where_it_is_best(subject: Subject) -> None:
    record = MarginCurve(
        torch.tensor([-1.0, 2.5, 2.0, -0.5]),
        ((("<w_1>", 0.2),), (("<w_9>", 0.5),), (("<w_9>", 0.5),), (("<w_3>", 0.3),)),
    )
    known, own = ask(subject, "<w_1><w_2><w_3>", 4), ask(subject, A_TEXT, 4)
    worse = verdict(known, record, 4, 4)
    assert "taken to be <w_9>: the true answer" in worse
    assert (
        "After 4 iterations the model says <w_3> (p = 0.300); the margin is -0.50 logits" in worse
    )
    assert worse.endswith(
        "It is largest after 2 iterations, at 2.50. The iterations since then took 3.00 logits"
        " away: overthinking."
    )
    assert "overthinking" not in verdict(known, record, 1, 4)
    assert verdict(known, record, 2, 4).endswith(
        "No other number of iterations on this page gives a larger one."
    )
    assert "the model says this (p = 0.500)" in verdict(known, record, 2, 4)
    assert "the model's own top token after 4 iterations, because the true answer" in verdict(
        own, record, 1, 4
    )
    grid = PatchGrid(("x",), torch.zeros(1, 6), 2.0, -3.0, 2)
    caption = map_caption(grid, known, own, 1)
    assert "has the margin 2.00 after 1 iteration;" in caption
    assert "every 2 loops from it" in caption


# The page's callbacks


@pytest.fixture
def made(subject: Subject) -> Explorer:
    return Explorer(subject, LOOPS, LOOPS)


def test_what_can_be_asked_is_passed_on_and_what_cannot_is_explained(made: Explorer) -> None:
    keep = callbacks.no_update
    assert made.check("<w_1> <w_2>", "<w_3><w_2>", None) == (
        "<w_1><w_2>",
        {"a": "<w_1><w_2>", "b": "<w_3><w_2>"},
        "",
        "",
        "",
        "",
        "",
    )
    assert made.check("<w_1><w_2>", "<w_3><w_2>", "<w_1><w_2>")[0] is keep
    wrong = made.check("<x>", "<w_3><w_2>", "<w_1><w_2>")
    assert wrong[:2] == (keep, keep)
    assert wrong[2].startswith("A: '<x>' is not one of the 29 tokens")
    assert wrong[5:] == (callbacks.STALE, callbacks.STALE)
    assert made.check(None, "<w_1>", None)[2].startswith("A: a text must hold at least one token")
    longer = made.check("<w_1><w_2>", "<w_3>", "<w_1><w_2>")
    assert longer[1:3] == (keep, "")
    assert longer[3].startswith("B: B must have as many tokens as A, which has 2, got 1; nothing")
    assert longer[5:] == ("", callbacks.STALE)


@pytest.mark.shapes
def test_each_answer_is_drawn_under_the_lock_and_timed(
    made: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("lens_table", "margins", "heads_of", "loops_of", "patch_grid", "patch_cell"):
        real = getattr(callbacks, name)

        def watched(*args: Any, real: Any = real, **options: Any) -> Any:
            held.append(made.lock.locked())
            return real(*args, **options)

        monkeypatch.setattr(callbacks, name, watched)
    asked = {"a": A_TEXT, "b": B_TEXT}
    assert made.show_map(None, 2, "all", None) == (*[callbacks.no_update] * 7, "")
    assert valid(made.show_lens(A_TEXT, 3, "iterations")[0]).data[0].y == ("0.1", "1.1", "2.1")
    assert len(valid(made.show_margin(A_TEXT, 3)[0]).data[0].x) == made.most == 12
    assert len(valid(made.show_attention(A_TEXT, 3, "heads", 9, 1, 0)[0]).data) == HEADS
    assert len(valid(made.show_attention(A_TEXT, 3, "loops", 1, 1, 0)[0]).data) == 3
    figure, shown, _, blocks, positions, block, position, took = made.show_map(
        asked, 2, "all", None, "loops.3.blocks.0", 5
    )
    assert (len(figure["data"][0]["y"]), len(blocks), len(positions)) == (4, 4, 6)
    assert (block, position) == (None, 5), "a block that is no longer there is not kept"
    assert shown["n_loops"] == 2
    assert took.endswith(" ms")
    table, frame, _ = made.show_cell("loops.1.blocks.0", 3, shown)
    after = patch_cell(made.subject.model, *made.pair(asked), 2, "loops.1.blocks.0", 3)[1]
    assert f"to {after.margin:.2f} logits" in str(table)
    assert "shapes" in str(frame.to_plotly_json())
    assert made.show_cell(None, 3, shown)[2] == ""
    assert held == [True] * 6


def test_no_question_is_asked_while_another_computation_has_hooks_on_the_model(
    made: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def watched(*args: Any) -> Any:
        held.append(made.lock.locked())
        return ask(*args)

    monkeypatch.setattr(callbacks, "ask", watched)
    made.reads(A_TEXT, None)
    made.check(A_TEXT, B_TEXT, None)
    made.show_lens(A_TEXT, 1, "blocks")
    assert held == [True] * 3


def test_the_answer_is_read_at_the_chosen_position_of_both_texts(made: Explorer) -> None:
    options, kept = made.reads(A_TEXT, 2)
    assert [each["label"] for each in options][2:4] == ["2 <w_2>", "3 <w_20>"]
    assert kept is callbacks.no_update
    assert made.reads("<w_1><w_2>", 5)[1] is None
    query = ask(made.subject, A_TEXT, LOOPS, 2)
    model = made.subject.model
    logits = model(query.batch.tokens, n_loops=LOOPS, mask=query.batch.mask)[0, 2]
    assert (query.readout, query.known, query.answer_id) == (2, False, int(logits.argmax()))
    known = "<w_1><w_2><w_3>"
    assert not ask(made.subject, known, LOOPS, 1).known, "a true answer is of the own readout"
    assert ask(made.subject, known, LOOPS, 99).readout == ask(made.subject, known, LOOPS).readout
    asked = {"a": A_TEXT, "b": B_TEXT}
    shown = made.show_map(asked, 2, "all", 2)[1]
    assert shown["read"] == 2
    a, b = made.pair(shown)
    assert (a.readout, b.readout) == (2, 2)
    assert "Top tokens at 2 <w_2>" in str(made.show_margin(A_TEXT, 3, 2)[2])


def test_a_language_model_is_asked_any_sentence() -> None:
    subject = open_subject(SourceConfig(checkpoint=ouro_folder()), needs_questions=False)
    query = ask(subject, CAT, 4)
    assert (query.text, query.readout, query.known) == (CAT, 5, False)
    assert query.columns[1] == "1 ␣cat"
    with pytest.raises(ValueError, match="which has 6, got 2; nothing is patched until it has"):
        ask_beside(subject, "a dog", query, 4)
    assert beginning(subject, CAT, DOG) == (CAT, DOG)
    first, second = beginning(subject, None, None)
    assert (first, second) == (SENTENCES[0], SENTENCES[0])
    smiles = open_subject(SourceConfig(checkpoint="mini/smiles"), needs_questions=False)
    assert beginning(smiles, None, None)[0] == SENTENCES[1]
    record = margins(subject.model, query, 3)
    table = str(top_table(query, record, 2))
    assert table.count("Tr(") == 1 + 2
    assert hint(subject) == ""


def test_iterations_outside_the_slider_are_brought_inside(made: Explorer) -> None:
    assert [made.limit(n, 9) for n in (None, 0, 2, 99)] == [(3, 3), (3, 3), (1, 1), (11, 9)]


# Serving


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with serving(ExploreConfig(port=0, per_hop=3)) as found:
        yield found


def test_the_page_loads_nothing_from_elsewhere(address: str) -> None:
    with urllib.request.urlopen(address) as answer:
        text = answer.read().decode()
    assert "loopscope: mini/multi_hop/r_dyn" in text
    assert 'src="http' not in text
    assert 'href="http' not in text
    assert "--accent: #0b4f8a" in text, "the report's colours are the page's"


POST = "POST /_dash-update-component HTTP/1.1\r\nHost: 127.0.0.1\r\n"
JSON = "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"


@pytest.mark.parametrize(
    ("request_text", "code"),
    [
        (POST + JSON.format(3) + "{{{", 400),
        (POST + JSON.format(2) + "{}", 400),
        (POST + JSON.format(2) + "[]", 400),
        (POST + JSON.format(14) + '{"output": 73}', 400),
        (POST + JSON.format(99_999_999) + "x", 413),
        (POST + "Content-Length: 2\r\n\r\n{}", 415),
        (POST + "Content-Length: many\r\n\r\n{}", 415),
        ("GET /_dash-component-suites/../x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", 403),
    ],
)
def test_a_bad_request_is_refused_with_one_line(
    request_text: str, code: int, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(address.rpartition(":")[2].strip("/"))
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(request_text.encode())
        answer = client.recv(100).decode()
    assert f" {code} " in answer.splitlines()[0]
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("refused ")
    assert f": {code}, " in lines[0]
    assert len(lines[0]) < 320
    assert urllib.request.urlopen(address).status == 200


def test_an_error_inside_a_callback_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(wiring, "set_props", lambda key, props: said.append(props["children"]))
    try:
        ask(None, "<e_1>", 1)  # type: ignore[arg-type]
    except Exception as error:
        wiring._report(error)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"could not be computed: \w+: .* \(.*\.py:\d+\)$", line)
    assert said[0].startswith("This could not be computed: ")


def test_a_request_by_another_name_is_refused(address: str) -> None:
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403") as refused:
        urllib.request.urlopen(request)
    refused.value.close()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"host": "0.0.0.0"}, r"this machine alone, at 127\.0\.0\.1, got the host '0\.0\.0\.0'"),
        ({"host": "localhost"}, "got the host 'localhost'"),
        ({"port": 70000}, "a port is between 0 .* and 65535, got 70000"),
        ({"n_loops": 0}, "n_loops must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_explorer(ExploreConfig(per_hop=1, **{"port": 0, **changes}))


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"port {port} cannot be used .*--port 0 for a free one"
        ):
            make_explorer(ExploreConfig(per_hop=1, port=port))


def test_a_model_without_a_recorded_number_of_iterations_needs_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explorer, "open_subject", lambda config, **_: around(toy(n_loops=None)))
    with pytest.raises(ValueError, match="records no number of iterations"):
        make_explorer(ExploreConfig(port=0))
    make_explorer(ExploreConfig(port=0, n_loops=3)).server_close()


def test_the_command_prints_one_line_and_ends_with_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(server: Any, *_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explorer.BaseWSGIServer, "serve_forever", interrupted)
    explorer.explore(ExploreConfig(port=0, per_hop=1))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Explore mini/multi_hop/r_dyn at http://127.0.0.1:")
    assert list(tmp_path.iterdir()) == []
