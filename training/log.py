"""A run's log: lines of JSON, and the same numbers for TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from loopscope.models.basis.files import atomic_path
from loopscope.training.recipes import Recipe
from loopscope.training.state import Progress


class Log:
    """The log of a run, one entry per evaluation. A resumed run cuts off the entries that came
    after its saved state.

    Args:
        folder: The folder of the run, for log.jsonl and the folder tensorboard.
        recipe: The recipe of the run.
        update: Updates done in the state that the run resumes from.
        wandb: Whether to report to Weights & Biases too.

    Raises:
        ImportError: wandb is asked for and not installed.
    """

    def __init__(self, folder: Path, recipe: Recipe, update: int, wandb: bool) -> None:
        self.path = folder / "log.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        with atomic_path(self.path) as temporary:
            temporary.write_text(
                "".join(line + "\n" for line in lines if _updates_of(line) <= update)
            )
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=update + 1 if update else None
        )
        self._wandb = _start_wandb(folder, recipe) if wandb else None

    def write(self, progress: Progress, accuracy: dict[str, float], **values: float) -> None:
        """Append one entry: the progress, the accuracy of each test group, and other numbers."""
        line = {**asdict(progress), **values, "accuracy": accuracy}
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {
            **values,
            "stage": progress.stage,
            **{f"accuracy/{group}": share for group, share in accuracy.items()},
        }
        for name, number in numbers.items():
            self._board.add_scalar(name, number, progress.update)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=progress.update)

    def close(self) -> None:
        """Finish the reports."""
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _updates_of(line: str) -> float:
    """The updates that an entry tells of; infinitely many for a line that was cut short."""
    try:
        return int(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _start_wandb(folder: Path, recipe: Recipe) -> Any:
    try:
        wandb = import_module("wandb")
    except ImportError:
        raise ImportError(
            "reporting to Weights & Biases needs the package wandb; install it, or leave wandb out"
        ) from None
    return wandb.init(
        project="loopscope",
        name=recipe.name,
        dir=str(folder),
        config=asdict(recipe),
        resume="allow",
        id=_run_id(folder),
    )


def _run_id(folder: Path) -> str:
    return folder.resolve().as_posix().strip("/").replace("/", "-")[-100:]
