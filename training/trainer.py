"""The trainer, which runs a recipe's stages, resumes bit for bit, and writes checkpoints."""

from __future__ import annotations

import platform
import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from loopscope.checkpoints.load import save
from loopscope.checkpoints.release import save_release
from loopscope.training.examination import accuracies, accuracy_table
from loopscope.training.folder import claim, drafts_of, refuse_unless_resumed
from loopscope.training.log import Log
from loopscope.training.questions import questions_of
from loopscope.training.recipes import Recipe, Stage
from loopscope.training.setup import (
    Answering,
    TrainingBatch,
    clip_,
    finite_loss,
    fresh_model,
    fresh_optimizer,
    pack,
    random_numbers,
)
from loopscope.training.shared_gradients import SharedGradients
from loopscope.training.state import Progress, load_state, save_state

_WIDE = 256  # from this width on it pays on a CPU to multiply the rows of all iterations at once


class Trainer:
    """One run of a recipe in a folder. Under `accelerate launch` every process has a trainer, and
    the processes share each batch.

    A GPU computes in bfloat16 autocast with compiled blocks, a CPU in float32.

    Args:
        recipe: The recipe to run.
        folder: Holds state.pt (to resume), log.jsonl, TensorBoard's files, and a checkpoint for
            each stage, by its name.
        resume: Whether to go on from state.pt.
        release: Whether to write each checkpoint in the released layout too, as
            released/<stage>/checkpoint_epoch_<N>.pt, where N counts evaluations.
        wandb: Whether to report to Weights & Biases.

    Attributes:
        shares_gradients: Whether `SharedGradients` makes the weight gradients; on a CPU that is
            faster for wide models.

    Raises:
        ValueError: The folder holds a run already and resume is False, another process writes to
            it, the state is damaged or of another recipe, or the batch cannot be shared equally.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        *,
        resume: bool = False,
        release: bool = False,
        wandb: bool = False,
    ) -> None:
        self.recipe, self.folder, self.release = recipe, folder, release
        on_gpu = torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=not on_gpu, mixed_precision="bf16" if on_gpu else "no")
        if recipe.batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"{self.accelerator.num_processes} processes cannot share a batch of"
                f" {recipe.batch_size} questions equally"
            )
        state = folder / "state.pt"
        refuse_unless_resumed(state, resume)
        if self.accelerator.is_main_process:
            claim(folder, drafts_of(recipe))
        self.shares_gradients = not on_gpu and recipe.d_model >= _WIDE
        self.questions = questions_of(recipe)
        self.model = fresh_model(recipe).train().to(self.accelerator.device)
        optimizer = fresh_optimizer(recipe, self.model)
        self.progress = (
            load_state(state, recipe, self.model, optimizer) if state.exists() else Progress()
        )
        if on_gpu:
            for block in self.model.blocks:
                block.compile(dynamic=True)
        self.answering, self.optimizer = self.accelerator.prepare(Answering(self.model), optimizer)
        self.log = (
            Log(folder, recipe, self.progress.update, wandb)
            if self.accelerator.is_main_process
            else None
        )

    def run(self) -> None:
        """Train to the end of the last stage; the checkpoint of a finished run is made again where
        it is absent.

        Warns:
            UserWarning: The checkpoint of an earlier finished stage is absent; its weights are
                gone.
        """
        self._check_finished_stages()
        while self.progress.stage < len(self.recipe.stages):
            self._run_stage(self.recipe.stages[self.progress.stage])
            self.progress.stage += 1
            self.progress.stage_update = 0
            self.save()
        if self.log is not None:
            self.log.close()

    def _check_finished_stages(self) -> None:
        finished = [stage.name for stage in self.recipe.stages[: self.progress.stage]]
        absent = [name for name in finished if not (self.folder / name).exists()]
        if not absent or not self.accelerator.is_main_process:
            return
        if absent[-1] == self.recipe.stages[-1].name:
            self.export(absent.pop())
        if absent:
            warnings.warn(
                f"{self.folder} lacks the checkpoint of the finished stage {absent[0]!r}, whose"
                " weights are gone; train in another folder to have it again",
                stacklevel=2,
            )

    def _run_stage(self, stage: Stage) -> None:
        if stage.restart and self.progress.stage_update == 0:
            self.optimizer = self.accelerator.prepare(fresh_optimizer(self.recipe, self.model))
        label = f"stage {self.progress.stage + 1}/{len(self.recipe.stages)} {stage.name}"
        started, before = time.perf_counter(), self.progress.seconds
        losses: list[float] = []
        main = self.accelerator.is_main_process
        with tqdm(
            total=stage.max_updates,
            initial=self.progress.stage_update,
            desc=label,
            disable=not main,
        ) as bar:
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
        if main:
            self.export(stage.name)

    def step(self, stage: Stage) -> float:
        """The next update of a stage.

        Returns:
            The loss, in nats, over this process's share of the batch.

        Raises:
            FloatingPointError: The loss is not a number; the saved state is left as it was.
        """
        dropout_seed = self.recipe.seed + 1_000_003 * self.progress.update
        own_seed = dropout_seed + self.accelerator.process_index
        with random_numbers(own_seed, self.accelerator.device):
            value = self.update(self.batch(stage), stage.rate(self.progress.stage_update))
        self.progress.update += 1
        self.progress.stage_update += 1
        return value

    def update(self, batch: TrainingBatch, rate: float) -> float:
        """Change the weights by one batch at a learning rate; the loss and errors are those of
        `step`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        shared = SharedGradients() if self.shares_gradients else nullcontext()
        with shared:
            logits = self.answering(batch)
        loss = F.cross_entropy(logits, batch.answers, label_smoothing=self.recipe.label_smoothing)
        value = finite_loss(loss, self.progress.update)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if isinstance(shared, SharedGradients):
            shared.check()
        if self.recipe.clip is not None:
            clip_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return value

    def batch(self, stage: Stage) -> TrainingBatch:
        """This process's share of the questions of the next update."""
        rng = np.random.default_rng((self.recipe.seed, self.progress.update))
        facts = self.questions.batch(stage, self.progress, rng)
        whole = pack(self.recipe, facts, self.recipe.loops.draw(rng))
        return whole.share(self.accelerator.process_index, self.accelerator.num_processes).to(
            self.accelerator.device
        )

    def _evaluate(self, stage: Stage, loss: float, bar: tqdm[Any]) -> bool:
        """Whether the stage's gate is passed; the main process decides for all."""
        passed = [False]
        if self.log is not None:
            self.model.eval()
            found = accuracies(self.model, self.questions, self.questions.groups(max(stage.hops)))
            self.model.train()
            self.log.write(
                self.progress, found, loss=round(loss, 5), lr=self.optimizer.param_groups[0]["lr"]
            )
            watched = stage.gate_on or list(found)[-1]
            bar.set_postfix({"loss": f"{loss:.3f}", watched: f"{found[watched]:.2f}"})
            asked = stage.gate_on is not None and self.progress.stage_update >= stage.min_updates
            passed = [asked and found[watched] > stage.gate]
        return bool(broadcast_object_list(passed)[0])

    def save(self) -> None:
        """Write the full state."""
        if self.accelerator.is_main_process:
            save_state(
                self.folder / "state.pt", self.recipe, self.progress, self.model, self.optimizer
            )

    def export(self, name: str) -> None:
        """Write the model with its graph, card and test questions, unless the folder exists."""
        folder = self.folder / name
        if not folder.exists():
            self.model.eval()
            groups = self.questions.beyond(self._trained_hops())
            asked = [question for group in groups for question in self.questions.as_text(group)]
            save(self.model, folder, self._card(groups), self.questions.graph.as_dict(), asked)
            self.model.train()
        if self.release:
            epoch = self.progress.update // self.recipe.eval_every
            released = self.folder / "released" / name
            save_release(self.model, released / f"checkpoint_epoch_{epoch}.pt", epoch)
            for companion in folder.glob("*.json"):
                if companion.name != "config.json":
                    shutil.copy(companion, released)

    def _stage(self) -> Stage:
        """The stage that runs, or the last one of a finished run."""
        return self.recipe.stages[min(self.progress.stage, len(self.recipe.stages) - 1)]

    def _trained_hops(self) -> int:
        return max(max(stage.hops) for stage in self.recipe.stages[: self.progress.stage + 1])

    def _card(self, groups: list[str]) -> dict[str, Any]:
        recipe = self.recipe
        return {
            "task": str(recipe.task),
            "n_heads": recipe.n_heads,
            "input_injection": False,
            "n_loops": recipe.eval_loops,
            "recipe": asdict(recipe),
            "stage": self._stage().name,
            "training_loops": str(recipe.loops),
            "trained_hops": self._trained_hops(),
            "updates": self.progress.update,
            "seconds": round(self.progress.seconds),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "accuracy": accuracy_table(self.model, self.questions, groups),
        }
