"""The colours of a figure's marks and texts, each with its ground."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go

from looks.colours import PAPER, Rgb, along, blend, contrast, shown

MODES = ("light", "dark")
TEXT, LINE = 4.5, 3.0
"""The least contrast ratios of WCAG 2.2: success criteria 1.4.3 for texts, 1.4.11 for marks."""


def hard_to_see(figure: go.Figure) -> list[str]:
    """What is below the least contrast on a light or on a dark page: texts in cells and in marks,
    other texts, and lines, bars and markers.
    """
    found = []
    for mode in MODES:
        paper = shown(PAPER, mode)
        for ground, ink in (*cells(figure, mode), *inside(figure, mode)):
            if contrast(ground, ink) < TEXT:
                found.append(f"{mode}: text in {ink} on {ground}")
        for where, color in words(figure):
            if contrast(shown(color, mode), paper) < TEXT:
                found.append(f"{mode}: {where} in {color}")
        for what, color, alpha in marks(figure):
            if contrast(blend(shown(color, mode), paper, alpha), paper) < LINE:
                found.append(f"{mode}: {what} in {color}")
    return sorted(set(found))


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


def marks(figure: go.Figure) -> Iterator[tuple[str, str, float]]:
    """Every line, bar and marker: what it is, its colour, and its opacity."""
    for trace in figure.data:
        alpha, name = 1.0 if trace.opacity is None else trace.opacity, f"{trace.type} {trace.name}"
        if trace.type == "bar":
            yield from ((name, color, alpha) for color in each(trace.marker.color, 1))
        if trace.type != "scatter" or not any(x is not None for x in trace.x):
            continue
        mode = trace.mode or "lines+markers"
        if "lines" in mode:
            yield name, trace.line.color, alpha
        if "markers" in mode:
            own = trace.marker.color
            fills = each(trace.line.color if own is None else own, 1)
            edge = trace.marker.line.color if trace.marker.line.width else None
            drawn = [fill if edge in (None, "white") else edge for fill in fills]
            yield from ((name, color, alpha) for color in drawn)
    for shape in figure.layout.shapes:
        if shape.line.width != 0:
            alpha = 1.0 if shape.opacity is None else shape.opacity
            yield f"shape {shape.type}", shape.line.color, alpha
