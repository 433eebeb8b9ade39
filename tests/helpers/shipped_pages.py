"""Comparing a page that a command writes with the one that is shipped, and reading docs/families.md
back, so that no test has to run every method on every family again.
"""

from __future__ import annotations

import functools
import re

import pandas as pd
import pytest

from loopscope.analyses.pages.families import Support, facts
from loopscope.models.core.registry import FAMILIES
from paths import DOCS

PAGE = DOCS / "families.md"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def assert_same_page(written: str, shipped: str) -> None:
    """The same text, with numbers that another machine's rounding may change a little."""
    assert NUMBER.sub("#", written) == NUMBER.sub("#", shipped)
    numbers = [
        [float(number.replace(",", "")) for number in NUMBER.findall(page)]
        for page in (written, shipped)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=0.03)


@functools.cache
def shipped() -> Support:
    """What the page says runs, with the reasons that it gives, and the facts of today."""
    text = PAGE.read_text()
    what_runs = text.partition("## What runs")[2].partition("## Why not")[0]
    everywhere, _, rest = what_runs.partition(". Of the others:")
    lines = [line.strip("| ").split(" | ") for line in rest.splitlines() if line.startswith("|")]
    header, rows = [_name(each) for each in lines[0][1:]], {line[0]: line[1:] for line in lines[2:]}
    table = {
        family: dict.fromkeys(map(_name, re.findall("`[a-z_]+`", everywhere)), "yes")
        | dict(zip(header, rows[family], strict=True))
        for family in sorted(FAMILIES)
    }
    reasons = {
        (_name(method), family): why
        for line in text.partition("## Why not")[2].splitlines()
        if line.startswith("* ")
        for where, _, why in [line.removeprefix("* ").partition(": ")]
        for methods, _, families in [where.partition(" on ")]
        for method in methods.split(", ")
        for family in families.split(", ")
    }
    methods = pd.DataFrame(table).rename_axis("method").reset_index()
    return Support(facts(), methods, reasons)


def _name(word: str) -> str:
    return word.strip("`")
