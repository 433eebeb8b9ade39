"""The full state of a run on disk, and its log.

The state is written atomically, so that a kill at any moment loses at most the updates since then.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopscope.models.core.files import atomic_path
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
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_state(
    path: Path, recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Put a saved state into a model and its optimiser.

    Raises:
        ValueError: The state is of another recipe.
    """
    content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if content["recipe"] != recipe_text(recipe):
        raise ValueError(
            f"{path} was written by a run of another recipe; choose another folder, or the recipe"
            " that it was started with"
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    return Progress(**content["progress"])


def recipe_text(recipe: Recipe) -> str:
    """A recipe as JSON, to compare and to show."""
    return json.dumps(asdict(recipe), sort_keys=True)
