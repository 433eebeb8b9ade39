"""The full state of a run on disk, and its log.

The state is written atomically, so that a kill at any moment loses at most the updates since then.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopscope.models.basis.files import atomic_path
from loopscope.training.recipes import Recipe


@dataclass
class Progress:
    """The progress of a run.

    Attributes:
        stage: Index of the stage.
        stage_update: Updates done in that stage.
        update: Updates done in all.
        seconds: Time spent.
    """

    stage: int = 0
    stage_update: int = 0
    update: int = 0
    seconds: float = 0.0


def save_state(
    path: Path,
    recipe: Recipe,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state that the next update depends on. Random draws depend on the recipe's seed and
    the progress alone.
    """
    content = {
        "recipe": recipe_text(recipe),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    try:
        with atomic_path(path) as temporary:
            torch.save(content, temporary)
    except (OSError, RuntimeError) as error:  # torch raises the latter on a full disk
        raise OSError(
            f"{path} could not be written, so the state before it is still there; make room on the"
            f" disk and go on with --resume: {one_line(error)}"
        ) from None


def load_state(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a saved state into a model and its optimiser.

    Raises:
        ValueError: The state is of another recipe, or damaged.
    """
    with _damage(path):
        content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        written_by, progress = content["recipe"], Progress(**content["progress"])
    if written_by != recipe_text(recipe):
        raise ValueError(
            f"{path} was written by a run of another recipe; choose another folder, or the recipe"
            " that it was started with"
        )
    with _damage(path):
        model.load_state_dict(content["model"])
        optimizer.load_state_dict(content["optimizer"])
    return progress


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """A context in which every error is that the state is damaged; torch raises many types."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}), so the run cannot go on; remove it to"
            " start the run again, or choose another folder"
        ) from None


def one_line(error: Exception) -> str:
    """The message of an error without its line breaks."""
    return " ".join(str(error).split())


def recipe_text(recipe: Recipe) -> str:
    """A recipe as JSON, to compare and to show."""
    return json.dumps(asdict(recipe), sort_keys=True)
