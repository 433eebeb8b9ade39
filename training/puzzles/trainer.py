"""Training of a puzzle solver by deep supervision, with an exponential moving average."""

from __future__ import annotations

import platform
import time
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from loopscope.checkpoints.load import save
from loopscope.models.basis.tokens import Readout, Vocabulary
from loopscope.models.core.registry import build
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver
from loopscope.tasks.puzzles.boards import sudoku_words
from loopscope.training.folder import claim, drafts_of, refuse_unless_resumed
from loopscope.training.log import Log
from loopscope.training.puzzles.data import copies_of, puzzles_of
from loopscope.training.puzzles.recipes import PuzzleRecipe, config_of
from loopscope.training.puzzles.scores import examined, score
from loopscope.training.puzzles.supervision import Carry, Draws, supervise
from loopscope.training.recipes import Stage
from loopscope.training.setup import CPU, descend, finite_loss, fresh_optimizer, random_numbers
from loopscope.training.state import Progress, load_state, save_state


class Learner(nn.Module):
    """All that the next update depends on, as one module: the model, the moving average of its
    trained weights, and the rows between two steps.

    Args:
        recipe: The recipe of the run.
    """

    def __init__(self, recipe: PuzzleRecipe) -> None:
        super().__init__()
        self.model = fresh_solver(recipe).train()
        self.average = deepcopy(self.model).requires_grad_(False).eval()
        rows = Carry.empty(self.model, recipe.batch_size, recipe.task.side**2)
        for name, tensor in rows.tensors().items():
            self.register_buffer(f"rows_{name}", tensor.clone())

    @property
    def rows(self) -> Carry:
        """The rows between two steps."""
        names = (name for name, _ in self.named_buffers(recurse=False))
        return Carry(**{name.removeprefix("rows_"): self.get_buffer(name) for name in names})

    @rows.setter
    def rows(self, rows: Carry) -> None:
        for name, tensor in rows.tensors().items():
            setattr(self, f"rows_{name}", tensor)

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the average towards the weights."""
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 1 - rate)


class PuzzleTrainer:
    """One run of a puzzle recipe in a folder, on the CPU in float32.

    Every update is one supervision step of all rows. The updates of both stages are one run with
    one schedule of the learning rate.

    Args:
        recipe: The recipe to run.
        folder: Holds state.pt (to resume), log.jsonl, TensorBoard's files, and a checkpoint for
            each stage, by its name.
        resume: Whether to go on from state.pt.
        wandb: Whether to report to Weights & Biases.

    Raises:
        ValueError: The folder holds a run already and resume is False, or its state is of another
            recipe.
    """

    def __init__(
        self, recipe: PuzzleRecipe, folder: Path, *, resume: bool = False, wandb: bool = False
    ) -> None:
        self.recipe, self.folder = recipe, folder
        state = folder / "state.pt"
        refuse_unless_resumed(state, resume)
        claim(folder, drafts_of(recipe))
        self.copies = copies_of(recipe.task)
        self.held_out = puzzles_of(recipe.task, held_out=True)
        self.learner = Learner(recipe)
        self.trained = [p for p in self.learner.model.parameters() if p.requires_grad]
        self.optimizer = fresh_optimizer(recipe, self.learner.model)
        self.progress = (
            load_state(state, recipe, self.learner, self.optimizer)
            if state.exists()
            else Progress()
        )
        self.log = Log(folder, recipe, self.progress.update, wandb)

    def run(self) -> None:
        """Train to the end of the last stage; write a checkpoint at the end of each."""
        started, before = time.perf_counter(), self.progress.seconds
        losses: list[float] = []
        with tqdm(
            total=self.recipe.updates, initial=self.progress.update, desc=self.recipe.name
        ) as bar:
            for stage in self.recipe.stages[self.progress.stage :]:
                while self.progress.update < stage.max_updates:
                    losses.append(self.step())
                    bar.update()
                    self.progress.seconds = before + time.perf_counter() - started
                    if self.progress.update % self.recipe.eval_every == 0:
                        bar.set_postfix({"exact": self._evaluate(sum(losses) / len(losses))})
                        losses.clear()
                        self.save()
                self.export(stage)
                self.progress.stage += 1
                self.save()
        self.log.close()

    def step(self) -> float:
        """The next update.

        Returns:
            The loss per puzzle.

        Raises:
            FloatingPointError: The loss is not a number; the saved state is left as it was.
        """
        recipe, update = self.recipe, self.progress.update
        rng = np.random.default_rng((recipe.seed, update))
        draws = Draws.make(
            recipe.batch_size,
            recipe.n_loops,
            torch.Generator().manual_seed(int(rng.integers(2**62))),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.stages[-1].rate(update)
        rows, done = supervise(
            self.learner.model,
            self.learner.rows,
            self.copies.draw(recipe.batch_size, rng),
            draws,
            max_steps=recipe.n_loops,
            exploration=recipe.exploration,
        )
        loss = done.loss / recipe.batch_size
        value = finite_loss(loss, update)
        descend(loss, self.optimizer, self.trained, recipe.clip)
        self.learner.follow(min(recipe.average, (1 + update) / (10 + update)))
        self.learner.rows = rows
        self.progress.update += 1
        self.progress.stage_update += 1
        return value

    def _evaluate(self, loss: float) -> float:
        puzzles = self.held_out[: self.recipe.eval_questions]
        scores = score(self.learner.average, puzzles, self.recipe.n_loops)
        exact = round(float(scores.exact[-1].float().mean()), 4)
        cells = round(float(scores.cells[-1].mean()), 4)
        rate = self.optimizer.param_groups[0]["lr"]
        self.log.write(self.progress, {"exact": exact}, loss=round(loss, 5), cells=cells, lr=rate)
        return exact

    def save(self) -> None:
        """Write the full state."""
        save_state(
            self.folder / "state.pt", self.recipe, self.progress, self.learner, self.optimizer
        )

    def export(self, stage: Stage) -> None:
        """Write the averaged model with its card, unless the stage's folder exists."""
        folder = self.folder / stage.name
        if not folder.exists():
            save(self.learner.average, folder, self._card(stage))

    def _card(self, stage: Stage) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "task": str(recipe.task),
            "n_loops": recipe.n_loops,
            "recipe": asdict(recipe),
            "stage": stage.name,
            "updates": self.progress.update,
            "seconds": round(self.progress.seconds),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            **examined(self.learner.average, self.held_out, recipe.n_loops),
            "held_out_puzzles": [asdict(puzzle) for puzzle in self.held_out],
        }


def fresh_solver(recipe: PuzzleRecipe) -> PuzzleSolver:
    """A new model with its vocabulary, with its family's fresh weights."""
    with random_numbers(recipe.seed), CPU:
        model = build(config_of(recipe))
    assert isinstance(model, PuzzleSolver), "a puzzle recipe trains a puzzle solver"
    model.vocab, model.read_at = Vocabulary(sudoku_words(recipe.task.side)), Readout("last_real")
    return model


def train_solver(
    recipe: PuzzleRecipe, folder: Path, *, resume: bool = False, wandb: bool = False
) -> Path:
    """Run a recipe to its end.

    Args:
        folder: The folder of the run.
        resume, wandb: As in `PuzzleTrainer`.

    Returns:
        The folder of the finished checkpoint.
    """
    PuzzleTrainer(recipe, folder, resume=resume, wandb=wandb).run()
    return folder / recipe.stages[-1].name
