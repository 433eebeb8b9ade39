"""Next-token training of a looped language model on molecule strings."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from tqdm.auto import tqdm

from loopscope.checkpoints.load import save
from loopscope.models.basis.tokens import Readout
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.tasks.smiles import SmilesVocabulary
from loopscope.training.folder import claim, refuse_unless_resumed
from loopscope.training.language.data import PAD_ID, Batches, corpus_in
from loopscope.training.language.recipes import LANGUAGE_RECIPES, LanguageRecipe, config_of
from loopscope.training.language.scores import next_token_loss, sample_strings, score_passes, shares
from loopscope.training.log import Log
from loopscope.training.setup import CPU, descend, finite_loss, fresh_optimizer, random_numbers
from loopscope.training.state import Progress, load_state, save_state

_SAMPLES, _EXAMPLES = 200, 200


class LanguageTrainer:
    """One run of a language recipe in a folder, on the CPU in float32.

    Args:
        recipe: The recipe to run.
        folder: Holds data.npz, state.pt (to resume), log.jsonl, TensorBoard's files, and the
            finished checkpoint.
        resume: Whether to go on from state.pt.
        wandb: Whether to report to Weights & Biases.

    Raises:
        ValueError: The folder holds a run already and resume is False, or its state or data are of
            another recipe.
    """

    def __init__(
        self, recipe: LanguageRecipe, folder: Path, *, resume: bool = False, wandb: bool = False
    ) -> None:
        self.recipe, self.folder = recipe, folder
        state = folder / "state.pt"
        refuse_unless_resumed(state, resume)
        self.corpus = corpus_in(folder, recipe)
        claim(folder, ("state.pt", "log.jsonl", "data.npz", "final"))
        self.batches = Batches(self.corpus.train, recipe.batch_size, recipe.seed)
        self.model = fresh_language_model(recipe).train()
        self.optimizer = fresh_optimizer(recipe, self.model)
        self.progress = (
            load_state(state, recipe, self.model, self.optimizer) if state.exists() else Progress()
        )
        self.log = Log(folder, recipe, self.progress.update, wandb)

    def run(self) -> None:
        """Train to the end, and write the checkpoint."""
        started, before = time.perf_counter(), self.progress.seconds
        losses: list[float] = []
        with tqdm(
            total=self.recipe.updates, initial=self.progress.update, desc=self.recipe.name
        ) as bar:
            while self.progress.update < self.recipe.updates:
                losses.append(self.step())
                bar.update()
                self.progress.seconds = before + time.perf_counter() - started
                if (
                    self.progress.update % self.recipe.eval_every == 0
                    or self.progress.update == self.recipe.updates
                ):
                    bar.set_postfix(
                        {"held_out": f"{self._evaluate(sum(losses) / len(losses)):.3f}"}
                    )
                    losses.clear()
                    self.save()
        self.log.close()
        self.export()

    def step(self) -> float:
        """The next update.

        Returns:
            The loss, in nats per token.

        Raises:
            FloatingPointError: The loss is not a number; the saved state is left as it was.
        """
        update = self.progress.update
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.stages[0].rate(update)
        with random_numbers(self.recipe.seed + 1_000_003 * update, self.model.device):  # dropout
            loss = next_token_loss(self.model, self.batches(update))
        value = finite_loss(loss, update)
        descend(loss, self.optimizer, self.model.parameters(), self.recipe.clip)
        self.progress.update += 1
        self.progress.stage_update += 1
        return value

    def _evaluate(self, loss: float) -> float:
        self.model.eval()
        scores = score_passes(
            self.model, self.corpus.held_out[: self.recipe.eval_questions], self.recipe.n_loops
        )
        self.model.train()
        rate = self.optimizer.param_groups[0]["lr"]
        found = {"next_token": round(scores.accuracy[-1], 4)}
        self.log.write(
            self.progress, found, loss=round(loss, 5), held_out=round(scores.nats[-1], 5), lr=rate
        )
        return scores.nats[-1]

    def save(self) -> None:
        """Write the full state."""
        save_state(self.folder / "state.pt", self.recipe, self.progress, self.model, self.optimizer)

    def export(self) -> None:
        """Write the finished model with its card into `final`, unless that folder exists."""
        folder = self.folder / "final"
        if not folder.exists():
            self.model.eval()
            save(self.model, folder, self._card())
            self.model.train()

    def _card(self) -> dict[str, Any]:
        recipe = self.recipe
        scores = score_passes(self.model, self.corpus.held_out, recipe.n_loops)
        samples = sample_strings(self.model, _SAMPLES, recipe.seed, context=recipe.context)
        words = SmilesVocabulary()
        examples = [
            words.text([i for i in row if i != PAD_ID])
            for row in self.corpus.held_out[:_EXAMPLES].tolist()
        ]
        return {
            "task": str(recipe.task),
            "n_loops": recipe.n_loops,
            "recipe": asdict(recipe),
            "updates": self.progress.update,
            "seconds": round(self.progress.seconds),
            "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
            "held_out_nats": round(scores.nats[-1], 4),
            "passes": {
                "nats": [round(x, 4) for x in scores.nats],
                "accuracy": [round(x, 4) for x in scores.accuracy],
            },
            "samples": {"count": _SAMPLES, "temperature": 1.0, **shares(samples)},
            "held_out_strings": examples,
        }


def fresh_language_model(recipe: LanguageRecipe) -> LoopedModel:
    """A new model with its vocabulary, read at the last token, with its family's fresh weights."""
    words = SmilesVocabulary()
    with random_numbers(recipe.seed), CPU:
        model = build(config_of(recipe, len(words)))
    model.vocab, model.read_at = words, Readout("last_real")
    return model


def train_language(
    recipe: LanguageRecipe, folder: Path, *, resume: bool = False, wandb: bool = False
) -> Path:
    """Run a recipe to its end.

    Args:
        folder: The folder of the run.
        resume, wandb: As in `LanguageTrainer`.

    Returns:
        The folder of the finished checkpoint.
    """
    LanguageTrainer(recipe, folder, resume=resume, wandb=wandb).run()
    return folder / "final"


def main(
    name: Annotated[str, tyro.conf.Positional], out: Path | None = None, resume: bool = False
) -> None:
    """Train a language model by a named recipe.

    Args:
        name: The name of the recipe.
        out: The folder of the run; runs/<name> by default.
        resume: Go on with a run that was stopped.
    """
    if name not in LANGUAGE_RECIPES:
        raise SystemExit(
            f"there is no recipe {name!r}; the recipes are {', '.join(LANGUAGE_RECIPES)}"
        )
    torch.set_num_threads(1)
    print(train_language(LANGUAGE_RECIPES[name], out or Path("runs") / name, resume=resume))


if __name__ == "__main__":
    tyro.cli(main)
