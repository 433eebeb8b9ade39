"""JSON files, read strictly: every number is finite and has at most 64 bits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_MOST_DIGITS = 20  # of a whole number of 64 bits, with its sign


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: Not JSON, or a number that is not finite or has more than 64 bits; the message
            names the file and the place in it.
        OSError: The file cannot be read.
    """
    odd: list[float] = []

    def whole(text: str) -> int | float:
        value = int(text) if len(text) <= _MOST_DIGITS else math.inf
        return value if -(2**63) <= value < 2**63 else noted(math.inf)

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else noted(value)

    def noted(value: float) -> float:
        odd.append(value)
        return value

    try:
        content = json.loads(
            Path(path).read_text(encoding="utf-8"),
            parse_int=whole,
            parse_float=number,
            parse_constant=lambda name: noted(float(name)),
        )
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if odd:
        raise ValueError(
            f"{path}: {_odd_place(content)} must be a finite number of at most 64 bits"
        )
    return content


def _odd_place(content: Any) -> str:
    """The place of the first number that is not finite."""
    left = [("the number", content)]
    while left:
        place, value = left.pop()
        if isinstance(value, float) and not math.isfinite(value):
            return place
        inside = dict(enumerate(value)) if isinstance(value, list) else value
        items = inside.items() if isinstance(inside, dict) else ()
        start = "" if place == "the number" else f"{place}."
        left += reversed([(f"{start}{key}", inner) for key, inner in items])
    return "a number under a key that occurs twice"
