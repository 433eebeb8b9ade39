"""JSON files of a checkpoint, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loopscope.checkpoints.errors import CheckpointError


def read_json(path: Path) -> Any:
    """The file's content."""
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The content of a file that must hold an object."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value, indented."""
    path.write_text(json.dumps(value, indent=1) + "\n")
