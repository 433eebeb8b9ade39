"""The trainer: runs a recipe's stages, resumes bit for bit, and writes a checkpoint that `load` reads."""

from __future__ import annotations

import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from checkpoints.load import save
from interp.lens import readout_lens
from models.recurrent_depth import RecurrentDepth
from models.tokens import Batch
from training.recipes import RECIPES, Recipe, Stage
from training.setup import Questions, TrainingBatch, fresh_model
from training.state import Log, Progress, load_state, save_state

_TABLE_LOOPS, _TABLE_BEYOND, _TABLE_QUESTIONS, _SHOWN_QUESTIONS = 24, 6, 200, 50


def train(name: str, folder: Path | None, resume: bool) -> Path:
    """Run a named recipe to its end.

    Args:
        name: Of the recipe.
        folder: Of the run; None means runs/<name>.
        resume: Go on from the state in the folder.

    Returns:
        The folder of the finished checkpoint.

    Raises:
        ValueError: No recipe of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; the recipes are {', '.join(RECIPES)}")
    trainer = Trainer(RECIPES[name], folder or Path("runs") / name, resume)
    trainer.run()
    return trainer.folder / "final"


class Trainer:
    """One run of a recipe in a folder.

    Args:
        recipe: What to run.
        folder: Holds state.pt (to resume), log.jsonl, and a checkpoint for each stage (stage_<k>_hops) and final.
        resume: Go on from state.pt.

    Raises:
        ValueError: The folder holds a run already and resume is False, or the state is of another recipe.
    """

    def __init__(self, recipe: Recipe, folder: Path, resume: bool = False) -> None:
        self.recipe, self.folder = recipe, folder
        self.questions = Questions(recipe)
        self.model = fresh_model(recipe).train()
        self.optimizer = self._new_optimizer()
        self.progress = Progress()
        state = folder / "state.pt"
        if state.exists() and not resume:
            raise ValueError(f"{folder} holds a run already; pass --resume to go on with it, or choose another folder")
        if state.exists():
            self.progress = load_state(state, recipe, self.model, self.optimizer)
        self.log = Log(folder / "log.jsonl", self.progress.update)

    def _new_optimizer(self) -> torch.optim.AdamW:
        recipe = self.recipe
        return torch.optim.AdamW(self.model.parameters(), lr=1.0, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True)

    def run(self) -> None:
        """Train to the end of the last stage, and export."""
        while self.progress.stage < len(self.recipe.stages):
            self._run_stage(self.recipe.stages[self.progress.stage])
            self.progress.stage += 1
            self.progress.stage_update = 0
            self.save()
        self.export(self.folder / "final")

    def _run_stage(self, stage: Stage) -> None:
        if stage.restart and self.progress.stage_update == 0:
            self.optimizer = self._new_optimizer()
        label = f"stage {self.progress.stage + 1}/{len(self.recipe.stages)} to {max(stage.hops)} hops"
        started, before = time.perf_counter(), self.progress.seconds
        losses: list[float] = []
        with tqdm(total=stage.max_updates, initial=self.progress.stage_update, desc=label) as bar:
            while self.progress.stage_update < stage.max_updates:
                losses.append(self.step(stage))
                bar.update()
                self.progress.seconds = before + time.perf_counter() - started
                if self.progress.update % self.recipe.eval_every == 0:
                    passed = self._evaluate(stage, sum(losses) / len(losses), bar)
                    losses.clear()
                    self.save()
                    if passed:
                        break
        if self.progress.stage + 1 < len(self.recipe.stages):
            self.export(self.folder / f"stage_{max(stage.hops)}_hops")

    def step(self, stage: Stage) -> float:
        """One update.

        Returns:
            The loss, in nats.

        Raises:
            FloatingPointError: The loss is not a number; the saved state is left as it was.
        """
        batch = self.questions.batch(stage, self.progress.update)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.rate(self.progress.stage_update)
        loss = F.cross_entropy(self._answer_logits(batch), batch.answers)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss became {value} at update {self.progress.update}; resume with a lower learning rate")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.progress.update += 1
        self.progress.stage_update += 1
        return value

    def _answer_logits(self, batch: TrainingBatch) -> Tensor:
        state = self.model.advance(self.model.begin(batch.tokens, n_loops=batch.n_loops))
        last = torch.full((len(batch.tokens),), batch.tokens.shape[1] - 1)
        return self.model.readout(state, last)

    @torch.no_grad()
    def _evaluate(self, stage: Stage, loss: float, bar: tqdm[Any]) -> bool:
        self.model.eval()
        accuracy = {}
        for hops in stage.hops:
            batch = self.questions.held_out(hops, self.recipe.eval_questions)
            right = self._answer_logits(batch).argmax(-1) == batch.answers
            accuracy[hops] = round(float(right.float().mean()), 4)
        self.model.train()
        self.log.write(**asdict(self.progress), loss=round(loss, 5), lr=self.optimizer.param_groups[0]["lr"], accuracy=accuracy)
        deepest = stage.gate_hops or max(stage.hops)
        bar.set_postfix({"loss": f"{loss:.3f}", f"{deepest} hops": f"{accuracy[deepest]:.2f}"})
        return stage.gate_hops is not None and accuracy[stage.gate_hops] > stage.gate

    def save(self) -> None:
        """Write the full state."""
        save_state(self.folder / "state.pt", self.recipe, self.progress, self.model, self.optimizer)

    def export(self, folder: Path) -> None:
        """Write the model in our own format, with its graph, its card and held-out questions; a folder that exists is left."""
        if folder.exists():
            return
        self.model.eval()
        questions = [question for hops in self._table_hops() for question in self.questions.as_text(hops, _SHOWN_QUESTIONS)]
        save(self.model, folder, self._card(), self.questions.graph.as_dict(), questions)
        self.model.train()

    def _trained_hops(self) -> int:
        return max(max(stage.hops) for stage in self.recipe.stages[: self.progress.stage + 1])

    def _table_hops(self) -> range:
        return range(1, self._trained_hops() + _TABLE_BEYOND + 1)

    def _card(self) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "task": f"multi-hop questions on a permutation graph of {recipe.n_entities} entities and {recipe.n_relations} relations",
            "recipe": asdict(recipe),
            "training_loops": str(recipe.loops),
            "trained_hops": self._trained_hops(),
            "updates": self.progress.update,
            "seconds": round(self.progress.seconds),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "accuracy": {str(k): _accuracy_by_loops(self.model, self.questions.held_out(k, _TABLE_QUESTIONS)) for k in self._table_hops()},
        }


def _accuracy_by_loops(model: RecurrentDepth, batch: TrainingBatch) -> list[float]:
    """Accuracy after each of the table's iterations, from one run."""
    last = torch.full((len(batch.tokens),), batch.tokens.shape[1] - 1)
    lens = readout_lens(model, Batch(batch.tokens, torch.ones_like(batch.tokens), last), _TABLE_LOOPS)
    return [round(share, 3) for share in lens.correct(batch.answers).float().mean(1).tolist()]
