"""The checks of a config's fields: each by its annotation, and by the limits that it carries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MOST = 2**24  # of any size in elements
MOST_BLOCKS = 2**14  # of any number of blocks or of runs of them


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers that a field may hold.

    Attributes:
        least, most: The smallest and the largest; None for the default (integers from 1 to `MOST`,
            other numbers without limits).
        above: A number that the field must be greater than; None for none.
    """

    least: float | int | None = None
    most: float | int | None = None
    above: float | int | None = None


def limits(
    least: float | int | None = None,
    most: float | int | None = None,
    above: float | int | None = None,
) -> dict[str, Limits]:
    """The metadata of a field with limits; the arguments are those of `Limits`."""
    return {"limits": Limits(least, most, above)}


BASE_OF_ANGLES = limits(least=2.0**-126)  # the inverse of a smaller one is infinite in float32


def check_fields(config: type, values: Mapping[str, Any]) -> None:
    """Raise ValueError, with the field's name, for a value that its field does not take.

    Args:
        config: A dataclass.
        values: By field; a field that is absent is not checked.
    """
    hints = _hints(config)
    for field in dataclasses.fields(config):
        if field.init and field.name in values:
            own = field.metadata.get("limits", Limits())
            wrong = _wrong(values[field.name], hints[field.name], own)
            if wrong:
                raise ValueError(f"{field.name} must be {wrong}, got {values[field.name]!r:.200}")


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _wrong(value: object, hint: Any, own: Limits) -> str | None:
    """The rule that a value breaks; None where it breaks none."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None:
        return None if NoneType in options else "given"
    if get_origin(options[0]) is Literal:
        choices = get_args(options[0])
        return None if any(value is c or value == c for c in choices) else _one_of(choices)
    if bool in options:
        return None if isinstance(value, bool) else "true or false"
    if int in options or float in options:
        return _wrong_number(value, own, whole=float not in options)
    kind = get_origin(options[0]) or options[0]
    if kind is Sequence:
        return None if isinstance(value, list | tuple) else "a list"
    names = {str: "a text", Mapping: "a mapping"}
    return names[kind] if kind in names and not isinstance(value, kind) else None


def _wrong_number(value: object, own: Limits, *, whole: bool) -> str | None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return "an integer" if whole else "a number"
    if not whole and not _is_finite(value):
        return "finite"
    least, most = (own.least, own.most) if not whole else _defaults(own)
    if least is not None and value < least:
        return f"at least {least}"
    if most is not None and value > most:
        return f"at most {most}"
    return f"greater than {own.above}" if own.above is not None and value <= own.above else None


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _defaults(own: Limits) -> tuple[float | int, float | int]:
    return 1 if own.least is None else own.least, MOST if own.most is None else own.most


def _one_of(choices: tuple[Any, ...]) -> str:
    shown = [repr(choice) for choice in choices]
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
