"""The errors that loading and saving raise about a file's content."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 2


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names the file and the rule.

    Args:
        message: The sentence; line breaks of a quoted error become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"\s*[\n\r]\s*", " ", message).strip())


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
        super().__init__(self.sentence(lambda name: _PYTHON.get(name, f"{name}=")))

    def sentence(self, spell: Callable[[str], str]) -> str:
        """The message, with each argument in the caller's spelling.

        Args:
            spell: The spelling of an argument, such as "--n-heads" for "n_heads".
        """
        facts = ", and ".join(self.needed.values())
        passed = " and ".join(spell(name) for name in self.needed)
        more = " and ".join(spell(name) for name in self.useful)
        questions = f"; to ask questions of the model, pass {more} too" if more else ""
        return f"{self.path} does not say {facts}; pass {passed}{questions}"


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
        raise CheckpointError(f"{path}: {error}") from None


_PYTHON = {"input_injection": "input_injection=True or input_injection=False"}


def shown(value: object) -> str:
    """A value from a file as part of a message: its repr, cut where it is long or deep."""
    return _SHORT.repr(value)
