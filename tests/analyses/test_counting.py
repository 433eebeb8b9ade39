"""Coordinates count from 0 and amounts are amounts, in every figure's frame and drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pandas as pd
import plotly.graph_objects as go
import pytest

from loopscope.analyses.common.figures import FIGURES
from loopscope.interp.drawing.labels import AXIS, loop_and_layer, spoken, tick
from small_figures import small_figure

COORDINATES = ("loop", "layer", "position", "head", "input")
LEAST = {"iterations": 1, "depth": 1, "hops": 1}
LEAST_OF = {
    ("steps", "iterations"): 0,
    ("causal-graph", "depth"): 0,
    ("flips", "iterations"): 2,
    ("halting", "iterations"): 2,
    ("halting-compare", "iterations"): 2,
}
"""Where the state before the first iteration or block has a row, or two answers are compared."""


@pytest.mark.parametrize("name", FIGURES)
def test_a_frame_has_coordinates_from_0_and_amounts_from_1(name: str) -> None:
    frame = small_figure(name)[0].frame()
    assert not {"iteration", "r", "block"} & set(frame.columns)
    for column in [each for each in COORDINATES if each in frame.columns]:
        if pd.api.types.is_numeric_dtype(frame[column]):
            assert frame[column].min() == 0, column
    for column in [each for each in LEAST if each in frame.columns]:
        least = frame[column].dropna().min()
        if (name, column) == ("attractors", "iterations"):
            assert least >= LEAST[column], "a state settles after some iterations"
        else:
            assert least == LEAST_OF.get((name, column), LEAST[column]), column
    for column in [each for each in frame.columns if each in ("visit", "hook")]:
        places = frame[[column, "loop"]].drop_duplicates()
        assert "loops.0.blocks.0" in {place.partition(".hook")[0] for place in places[column]}
        for place, loop in places.itertuples(index=False):
            assert loop_and_layer(place)[0] == (None if pd.isna(loop) else loop)


@pytest.mark.parametrize("name", FIGURES)
def test_a_table_names_no_single_iteration(name: str) -> None:
    table = small_figure(name)[0].summary()
    words = [
        *table.columns,
        *(word for word in table.to_numpy().flatten() if isinstance(word, str)),
    ]
    assert [word for word in words if re.search(r"\biteration\b", word)] == []


def axes(figure: go.Figure) -> Iterator[tuple[str, list[object]]]:
    """The title of each axis with the values that are drawn along it."""
    for trace in figure.data:
        for letter in "xy":
            at = getattr(trace, f"{letter}axis", None) or letter
            axis = figure.layout[f"{letter}axis{at[1:]}"]
            values = [value for value in (trace[letter] or ()) if value is not None]
            yield (axis.title.text or ""), values


@pytest.mark.parametrize("name", FIGURES)
def test_an_axis_of_loops_begins_with_0_and_one_of_iterations_with_1(name: str) -> None:
    figure = small_figure(name)[1]
    for title, values in axes(figure):
        assert not re.search(r"\biteration\b", title)
        if title == "loop" and values:
            assert min(values) == 0
        if re.fullmatch("iterations( r)?", title) and name != "flips":
            assert min(values) >= 1
        if title.startswith(AXIS):
            assert values[0] in ("0.0", "embed")
            assert "0.1" in values or "1.0" in values
    text = json.dumps(figure.to_plotly_json(), default=str)
    assert not re.search(r"\biteration(\.layer|\.block|<| [0-9%])", text)


@pytest.mark.parametrize("name", ["lens", "patch", "shortcut", "ranks", "stages", "causal-graph"])
def test_the_full_hook_name_is_in_the_hover_text(name: str) -> None:
    text = json.dumps(small_figure(name)[1].to_plotly_json(), default=str)
    assert "loops.0.blocks.1" in text
    assert "hook_resid_post" in text


@pytest.mark.parametrize(
    ("place", "short", "sentence", "loop", "layer"),
    [
        ("hook_embed", "embed", "embedding", None, None),
        ("loops.2.blocks.0", "2.0", "loop 2 · block 0", 2, 0),
        ("loops.2.blocks.0.attn.hook_z", "2.0", "loop 2 · block 0", 2, 0),
        ("prelude.1", "prelude.1", "prelude 1", None, 1),
        ("coda.0.hook_resid_post", "coda.0", "coda 0", None, 0),
        ("loops.1.low.3.blocks.2", "1.low.3.2", "loop 1 · low 3 · block 2", 1, 2),
        ("loops.0.high.blocks.1", "0.high.1", "loop 0 · high · block 1", 0, 1),
        ("loops.4.hook_state_out", "4", "loop 4", 4, None),
    ],
)
def test_a_place_is_written_as_its_coordinate(
    place: str, short: str, sentence: str, loop: int | None, layer: int | None
) -> None:
    assert (tick(place), spoken(place), loop_and_layer(place)) == (short, sentence, (loop, layer))


def test_a_rank_of_0_is_the_top() -> None:
    lens = small_figure("lens")[0].frame()
    (column,) = [each for each in lens.columns if each.startswith("rank of")][-1:]
    top = lens[lens["top"] == column.removeprefix("rank of ")]
    assert len(top) > 0
    assert set(top[column]) == {0}
    ranks = small_figure("ranks")[0].frame()
    sure = ranks[ranks["share_on_top"] == 1]
    assert len(sure) > 0
    assert set(sure["geometric_mean_rank"]) == {0}
