"""Errors that an argument mends, with the argument apart from the sentence.

A call takes arguments and a command takes flags, so each spells the argument in its own way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """An argument that an error asks for.

    Attributes:
        name: Its name in the call.
        value: The value to give it; None where the caller must find one.
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return f"{self.name}={'' if self.value is None else repr(self.value)}"


class ArgumentError(ValueError):
    """An error that arguments of the call mend.

    Args:
        parts: The sentence in pieces, and each argument as an `Argument`.

    Attributes:
        parts: The same.
    """

    def __init__(self, *parts: str | Argument) -> None:
        self.parts = parts
        super().__init__("".join(map(str, parts)))

    def spelled(self, spell: Callable[[Argument], str]) -> str:
        """The sentence, with each argument as `spell` writes it."""
        return "".join(spell(each) if isinstance(each, Argument) else each for each in self.parts)


def parts_of(error: Exception) -> tuple[str | Argument, ...]:
    """The parts of an error, for another error that quotes it."""
    return error.parts if isinstance(error, ArgumentError) else (str(error),)
