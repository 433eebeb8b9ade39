"""The errors that loading and saving raise about a file's content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr

from loopscope.models.basis.arguments import Argument, ArgumentError, parts_of

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class CheckpointError(ArgumentError):
    """A checkpoint that cannot be used; the message is one line that names the file and the rule.

    Args:
        parts: The sentence, and each argument that mends the error; line breaks of a quoted error
            become spaces.
    """

    def __init__(self, *parts: str | Argument) -> None:
        super().__init__(*(p if isinstance(p, Argument) else _one_line(p) for p in parts))


def _one_line(text: str) -> str:
    return " ".join(filter(None, re.split(r"\s*[\n\r]\s*", text)))


class MissingFacts(CheckpointError):
    """A checkpoint that does not say everything that `load` needs.

    Args:
        path: The file.
        needed: What the file does not say, by the name of the argument that says it.
        useful: Further arguments that the checkpoint can be loaded without, but not questioned.

    Attributes:
        names: The names of all these arguments, needed ones first.
    """

    def __init__(self, path: Path, needed: Mapping[str, str], useful: tuple[str, ...]) -> None:
        self.path, self.needed, self.useful = path, dict(needed), useful
        self.names: tuple[str, ...] = (*needed, *useful)
        facts = f"{path} does not say {', and '.join(self.needed.values())}; pass "
        more: tuple[str | Argument, ...] = ()
        if useful:
            more = ("; to ask questions of the model, pass ", *_listed(useful), " too")
        super().__init__(facts, *_listed(needed), *more)


def _listed(names: Iterable[str]) -> list[str | Argument]:
    """Arguments with "and" between them; of a switch both values are named."""
    parts: list[str | Argument] = []
    for name in names:
        values = _SWITCHES.get(name, (None,))
        for value, link in zip(values, (" and ", *[" or "] * len(values)), strict=False):
            parts += [link, Argument(name, value)]
    return parts[1:]


@contextmanager
def config_errors(path: Path) -> Iterator[None]:
    """A context in which the errors about a config's values name the config's file.

    Args:
        path: The file.

    Raises:
        CheckpointError: In place of a ValueError, TypeError or ArithmeticError.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: ", *parts_of(error)) from None


_SWITCHES = {"input_injection": (True, False)}


def shown(value: object) -> str:
    """A value from a file as part of a message: its repr, cut where it is long or deep."""
    return _SHORT.repr(value)
