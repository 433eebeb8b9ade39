"""The circuit's page, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from browser import Tab, opened
from looks.colours import blend, contrast, rgb
from looks.pages import dress, faint
from loopscope.analyses.circuit_controls import FoundCircuit
from loopscope.analyses.figures.circuit.circuit import FILES
from loopscope.interp.drawing.circuit_page import circuit_page
from loopscope.interp.drawing.circuit_places import moves
from small_figures import small_figure

EDGES, SHOWN = "document.querySelectorAll('path.edge').length", "by('shown').textContent"


def to(value: int) -> str:
    return f"slider.value = {value}; slider.dispatchEvent(new Event('input'))"


def record() -> FoundCircuit:
    found = small_figure("circuit")[0]
    assert isinstance(found, FoundCircuit)
    return found


def test_a_title_is_shown_letter_by_letter() -> None:
    text = circuit_page(record().circuit, "</script><b>", "a <i> lead")
    assert "<b>" not in text
    assert "&lt;/script&gt;&lt;b&gt;" in text
    assert "a &lt;i&gt; lead" in text


def test_the_graph_file_is_json_of_the_first_question() -> None:
    graph = json.loads(FILES["graph.json"](record()))
    assert graph["metadata"]["prompt"] == record().clean[0]
    assert graph["metadata"]["slug"] == "loopscope-mini-multi-hop-r2"


@pytest.mark.browser
@pytest.mark.slow
def test_the_threshold_takes_edges_away_and_the_views_change(tmp_path: Path) -> None:
    found = record().circuit
    path = tmp_path / "circuit.page.html"
    path.write_bytes(FILES["page.html"](record()))
    with opened(path.as_uri()) as tab:
        tab.wait(f"{EDGES} > 0")
        tab.value(to(100))
        assert tab.value(EDGES) == len(found)
        assert tab.value(SHOWN).startswith(f"{len(found)} of {len(found)} edges")
        tab.value(to(50))
        few = tab.value(EDGES)
        assert few == round(len(found) ** 0.5)
        tab.value("document.querySelector('path.edge').dispatchEvent(new Event('click'))")
        writer, reader = tab.value("by('name').textContent").split(" → ")
        assert (writer, reader) in [tuple(edge) for edge in found.edges]
        tab.value(to(100))
        assert tab.value("document.querySelectorAll('path.move').length") == len(moves(found))
        tab.click_on("#folded")
        pairs = found.folded_edges().assign(later=lambda frame: frame["distance"].fillna(0) > 0)
        assert tab.value(EDGES) == len(pairs[["writer", "reader", "later"]].drop_duplicates())
        assert tab.value("document.querySelectorAll('circle').length") == len(found.folded())
        assert "loops 0\N{EN DASH}1" in tab.value("graph.textContent")
        tab.resize(700, 900)
        for scheme in ("dark", "light"):
            dress(tab, scheme)
            assert faint(tab) == {}, scheme
            assert _faint_lines(tab, scheme) == [], scheme
        assert tab.value("document.documentElement.scrollWidth - window.innerWidth") <= 0
        assert tab.page.errors == []
        assert tab.page.requests == []


def _faint_lines(tab: Tab, scheme: str) -> list[str]:
    """The edges and nodes with a contrast below 3 to the paper."""
    paper = rgb({"light": "#ffffff", "dark": "#1a1a1a"}[scheme])
    look = "(s => [s.stroke, s.fill, s.strokeOpacity])(getComputedStyle(each))"
    found = tab.value(f"[...document.querySelectorAll('path.edge, circle')].map(each => {look})")
    assert len(found) > 5
    shown = {
        (stroke if fill == "none" else fill, 1.0 if fill != "none" else float(opacity))
        for stroke, fill, opacity in map(tuple, found)
    }
    return [
        color for color, opacity in shown if contrast(blend(rgb(color), paper, opacity), paper) < 3
    ]
