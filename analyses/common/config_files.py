"""Settings of an analysis from a JSON file, such as the one that each run writes beside its
results.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

from loopscope.analyses.common.configs import OutputConfig, is_setting

MADE_WITH = "made_with"
"""The part of a settings file that says what made the results; it is no setting."""


def defaults_from_file(command: type, config: type, path: Path) -> Any:
    """A command whose settings are those of a file, and the defaults for the rest.

    Raises:
        ValueError: Not a JSON object, or a setting that the command does not have.
    """
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object of settings, got {type(values).__name__}")
    values.pop(MADE_WITH, None)
    known = [
        field.name
        for kind in (config, OutputConfig)
        for field in fields(kind)
        if is_setting(field.name)
    ]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(
            f"{path} has the setting {unknown[0]!r}, which this command does not have; its settings"
            f" are {', '.join(known)}"
        )
    return command(config=_made(config, values), output=_made(OutputConfig, values))


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(kind)
    own = {field.name: values[field.name] for field in fields(kind) if field.name in values}
    return kind(**{name: _as_hinted(value, str(hints[name])) for name, value in own.items()})


def _as_hinted(value: Any, hint: str) -> Any:
    """JSON has no paths and no tuples."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and "Path" in hint else value


def settings(config: Any) -> dict[str, Any]:
    """A config in the form of a settings file."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in values.items()
        if is_setting(name)
    }
