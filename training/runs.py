"""A named recipe, run to its end by the trainer of its kind."""

from __future__ import annotations

from pathlib import Path

from loopscope.training.catalog import RECIPES
from loopscope.training.puzzles.recipes import PUZZLE_RECIPES
from loopscope.training.puzzles.trainer import train_solver
from loopscope.training.trainer import Trainer


def train(
    name: str,
    folder: Path | None = None,
    *,
    resume: bool = False,
    release: bool = False,
    wandb: bool = False,
) -> Path:
    """Run a named recipe to its end.

    Args:
        name: The name of the recipe.
        folder: The folder of the run; None means runs/<name>.
        resume, release, wandb: As in `Trainer`.

    Returns:
        The folder of the finished checkpoint.

    Raises:
        ValueError: No recipe of that name, or `release` for a puzzle solver.
    """
    if name in PUZZLE_RECIPES:
        if release:
            raise ValueError(f"{name} has no released layout to write; leave release out")
        return train_solver(
            PUZZLE_RECIPES[name], folder or Path("runs") / name, resume=resume, wandb=wandb
        )
    if name not in RECIPES:
        known = ", ".join((*RECIPES, *PUZZLE_RECIPES))
        raise ValueError(f"there is no recipe {name!r}; the recipes are {known}")
    trainer = Trainer(
        RECIPES[name], folder or Path("runs") / name, resume=resume, release=release, wandb=wandb
    )
    trainer.run()
    return trainer.folder / trainer.recipe.stages[-1].name
