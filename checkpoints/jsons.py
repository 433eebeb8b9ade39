"""JSON files of a checkpoint, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def write_json(path: Path, value: Any) -> None:
    """Write a value, indented.

    Raises:
        ValueError: The value holds a number that is not finite.
    """
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
