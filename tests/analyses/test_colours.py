"""The colours of every figure can be read by everybody, on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import plotly.graph_objects as go
import pytest

from looks.colours import (
    SEEN_WITH,
    Rgb,
    along,
    contrast,
    distance,
    lab,
    rgb,
    seen,
    shown,
)
from looks.marks import MODES, hard_to_see
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.look import GROUP_COLORS
from loopscope.interp.drawing import look
from small_figures import small_figure

APART = 12.0
"""The least CIE76 distance of colours that are told apart by colour alone."""

SEQUENTIAL = {
    "share": look.ACCURACY_SCALE,
    "warm": look.WARM_SCALE,
    "grey": look.GREY_SCALE,
    "blues": look.BLUES,
    "oranges": look.ORANGES,
    "order": look.ORDER,
}


@pytest.mark.parametrize("name", FIGURES)
def test_all_texts_and_marks_are_seen_on_their_ground(name: str) -> None:
    assert hard_to_see(small_figure(name)[1]) == []


def test_what_is_hard_to_see_is_found() -> None:
    scale = [[0.0, "#f7f9fb"], [1.0, "#0b4f8a"]]
    dark = {"z": [[0.0, 1.0]], "colorscale": scale, "texttemplate": "%{z}"}
    figure = go.Figure(go.Heatmap(**dark, textfont={"color": look.INK}))
    figure.add_scatter(x=[0], y=[0], mode="lines", line={"color": "#cccccc"}, name="pale")
    figure.add_scatter(
        x=[0], y=[0], mode="markers+text", text="3", marker={"color": ["#1f2933"]},
        textfont={"color": "#000000"},
    )  # fmt: skip
    figure.add_annotation(text="<span style='color:#9aa5b1'>so</span>")
    found = hard_to_see(look.styled(figure, 300))
    assert [each for each in found if each.startswith("light")] == [
        "light: scatter pale in #cccccc",
        "light: span of 0 in #9aa5b1",
        *(each for each in found if each.startswith("light: text in")),
    ]
    assert sum(each.startswith("light: text in") for each in found) == 2


def told(name: str) -> str:
    """All that a reader is told beside the marks of a figure."""
    figure, section = small_figure(name)[1], getattr(FIGURES[name].module(), "SECTION", None)
    axes = [each.title.text or "" for each in (*figure.select_xaxes(), *figure.select_yaxes())]
    notes = [note.text for note in figure.layout.annotations]
    return " ".join([*axes, *notes, section.look_for if section else ""])


@pytest.mark.parametrize("name", FIGURES)
def test_every_line_is_explained_by_the_legend_or_in_words(name: str) -> None:
    figure = small_figure(name)[1]
    named = [trace for trace in figure.data if trace.showlegend is not False]
    if figure.layout.showlegend is False:
        named = []
    assert all(trace.name for trace in named if trace.type in ("scatter", "bar"))
    groups = {trace.legendgroup or trace.name for trace in named}
    lines = [
        trace.line.dash
        for trace in figure.select_traces({"type": "scatter"})
        if (trace.legendgroup or trace.name) not in groups and trace.showlegend is False
    ]
    lines += [shape.line.dash for shape in figure.layout.shapes]
    for dash, word in (("dot", "dotted"), ("dash", "dashed")):
        assert dash not in lines or word in told(name), word


def looks(color: str, mode: str) -> dict[str, Rgb]:
    """A colour as people see it, with full colour vision and with each deficiency."""
    return {who: seen(shown(color, mode), who) for who in ("normal", *SEEN_WITH)}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "palette", [look.CATEGORIES, tuple(GROUP_COLORS.values()), (look.CATEGORIES[0], look.MARK)]
)
def test_colours_of_kinds_are_told_apart_by_all(palette: Sequence[str], mode: str) -> None:
    for one, other in combinations(palette, 2):
        for who, color in looks(one, mode).items():
            assert distance(color, looks(other, mode)[who]) >= APART, (one, other, who)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_scale_goes_from_light_to_dark_for_all(name: str, mode: str) -> None:
    stops = [along(SEQUENTIAL[name], i / 20, mode) for i in range(21)]
    for who in ("normal", *SEEN_WITH):
        lightness = [lab(seen(color, who))[0] for color in stops]
        rising = [b > a for a, b in pairwise(lightness)]
        assert len(set(rising)) == 1, who
        assert abs(lightness[-1] - lightness[0]) > 20, who


@pytest.mark.parametrize("mode", MODES)
def test_the_two_ends_of_the_signed_scale_are_told_apart_by_all(mode: str) -> None:
    stops = [along(look.SIGNED_SCALE, i / 20, mode) for i in range(21)]
    for who in ("normal", *SEEN_WITH):
        colors = [seen(color, who) for color in stops]
        assert distance(colors[0], colors[-1]) > 40, who
        lightness = [lab(color)[0] for color in colors]
        for half in (lightness[:11], lightness[10:][::-1]):
            assert len({b > a for a, b in pairwise(half)}) == 1, who


def test_a_figure_uses_scales_of_the_project_alone() -> None:
    known = {str(tuple(map(tuple, scale))) for scale in (*SEQUENTIAL.values(), look.SIGNED_SCALE)}
    for name in FIGURES:
        figure = small_figure(name)[1]
        maps = list(figure.select_traces({"type": "heatmap"}))
        shared = {trace.coloraxis for trace in maps} - {None}
        own = [trace for trace in maps if trace.coloraxis is None]
        for drawn in (*own, *(figure.layout[axis] for axis in shared)):
            assert str(tuple(map(tuple, drawn.colorscale))) in known, name


def test_contrast_and_distance_are_those_of_their_definitions() -> None:
    white, black = rgb("#ffffff"), rgb("black")
    assert contrast(white, black) == pytest.approx(21.0)
    assert contrast(rgb("#767676"), white) == pytest.approx(4.54, abs=0.005)
    assert distance(white, black) == pytest.approx(100.0, abs=1e-3)
    assert lab(rgb("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.02)
    for who in SEEN_WITH:
        assert seen(white, who) == pytest.approx(white, abs=1e-5)
    red, green = rgb("#a05000"), rgb("#607000")
    for who in ("protanopia", "deuteranopia"):
        assert distance(seen(red, who), seen(green, who)) < distance(red, green) / 2
    assert shown("#ffffff", "dark") == pytest.approx((0.1, 0.1, 0.1))
