"""Numbers that a caller gives: how many of something, real numbers within bounds, tensors."""

from __future__ import annotations

import math
import operator
import reprlib
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor


def is_bool(number: object) -> bool:
    """Whether something is True or False, also in a tensor or of numpy: Python would take it for 1
    or 0.
    """
    kind = str(getattr(number, "dtype", ""))
    return isinstance(number, bool) or kind.removeprefix("torch.") == "bool"


def checked_integer(number: object, name: str) -> int:
    """A whole number, as Python's integer.

    Args:
        number: An integer of Python or numpy, or a tensor that holds one.
        name: The argument's, for the error.

    Raises:
        TypeError: No integer; True and False are none.
    """
    whole = None
    with suppress(TypeError):
        if not is_bool(number):
            whole = operator.index(number)  # type: ignore[arg-type]
    if whole is None:
        raise TypeError(f"{name} must be an integer, got {_shown(number)}")
    return whole


def checked_count(number: object, name: str, least: int = 1) -> int:
    """How many of something, as Python's integer.

    Args:
        number, name: As for `checked_integer`.
        least: The smallest that there may be.

    Raises:
        TypeError: No integer.
        ValueError: Fewer than the least.
    """
    count = checked_integer(number, name)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count


def checked_number(
    number: object,
    name: str,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    infinite: bool = False,
) -> float:
    """A number within bounds, as Python's float.

    Args:
        number: A number of Python or numpy, or a tensor that holds one.
        name: The argument's, for the error.
        above, below: Bounds that the number must not reach.
        least, most: Bounds that the number may reach.
        infinite: Whether it may be infinite, as a threshold that is never met.

    Raises:
        TypeError: No number; True and False are none, and neither is a text.
        ValueError: NaN, infinite, or out of bounds.
    """
    value = None
    with suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if not is_bool(number) and not isinstance(number, str | bytes):
            held = number.detach() if isinstance(number, Tensor) else number
            value = float(held)  # type: ignore[arg-type]
    if value is None:
        raise TypeError(f"{name} must be a number, got {_shown(number)}")
    inside = above < value < below and least <= value <= most
    if not (inside or (infinite and math.isinf(value) and least <= value <= most)):
        bounds = {"above": above, "at least": least, "at most": most, "below": below}
        said = " and ".join(f"{word} {end:g}" for word, end in bounds.items() if math.isfinite(end))
        kind = "a number" if infinite else "finite"
        raise ValueError(f"{name} must be {kind}{' and ' * bool(said)}{said}, got {value}")
    return value


def checked_factor(number: object, name: str) -> None:
    """Refuse what is neither a finite number nor a tensor of finite numbers, such as one for each
    row.

    Args:
        number, name: As for `checked_number`.

    Raises:
        TypeError: No number and no tensor of numbers.
        ValueError: NaN or infinite.
    """
    if not isinstance(number, Tensor) or number.ndim == 0 or is_bool(number):
        checked_number(number, name)
    elif not bool(number.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {number.tolist()}")


def factor_like(factor: float | int | Tensor, value: Tensor) -> float | int | Tensor:
    """A factor for a value: a tensor in the value's number format and on its device."""
    return factor.to(value) if isinstance(factor, Tensor) else factor


def given_tensor(values: Any) -> Tensor:
    """A caller's tensor where it is, or numbers, lists and arrays of them as a tensor on the CPU:
    not on the default device, to which `torch.as_tensor` moves tensors too.
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def _shown(number: object) -> str:
    return f"{type(number).__name__} ({reprlib.repr(number)})"
