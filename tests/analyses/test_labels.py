"""Tokens and names that look like HTML come out letter by letter in every figure."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from loopscope.analyses.common.figures import FIGURES
from loopscope.interp.drawing.labels import label
from small_figures import small_figure

NASTY = ("</a>", "<s>", "<br>q", "a&lt;b")


def nasty(count: int) -> tuple[str, ...]:
    return tuple(f"{i}{NASTY[i % len(NASTY)]}" for i in range(count))


def feature(record: Any) -> Any:
    tokens = tuple(nasty(len(each)) for each in record.tokens)
    return replace(record, tokens=tokens, raised=nasty(len(record.raised)))


def panels(record: Any) -> Any:
    named = [replace(each, checkpoint=NASTY[0] + NASTY[1] + NASTY[2]) for each in record.panels]
    return replace(record, panels=tuple(named))


def lens(record: Any) -> Any:
    tokens = nasty(len(record.tokens))
    top = tuple(nasty(len(row)) for row in record.top)
    return replace(record, tokens=tokens, top=top, tracked=nasty(len(record.tracked)))


def patch(record: Any) -> Any:
    tokens = nasty(len(record.clean_tokens))
    return replace(record, clean=("q",), clean_tokens=tokens, corrupted_tokens=tokens[::-1])


def shortcut(record: Any) -> Any:
    maps = [replace(each, texts=("q",), tokens=nasty(len(each.tokens))) for each in record.maps]
    return panels(replace(record, maps=tuple(maps)))


def ranks(record: Any) -> Any:
    return replace(record, texts=(" ".join(NASTY),), targets=nasty(len(record.targets)))


WITH: dict[str, Callable[[Any], Any]] = {
    "lens": lens,
    "patch": patch,
    "shortcut": shortcut,
    "ranks": ranks,
    "feature": feature,
    "orbits": lambda record: replace(record, labels=nasty(len(record.labels))),
    "steps": lambda record: replace(record, groups=nasty(len(record.groups))),
    "readouts": lambda record: replace(
        record,
        tokens=nasty(len(record.tokens)),
        top=tuple(nasty(len(row)) for row in record.top),
        answer="".join(NASTY),
    ),
    "overthinking": lambda record: replace(record, groups=nasty(len(record.groups))),
    "exit-gate": lambda record: replace(record, tokens=tuple(map(nasty, map(len, record.tokens)))),
    "stages": lambda record: replace(record, stages=("".join(NASTY),)),
    "generalisation": lambda record: replace(
        record, checkpoints=tuple("".join(NASTY) for _ in record.checkpoints)
    ),
    **dict.fromkeys(("recurrence-grids", "margins", "halting-compare", "flips"), panels),
}
"""For each figure that shows a user's words, its record with such words."""


@pytest.mark.parametrize("name", WITH)
def test_every_word_of_the_users_is_shown_letter_by_letter(name: str) -> None:
    record = WITH[name](small_figure(name)[0])
    text = json.dumps(FIGURES[name].module().figure(record).to_plotly_json(), default=str)
    shown = [word for word in NASTY if label(word) in text]
    assert len(shown) >= 2
    assert [word for word in NASTY if word in text] == []


def test_a_label_is_undone_by_reading_it_as_html() -> None:
    for word in (*NASTY, "<br>", "<e_3>", "KL < 0.01", "a & b"):
        assert html.unescape(label(word)) == word
        assert not {"<", ">"} & set(label(word))


def test_the_other_figures_show_no_words_of_the_users() -> None:
    assert set(FIGURES) - set(WITH) == {
        "recurrence",
        "halting",
        "causal-graph",
        "circuit",
        "attention-settling",
        "layers",
        "lyapunov",
        "attractors",
        "schedule-edit",
        "inference-stages",
        "code-transfer",
        "realignment",
        "cell-patch",
        "fixed-points",
        "sudoku",
        "grokking",
        "hop-updates",
    }
