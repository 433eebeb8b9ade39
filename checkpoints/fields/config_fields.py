"""A released config.json, read field by field; a field that the table does not read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from loopscope.checkpoints.contents import Contents, Kind
from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.harmless import Reasons, changes_nothing
from loopscope.models.basis.arguments import Argument

_REQUIRED = object()


class ConfigFields:
    """The fields of a released config under their own names.

    A table reads the fields that the forward pass depends on, refuses the values that are not
    computed here, and ends with `done`.

    Args:
        values: The content of config.json.
        path: The file of the config, for messages.
        tensors: The weights, which bound the sizes in the config; None for no bounds.
        harmless: The family's fields that never change a result, by the reason.
        inside: The field that holds these values; "" for the config itself.
        ignorable: Whether `load` can be told to ignore a field.

    Attributes:
        seen: The names of the fields that have been read or passed over.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        path: Path,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        harmless: Reasons | None = None,
        inside: str = "",
        ignorable: bool = True,
    ) -> None:
        self._values, self.path = values, path
        self._harmless, self._inside, self._ignorable = harmless or {}, inside, ignorable
        self._contents = None if tensors is None else Contents.of(tensors)
        self.seen: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def given(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: Any = _REQUIRED) -> Any:
        """A whole number of at least 0."""
        value = self._read(name, (int,), "a whole number", default)
        if value is not None and value < 0:
            raise CheckpointError(f"{self.path}: {name} must be at least 0, got {value}")
        return value

    def integers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of whole numbers."""
        found = self._read(name, (list,), "a list of whole numbers", default)
        if not all(type(value) is int for value in found or ()):
            raise CheckpointError(
                f"{self.path}: {name} must be a list of whole numbers, got {shown(found)}"
            )
        return found

    def layers(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of layers, each of which has weights of its own."""
        return self._size(name, default, "layers")

    def width(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of channels, heads or tokens."""
        return self._size(name, default, "width")

    def iterations(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of iterations."""
        return self._size(name, default, "iterations")

    def positions(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number of positions."""
        return self._size(name, default, "positions")

    def number(self, name: str, default: Any = _REQUIRED) -> Any:
        """A number, as a float."""
        value = self._read(name, (int, float), "a number", default)
        return float(value) if isinstance(value, int) else value

    def boolean(self, name: str, default: Any = _REQUIRED) -> Any:
        """true or false."""
        return self._read(name, (bool,), "true or false", default)

    def text(self, name: str, default: Any = _REQUIRED) -> Any:
        """A string."""
        return self._read(name, (str,), "a string", default)

    def mapping(self, name: str, default: Any = _REQUIRED) -> Any:
        """An object whose values are plain: text, a number, true, false or null."""
        found = self._read(name, (dict,), "an object", default)
        for key, value in (found or {}).items():
            if not isinstance(value, str | int | float | None):
                raise CheckpointError(
                    f"{self.path}: {name}.{key} must be text, a number, true, false or null, got"
                    f" {shown(value)}"
                )
        return found

    def texts(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list of strings."""
        found = self._read(name, (list,), "a list of strings", default)
        if not all(isinstance(value, str) for value in found or ()):
            raise CheckpointError(
                f"{self.path}: {name} must be a list of strings, got {shown(found)}"
            )
        return found

    def section(self, name: str) -> ConfigFields:
        """The fields of an object inside the config; the table ends them with `done` too."""
        inner = ConfigFields(self._read(name, (dict,), "an object", _REQUIRED), self.path)
        inner._contents = self._contents
        return inner

    def only(self, name: str, *allowed: Any, why: str = "") -> None:
        """Refuse a field with any other value; an absent field counts as the first value."""
        value = self._values.get(name, allowed[0])
        self.seen.add(name)
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed
        ):
            choices, reason = " or ".join(map(shown, allowed)), f"; {why}" if why else ""
            raise CheckpointError(
                f"{self.path}: {name} must be {choices}, got {shown(value)}{reason}"
            )

    def unused(self, *names: str) -> None:
        """Pass over fields that change nothing beside the others of this config."""
        self.seen.update(names)

    def done(self) -> None:
        """Refuse the fields that have not been read and that could change a result."""
        unknown = sorted(
            name
            for name in set(self._values) - self.seen
            if not changes_nothing(name, self._values, self._harmless)
        )
        if not unknown:
            return
        value, where = (
            shown(self._values[unknown[0]]),
            f" in {self._inside}" if self._inside else "",
        )
        also = f" (and so are {', '.join(map(shown, unknown[1:]))})" if unknown[1:] else ""
        ignored = Argument("ignore", tuple(unknown) if not self._inside else (self._inside,))
        hint = ("; ", ignored, " reads the config without it") if self._ignorable else ()
        raise CheckpointError(
            f"{self.path} has the field {shown(unknown[0])}{where} (= {value}), which this family's"
            f" loader does not know; it is refused{also}, because it could change what the model"
            " computes",
            *hint,
        )

    def _size(self, name: str, default: Any, kind: Kind) -> Any:
        value = self.integer(name, default)
        if value is not None and self._contents is not None:
            self._contents.check(self.path, name, value, kind)
        return value

    def _read(self, name: str, kinds: tuple[type, ...], what: str, default: Any) -> Any:
        self.seen.add(name)
        if name not in self._values or (self._values[name] is None and default is not _REQUIRED):
            if default is _REQUIRED:
                raise CheckpointError(f"{self.path} lacks the field {name!r}, which must be {what}")
            return default
        value = self._values[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise CheckpointError(f"{self.path}: {name} must be {what}, got {shown(value)}")
        return value
