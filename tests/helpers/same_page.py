"""Comparing a page that a command writes with the one that is shipped."""

from __future__ import annotations

import re

import pytest

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def assert_same_page(written: str, shipped: str) -> None:
    """The same text, with numbers that another machine's rounding may change a little."""
    assert NUMBER.sub("#", written) == NUMBER.sub("#", shipped)
    numbers = [
        [float(number.replace(",", "")) for number in NUMBER.findall(page)]
        for page in (written, shipped)
    ]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.01, abs=0.03)
