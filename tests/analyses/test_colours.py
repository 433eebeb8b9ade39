"""The colours of every figure can be read by everybody, on a light and on a dark page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from colours import PAPER, SEEN_WITH, Rgb, along, blend, contrast, distance, lab, rgb, seen, shown
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.look import GROUP_COLORS
from loopscope.interp.drawing import look
from small_figures import small_figure

MODES = ("light", "dark")
TEXT, LINE = 4.5, 3.0
"""The least contrast ratios of WCAG 2.2: success criteria 1.4.3 for texts, 1.4.11 for marks."""
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


def each(value: Any, count: int) -> list[Any]:
    """A setting of plotly for each of `count` points: one for all, or a list."""
    if value is None or isinstance(value, str | int | float):
        return [value] * count
    return list(value)


def cells(figure: go.Figure, mode: str) -> Iterator[tuple[Rgb, Rgb]]:
    """The ground and the text of each cell with a text."""
    for trace in figure.select_traces({"type": "heatmap"}):
        if not trace.texttemplate:
            continue
        values = np.array(trace.z, dtype=float)
        finite = values[np.isfinite(values)]
        axis, low, high = trace, trace.zmin, trace.zmax
        if trace.coloraxis is not None:
            axis = figure.layout[trace.coloraxis]
            low, high = axis.cmin, axis.cmax
        low, high = (
            finite.min() if low is None else low,
            finite.max() if high is None else high,
        )
        for value in finite:
            share = (value - low) / (high - low) if high > low else 0.5
            yield along(axis.colorscale, share, mode), shown(trace.textfont.color, mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FIGURES)
def test_the_texts_of_cells_are_read_on_their_colours(name: str, mode: str) -> None:
    assert (
        min((contrast(*pair) for pair in cells(small_figure(name)[1], mode)), default=TEXT) >= TEXT
    )


def words(figure: go.Figure) -> Iterator[tuple[str, str]]:
    """Every text with a colour: where it is, and the colour."""
    layout = figure.layout
    yield "font", layout.font.color
    for i, note in enumerate(layout.annotations):
        yield f"annotation {i}", note.font.color or layout.font.color
        yield from ((f"span of {i}", color) for color in re.findall(r"color:([^;'\"]+)", note.text))
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        yield "axis title", axis.title.font.color or layout.font.color
    for trace in figure.select_traces({"type": "scatter"}):
        if "text" in (trace.mode or "") and trace.textposition is not None:
            yield from ((trace.name, color) for color in each(trace.textfont.color, len(trace.x)))


@pytest.mark.parametrize("name", FIGURES)
def test_all_other_texts_are_read_on_the_page(name: str) -> None:
    found = list(words(small_figure(name)[1]))
    for mode in MODES:
        faint = {
            (where, color)
            for where, color in found
            if contrast(shown(color, mode), shown(PAPER, mode)) < TEXT
        }
        assert faint == set(), mode


def inside(figure: go.Figure, mode: str) -> Iterator[tuple[Rgb, Rgb]]:
    """The ground and the text of each mark with a text inside."""
    for trace in figure.select_traces({"type": "scatter"}):
        if "text" in (trace.mode or "") and trace.textposition is None:
            look = trace.marker
            inks = each(trace.textfont.color, len(trace.x))
            for ground, ink, text in zip(look.color, inks, trace.text, strict=True):
                there = ground if isinstance(ground, str) else None
                fill = along(look.colorscale, ground, mode) if there is None else shown(there, mode)
                if text:
                    yield fill, shown(ink, mode)


@pytest.mark.parametrize("name", FIGURES)
def test_the_texts_inside_of_marks_are_read_on_them(name: str) -> None:
    for mode in MODES:
        found = [contrast(*pair) for pair in inside(small_figure(name)[1], mode)]
        assert len(found) > 8 or name not in ("causal-graph", "sudoku")
        assert min(found, default=TEXT) >= TEXT, mode


def marks(figure: go.Figure) -> Iterator[tuple[str, str, float]]:
    """Every line, bar and marker: what it is, its colour, and its opacity."""
    for trace in figure.data:
        alpha, name = 1.0 if trace.opacity is None else trace.opacity, f"{trace.type} {trace.name}"
        if trace.type == "bar":
            yield from ((name, color, alpha) for color in each(trace.marker.color, 1))
        if trace.type != "scatter" or not any(x is not None for x in trace.x):
            continue
        if "lines" in trace.mode:
            yield name, trace.line.color, alpha
        if "markers" in trace.mode:
            own = trace.marker.color
            fills = each(trace.line.color if own is None else own, 1)
            edge = trace.marker.line.color if trace.marker.line.width else None
            drawn = [fill if edge in (None, "white") else edge for fill in fills]
            yield from ((name, color, alpha) for color in drawn)
    for shape in figure.layout.shapes:
        if shape.line.width != 0:
            alpha = 1.0 if shape.opacity is None else shape.opacity
            yield f"shape {shape.type}", shape.line.color, alpha


@pytest.mark.parametrize("name", FIGURES)
def test_all_lines_and_marks_are_seen_on_the_page(name: str) -> None:
    found = list(marks(small_figure(name)[1]))
    for mode in MODES:
        paper = shown(PAPER, mode)
        faint = {
            (what, color)
            for what, color, alpha in found
            if contrast(blend(shown(color, mode), paper, alpha), paper) < LINE
        }
        assert faint == set(), mode


def told(name: str) -> str:
    """All that a reader is told beside the marks of a figure."""
    figure, section = small_figure(name)[1], getattr(FIGURES[name].module(), "SECTION", None)
    axes = [each.title.text or "" for each in (*figure.select_xaxes(), *figure.select_yaxes())]
    notes = [note.text for note in figure.layout.annotations]
    return " ".join([*axes, *notes, section.look_for if section else ""])


@pytest.mark.parametrize("name", FIGURES)
def test_every_line_is_explained_by_the_legend_or_in_words(name: str) -> None:
    figure = small_figure(name)[1]
    named = [trace for trace in figure.data if trace.showlegend and figure.layout.showlegend]
    assert all(trace.name for trace in named)
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
