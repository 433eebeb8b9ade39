"""The explorer's figures and sentences."""

from __future__ import annotations

import plotly.graph_objects as go
import pytest
import torch

from explored import A_TEXT, around, two_questions, valid
from loopscope.analyses.common.subject import Subject
from loopscope.analyses.explorer.callbacks import choose
from loopscope.analyses.explorer.model import (
    MarginCurve,
    PatchGrid,
    lens_table,
    loops_of,
    patch_grid,
)
from loopscope.analyses.explorer.questions import Query, ask
from loopscope.analyses.explorer.sentences import map_caption, verdict
from loopscope.analyses.explorer.view import (
    attention_figure,
    cell_mark,
    lens_figure,
    margin_figure,
    patch_figure,
)
from loopscope.interp.drawing.labels import label
from toy import LOOPS, toy


@pytest.fixture
def subject() -> Subject:
    return around(toy())


@pytest.fixture
def pair(subject: Subject) -> tuple[Query, Query]:
    return two_questions(subject)


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
