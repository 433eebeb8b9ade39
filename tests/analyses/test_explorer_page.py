"""The explorer's page, in a real browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from urllib.parse import urlsplit

import pytest

from browser import Tab
from explored import plot, served, settle, text_of
from language_toys import CAT, DOG, ouro_folder
from looks.pages import check_looks
from loopscope.analyses.common.configs import ExploreConfig, SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.explorer import questions
from loopscope.interp.circuits.names import Edge
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.search import exact_scores

PARTS = ("lens", "margin", "attention", "map")
DRAWN = " && ".join(text_of(f"{part}-took") for part in PARTS)
FIRST, SECOND = "<e_3><r_1><r_4>", "<e_8><r_1><r_4>"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with served(ExploreConfig(port=0, per_hop=3), DRAWN) as page:
        yield page


def ask(page: Tab, a: str, b: str) -> None:
    page.type_into("#a", a)
    page.type_into("#b", b)
    settle(page)


def test_every_part_is_drawn_and_says_how_long_it_took(tab: Tab) -> None:
    sizes = tab.value(f"[{', '.join(f'{plot(part)}.clientHeight' for part in PARTS)}]")
    assert all(size > 200 for size in sizes)
    marks = tab.value("document.querySelectorAll('.heatmaplayer image, .heatmaplayer .hm').length")
    assert marks >= 6, "the lens, four heads, and the patching map"
    assert [tab.value(text_of(f"{part}-took")).endswith(" ms") for part in PARTS] == [True] * 4


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_wider_than_the_window_and_no_parts_overlap(tab: Tab, width: int) -> None:
    tab.resize(width, 900)
    tab.wait(f"window.innerWidth === {width} && {plot('lens')}._fullLayout.width < {width}")
    tab.wait(f"document.documentElement.scrollWidth <= {width}")  # each figure is fitted in turn
    boxes = tab.value(
        "[...document.querySelectorAll('section')].map(s => [s.getBoundingClientRect().top,"
        " s.getBoundingClientRect().bottom])"
    )
    assert len(boxes) == 5
    assert all(above[1] <= below[0] for above, below in pairwise(boxes))
    inside = (
        "[...document.querySelectorAll('.js-plotly-plot')].filter(g => g.checkVisibility()).every("
        "g => g.closest('section').getBoundingClientRect().bottom >= "
    )
    assert tab.value(inside + "g.querySelector('.main-svg').getBoundingClientRect().bottom)")
    tab.resize(1280, 900)


def test_the_page_is_read_in_a_narrow_window_in_light_and_in_dark(tab: Tab) -> None:
    check_looks(tab, [plot(part) for part in PARTS])
    tab.resize(1280, 900)


def test_every_control_has_a_name(tab: Tab) -> None:
    unnamed = (
        "[...document.querySelectorAll('input:not([aria-hidden]), [role=slider],"
        " button.dash-dropdown')].filter(e => !(e.labels?.length ||"
        " e.closest('[role=group][aria-labelledby]'))).map(e => e.outerHTML)"
    )
    assert tab.value(unnamed) == []
    groups = (
        "[...document.querySelectorAll('[role=group]')].map(g =>"
        " document.getElementById(g.getAttribute('aria-labelledby')).textContent)"
    )
    assert all(tab.value(groups))


def test_a_typed_question_is_answered(tab: Tab) -> None:
    ask(tab, FIRST, SECOND)
    tab.wait(f"{plot('lens')}.data[0].x.length === 3 && {plot('map')}.data[0].x.length === 3")
    assert tab.value(f"{plot('map')}.data[0].x")[0] == "0 &lt;e_3&gt; / &lt;e_8&gt;"
    assert "the true answer" in tab.value(text_of("verdict"))


def test_a_click_on_a_cell_patches_exactly_that_cell(tab: Tab) -> None:
    ask(tab, FIRST, SECOND)
    tab.value(f"{plot('map')}.scrollIntoView({{block: 'center'}})")
    x, y = tab.value(
        f"(() => {{ const g = {plot('map')}, l = g._fullLayout, r ="
        " g.getBoundingClientRect();return [r.x + l.xaxis._offset + l.xaxis.c2p(1), r.y +"
        " l.yaxis._offset + l.yaxis.c2p(2)]; })()"
    )
    change, label = tab.value(f"[{plot('map')}.data[0].z[2][1], {plot('map')}.data[0].y[2]]")
    assert label == "1.0"
    tab.click(x, y)
    tab.wait(f"{text_of('said')}?.includes('after loop 1 · block 0 at 1 <r_1>')")
    settle(tab)
    before, after = (
        float(part.split(" logits")[0])
        for part in tab.value(text_of("said")).split("margin\t")[1].split("\t")
    )
    assert after - before == pytest.approx(change, abs=0.011), "both are shown with two decimals"
    assert tab.value("document.querySelectorAll('#said tbody tr').length") == 6
    tab.wait(
        f"{plot('map')}.layout.shapes?.[0]?.x0 === 0.5 && {plot('map')}.layout.shapes[0].y0 === 1.5"
    )


def test_a_click_on_an_edge_of_the_circuit_patches_that_edge_alone(tab: Tab) -> None:
    ask(tab, FIRST, SECOND)
    assert tab.value(text_of("circuit-took")) == "", "nothing is scored while the part is closed"
    tab.click_on("#circuit-open summary")
    tab.wait(text_of("kept-took"))
    settle(tab)
    tab.value(f"{plot('circuit')}.scrollIntoView({{block: 'center'}})")
    x, y, name = tab.value(
        f"(() => {{ const g = {plot('circuit')}, l = g._fullLayout, r = g.getBoundingClientRect();"
        " const t = g.data.filter(t => t.mode === 'lines' && t.customdata).at(-1);"
        " return [r.x + l.xaxis._offset + l.xaxis.c2p(t.x[6]),"
        " r.y + l.yaxis._offset + l.yaxis.c2p(t.y[6]), t.customdata[6][0]]; })()"
    )
    tab.click(x, y)
    tab.wait(f"document.querySelector('#edge').value === {json.dumps(name)}")
    tab.wait(f"{text_of('edge-said')}.includes('exact effect')")
    settle(tab)
    loops = tab.value(
        "document.querySelector('#loops [role=slider]').getAttribute('aria-valuenow')"
    )
    effect = re.search(r"edge is (\S+) logits", tab.value(text_of("edge-said")))
    assert effect is not None
    assert float(effect[1]) == pytest.approx(exact_effect(name, int(loops)), abs=0.002)
    assert tab.value(f"{plot('circuit')}.layout.shapes.length") == 1
    tab.value("navigator.clipboard.writeText = async text => { window.copied = text; }")
    tab.value("document.querySelector('#edge-said button').focus()")
    tab.press("Enter", 13)
    tab.wait(f"window.copied === {json.dumps(name)}")
    assert tab.value("document.querySelector('#edge-said button').dataset.said") == "copied"
    tab.type_into("#edges", "0")
    tab.wait(f"{text_of('circuit-wrong')}.includes('between 1 and')")
    settle(tab)
    tab.type_into("#edge", name.replace("→", "->") + " ")
    settle(tab)
    assert f"edge is {effect[1]} logits" in tab.value(text_of("edge-said"))
    assert tab.value(f"{text_of('edge-wrong')} === '' && !document.querySelector('#of-edge.stale')")
    tab.type_into("#edges", "100")
    tab.wait(f"{text_of('circuit-wrong')} === ''")
    tab.wait(f"{plot('circuit')}.layout.shapes.length === 1")
    tab.type_into("#edge", "embed -> nowhere")
    tab.wait(f"{text_of('edge-wrong')}.includes('is none of the')")
    settle(tab)
    check_looks(tab, [plot("circuit")])
    tab.resize(1280, 900)
    tab.click_on("#circuit-open summary")


def exact_effect(name: str, n_loops: int) -> float:
    """The exact score of one edge between the two questions."""
    subject = open_subject(SourceConfig(per_hop=3))
    a = questions.ask(subject, FIRST, 8)
    b = questions.ask_beside(subject, SECOND, a, 8)
    both = subject.model, a.batch, b.batch
    every = circuit_scores(*both, a.metric, n_loops, by_position=True)
    one = every.take([every.edges.index(Edge.from_text(name))], "one")
    return exact_scores(*both, one, a.metric).scores[0]


def test_moving_the_slider_moves_all_parts(tab: Tab) -> None:
    tab.click_on("#loops [role=slider]")
    for key, code, loops in (("End", 35, 24), ("Home", 36, 1), ("ArrowRight", 39, 2)):
        tab.press(key, code)
        tab.wait(
            f"{plot('lens')}.data[0].y.length === {2 * loops} && {plot('margin')}.data[1].x.length"
            f" === {loops}"
        )
        tab.wait(
            "document.querySelector('#loop [role=slider]').getAttribute('aria-valuemax') ==="
            f" '{loops - 1}'"
        )
        settle(tab)
    assert tab.value(f"{plot('map')}.data[0].y") == ["0.0", "0.1", "1.0", "1.1"]


def test_attention_can_be_seen_over_iterations(tab: Tab) -> None:
    tab.click_on("#view label:nth-of-type(2)")
    tab.wait(f"{plot('attention')}.layout.annotations[0].text === 'loop 0'")
    tab.click_on("#view label:nth-of-type(1)")
    tab.wait(
        f"{plot('attention')}.layout.annotations[0].text === 'head 0' &&"
        f" {plot('attention')}.data.length === 4"
    )


def test_wrong_input_is_explained_in_place_and_changes_nothing(tab: Tab) -> None:
    ask(tab, FIRST, SECOND)
    shown = tab.value(f"JSON.stringify([{plot('lens')}.data, {plot('map')}.data])")
    for text, sentence in (
        ("<e_3><x>", "'<x>' is not one of"),
        ("", "at least one token"),
        ("<e_1>" * 41, "at most 40 tokens, got 41"),
    ):
        tab.type_into("#a", text)
        tab.wait(f"{text_of('a-wrong')}.includes({json.dumps(sentence)})")
        settle(tab)
    assert tab.value(f"JSON.stringify([{plot('lens')}.data, {plot('map')}.data])") == shown
    tab.type_into("#a", FIRST)
    tab.type_into("#b", "<e_8>")
    tab.wait(
        f"{text_of('a-wrong')} === '' && {text_of('b-wrong')}.includes('as many tokens as A, which"
        " has 3, got 1')"
    )
    assert tab.value(f"JSON.stringify([{plot('lens')}.data, {plot('map')}.data])") == shown


def test_another_question_brings_its_own_b(tab: Tab) -> None:
    tab.click_on("#next-a")
    tab.wait(f"document.querySelector('#a').value !== {FIRST!r} && !{text_of('b-wrong')}")
    first = tab.value("document.querySelector('#b').value")
    tab.click_on("#next-b")
    tab.wait(f"document.querySelector('#b').value !== {first!r}")
    settle(tab)
    assert tab.value(text_of("b-wrong")) == ""


def test_the_page_logs_no_error_and_asks_this_machine_alone(tab: Tab) -> None:
    assert tab.value("1 + 1") == 2
    assert tab.page.errors == []
    assert len(tab.page.requests) > 20
    assert {urlsplit(url).hostname for url in tab.page.requests} == {"127.0.0.1"}
    assert tab.value(text_of("problem")) == ""


def test_a_language_model_is_explored_by_sentences() -> None:
    config = ExploreConfig(checkpoint=ouro_folder(), port=0, text=CAT, second=DOG)
    with served(config, DRAWN) as page:
        assert page.value("document.querySelector('#hops, #next-a, #next-b')") is None
        assert page.value(f"{plot('map')}.data[0].x")[1] == "1 ␣cat / ␣dog"
        assert "own top token after 4 iterations" in page.value(text_of("verdict"))
        assert page.value("document.querySelectorAll('#tops tbody tr').length") == 4
        page.type_into("#b", "a dog")
        page.wait(f"{text_of('b-wrong')}.includes('which has 6, got 2; nothing is patched')")
        settle(page)
        grey = "[...document.querySelectorAll('.stale')].map(e => e.id)"
        assert page.value(grey) == ["of-pair"]
        filters = "getComputedStyle(document.querySelector('#of-pair .figure')).filter"
        assert page.value(filters) == "grayscale(1)"
        page.type_into("#a", "the cat")
        page.wait(f"{plot('map')}.data[0].x.length === 2 && {plot('lens')}.data[0].x.length === 2")
        settle(page)
        assert page.value(grey) == []
        assert page.value(text_of("b-wrong")) == ""
        caption = page.value(text_of("map-caption"))
        _choose_position(page)
        page.wait(f"{text_of('tops')}.includes('Top tokens at 0 the after each iteration')")
        page.wait(f"{text_of('map-caption')} !== {json.dumps(caption)}")
        settle(page)
        assert page.page.errors == []


def _choose_position(page: Tab) -> None:
    """Take the first position of the list at which the answer may be read."""
    page.click_on("#read")
    page.wait("document.querySelectorAll('.dash-dropdown-option').length > 0")
    page.click_on(".dash-dropdown-option")
