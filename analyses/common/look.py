"""Colours and names of hop counts, groups and runs; notes and marks of loops in figures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import plotly.graph_objects as go

from loopscope.interp.drawing.labels import label, shortened
from loopscope.interp.drawing.look import BLUES, CATEGORIES, FAINT, MARK, ORANGES, shades

ANSWERED = " → "
"""Between a text and its answer."""
GROUP_COLORS = {
    "train_inferred": FAINT,
    "test_inferred_iid": CATEGORIES[0],
    "test_inferred_ood": MARK,
}
GROUP_NAMES = {
    "train_inferred": "training facts",
    "test_inferred_iid": "ID facts",
    "test_inferred_ood": "OOD facts",
}


def note(plot: go.Figure, text: str, **place: Any) -> None:
    """Write a line of text into a figure, without an arrow.

    Args:
        place: Where and how, in the words of plotly's annotations.
    """
    plot.add_annotation(**{"text": text, "showarrow": False, "font": {"size": 11}} | place)


def shade_loops(
    plot: go.Figure, shape: tuple[int, int], axis: Literal["x", "y"], **place: int
) -> None:
    """Shade every second loop along an axis of effective depth, on which a block of width 1 lies
    around each number.

    Args:
        shape: Iterations and layers.
        place: The row and the column of the panel.
    """
    loops, layers = shape
    shade = {"fillcolor": FAINT, "opacity": 0.18, "line_width": 0, "layer": "below"}
    for loop in range(1, loops, 2):
        ends = {f"{axis}{end}": (loop + end) * layers + 0.5 for end in (0, 1)}
        (plot.add_vrect if axis == "x" else plot.add_hrect)(**ends, **shade, **place)


def hop_colors(hops: Sequence[int], trained: int | None) -> dict[int, str]:
    """Blues for hop counts seen in training, oranges for those beyond."""
    inside = [hop for hop in hops if trained is None or hop <= trained]
    beyond = [hop for hop in hops if hop not in inside]
    colors: dict[int, str] = {}
    for group, scale in ((inside, BLUES), (beyond, ORANGES)):
        colors |= dict(zip(group, shades(scale, len(group)), strict=True))
    return colors


def hop_name(hops: int) -> str:
    """ "1 hop", "2 hops", ...; texts without relations have none, and are "all"."""
    return f"{hops} hop" + "s" * (hops != 1) if hops else "all"


def groups_along(plot: go.Figure, hops: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Name the groups along the lowest x axes of a figure, and give the place of each group.

    Args:
        hops: The hop counts; empty where the groups are texts.
        texts: The texts with their answers, at the places 0, 1, ...; the axis has no answers.
    """
    if not texts:
        plot.update_xaxes(title="hops", dtick=1)
        return list(hops)
    places, names = list(range(len(texts))), [_beginning(text) for text in texts]
    span = [-0.6, len(texts) - 0.4]
    plot.update_xaxes(tickvals=places, ticktext=names, tickangle=-30, range=span)
    return places


def _beginning(text: str) -> str:
    return label(shortened(text.rpartition(ANSWERED)[0] or text, 20))


def model_label(loops: tuple[int, int], n_layers: int) -> str:
    """Fewest and most iterations, and layers: "R = 4, L = 2", "R = 2 to 8, L = 2"."""
    low, high = loops
    return f"R = {low if low == high else f'{low} to {high}'}, L = {n_layers}"


def run_colors(loops: Sequence[int]) -> list[str]:
    """Oranges for runs of one iteration, blues for the others, darker with more iterations; runs of
    one kind keep their order.
    """
    colors = [""] * len(loops)
    for scale, chosen in (
        (ORANGES, [i for i, n in enumerate(loops) if n == 1]),
        (BLUES, [i for i, n in enumerate(loops) if n > 1]),
    ):
        chosen = sorted(chosen, key=lambda i: loops[i])
        for i, color in zip(chosen, shades(scale, len(chosen)), strict=True):
            colors[i] = color
    return colors


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights of labels moved up where needed, so that no two are closer than `gap`; their order
    stays.
    """
    placed = list(heights)
    order = sorted(range(len(placed)), key=lambda i: heights[i])
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    return placed
