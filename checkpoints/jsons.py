"""JSON and YAML files of a checkpoint, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from loopscope.checkpoints.errors import CheckpointError
from loopscope.tasks import jsons


def read_json(path: Path) -> Any:
    """The content of a file; every number in it is finite.

    Raises:
        FileNotFoundError: No such file.
        CheckpointError: The file cannot be read, or is not valid JSON.
    """
    try:
        return jsons.read_json(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    """The content of a file that must hold an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def read_section(path: Path, name: str) -> dict[str, Any]:
    """One section of a YAML file, which must hold fields by name.

    Raises:
        CheckpointError: The file cannot be read, is not plain YAML, or has no such section.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as plain YAML ({type(error).__name__})"
        ) from None
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise CheckpointError(f"{path} must have a section {name!r} of fields by name")
    return section


def write_json(path: Path, value: Any) -> None:
    """Write a value, indented.

    Raises:
        ValueError: The value holds a number that is not finite.
    """
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
