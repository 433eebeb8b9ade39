"""The recipes of next-token training on molecule strings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from loopscope.models.core.config import LoopedConfig
from loopscope.models.families.smollm import SMolLMConfig
from loopscope.training.recipes import Loops, Recipe, Stage


@dataclass(frozen=True, kw_only=True)
class SmilesTask:
    """Random writings of random molecules.

    Attributes:
        molecules, held_out: Distinct molecules to train on, and others to test on, which have one
            writing each.
        writings: Writings of each training molecule.
        atoms: Fewest and most heavy atoms.
        seed: The seed of molecules and writings.
    """

    molecules: int = 60_000
    held_out: int = 2_000
    writings: int = 8
    atoms: tuple[int, int] = (9, 27)
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.writings} SMILES of each of {self.molecules:,} molecules of {self.atoms[0]} to"
            f" {self.atoms[1]} heavy atoms"
        )


@dataclass(frozen=True, kw_only=True)
class CosineStage(Stage):
    """A whole run, whose learning rate rises linearly and falls as half a cosine."""

    hops: tuple[int, ...] = ()

    def rate(self, update: int) -> float:
        """The learning rate of an update, counted from 0."""
        rising = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        falling = (1.0 + math.cos(math.pi * min(1.0, update / self.max_updates))) / 2
        return rising * (self.lr_end + falling * (self.lr - self.lr_end))


@dataclass(frozen=True, kw_only=True)
class LanguageRecipe(Recipe):
    """A recipe of next-token training. The fields of `Recipe` that are about questions are fixed.

    Attributes:
        task: The strings.
        n_loops: Iterations of every batch.
        context: Tokens of the longest string, <bos> and <eos> among them; longer ones are left out.
        updates, lr, lr_end, warmup: The run, and its learning rate.
        batch_size: Strings per update.
        eval_questions: Held-out strings in an evaluation while training.
    """

    task: SmilesTask  # type: ignore[assignment]  # the tasks of `Recipe` ask questions
    n_layers: int = 1
    d_model: int = 64
    n_heads: int = 4
    n_loops: int = 8
    context: int = 64
    updates: int
    lr: float = 2e-3
    lr_end: float = 1e-5
    warmup: int = 200
    batch_size: int = 128
    weight_decay: float = 0.1
    decay_matrices_only: bool = True
    eval_questions: int = 500
    positions: Literal["none"] = field(init=False, default="none")
    zero_init: bool = field(init=False, default=False)
    readout: Literal["last_real"] = field(init=False, default="last_real")
    halting_gate: bool = field(init=False, default=False)
    label_smoothing: float = field(init=False, default=0.0)
    padded_to: int = field(init=False)
    loops: Loops = field(init=False)
    eval_loops: int = field(init=False)
    stages: tuple[Stage, ...] = field(init=False)

    def __post_init__(self) -> None:
        if (
            min(self.updates, self.batch_size, self.eval_every, self.eval_questions) < 1
            or self.context < 3
        ):
            raise ValueError(
                "updates, batch_size, eval_every and eval_questions must be at least 1, and"
                f" context at least 3, got {self.updates}, {self.batch_size}, {self.eval_every},"
                f" {self.eval_questions} and {self.context}"
            )
        run = CosineStage(
            name="final",
            max_updates=self.updates,
            lr=self.lr,
            lr_end=self.lr_end,
            warmup=self.warmup,
        )
        decided = {
            "padded_to": self.context,
            "loops": Loops.fixed(self.n_loops),
            "eval_loops": self.n_loops,
            "stages": (run,),
        }
        for name, value in decided.items():
            object.__setattr__(self, name, value)
        super().__post_init__()


LANGUAGE_RECIPES: dict[str, LanguageRecipe] = {
    recipe.name: recipe
    for recipe in (LanguageRecipe(name="mini/smiles", task=SmilesTask(), updates=6000),)
}


def config_of(recipe: LanguageRecipe, d_vocab: int) -> LoopedConfig:
    """The config of the model that a recipe trains."""
    return SMolLMConfig(
        n_layers=recipe.n_layers,
        n_loops=recipe.n_loops,
        d_model=recipe.d_model,
        n_heads=recipe.n_heads,
        d_mlp=8 * recipe.d_model // 3,
        d_vocab=d_vocab,
        n_ctx=recipe.context,
        dropout=recipe.dropout,
    )
