"""The recipes of puzzle solvers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from loopscope.models.families.puzzle_solvers.config import PuzzleConfig
from loopscope.models.families.puzzle_solvers.hrm import HrmConfig
from loopscope.models.families.puzzle_solvers.trm import TrmConfig
from loopscope.training.language.recipes import CosineStage
from loopscope.training.recipes import Loops, Recipe, Stage

N_PREFIX = 1  # a position that both states can use, and where the halting head reads


@dataclass(frozen=True, kw_only=True)
class SudokuTask:
    """Random Sudoku puzzles with one solution, shown in random symmetric copies.

    Attributes:
        side: Rows of a board: 4 or 6, whose symmetries can be listed.
        puzzles, held_out: Distinct puzzles to train on, and others to test on, of which no
            symmetric copy is trained on.
        clues: Fewest and most clues that a puzzle may be left with; it keeps more where it needs
            them.
        seed: The seed of the puzzles.

    Raises:
        ValueError: Another side, or clues out of order or out of 1 to side squared.
    """

    side: int = 4
    puzzles: int = 1000
    held_out: int = 300
    clues: tuple[int, int] = (4, 8)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side not in (4, 6):
            raise ValueError(f"side must be 4 or 6 to train on symmetric copies, got {self.side}")
        if not 1 <= self.clues[0] <= self.clues[1] <= self.side**2:
            raise ValueError(
                f"clues must be the fewest and the most, from 1 to {self.side**2}, got {self.clues}"
            )

    def __str__(self) -> str:
        return f"Sudoku puzzles of {self.side} x {self.side} cells with one solution"


@dataclass(frozen=True, kw_only=True)
class PuzzleRecipe(Recipe):
    """A recipe of deep supervision. The fields of `Recipe` that are about questions are fixed.

    Attributes:
        task: The puzzles.
        solver: The family.
        n_high_layers: Blocks of the high stack of "hrm"; n_layers counts those of the low stack.
        n_cycles, n_low_loops: As in `PuzzleConfig`.
        n_loops: Supervision steps after which every row halts.
        d_mlp: Inner width of the blocks' MLPs.
        mixing: How positions see each other: attention with rotary or learned positions, or an MLP
            along the positions.
        exploration: Share of the rows that halt only after a random number of steps.
        average: The rate of the exponential moving average of the weights, which is what is tested
            and exported.
        first, updates: The updates after which a first checkpoint is exported, and all updates.
        lr, lr_end, warmup: The learning rate, which falls as half a cosine.
        batch_size: Puzzles per update.
        eval_questions: Held-out puzzles in an evaluation while training.
    """

    task: SudokuTask  # type: ignore[assignment]  # the tasks of `Recipe` ask questions
    solver: Literal["trm", "hrm"] = "trm"
    n_layers: int = 2
    n_high_layers: int = 2
    d_model: int = 64
    n_heads: int = 4
    d_mlp: int = 128
    n_cycles: int = 2
    n_low_loops: int = 2
    n_loops: int = 8
    mixing: Literal["rope", "learned", "mlp"] = "learned"
    exploration: float = 0.1
    average: float = 0.995
    first: int
    updates: int
    lr: float = 2e-3
    lr_end: float = 1e-5
    warmup: int = 50
    batch_size: int = 64
    weight_decay: float = 0.1
    decay_matrices_only: bool = True
    betas: tuple[float, float] = (0.9, 0.95)
    eval_every: int = 200
    eval_questions: int = 100
    positions: Literal["none"] = field(init=False, default="none")
    zero_init: bool = field(init=False, default=False)
    readout: Literal["last_real"] = field(init=False, default="last_real")
    halting_gate: bool = field(init=False, default=False)
    label_smoothing: float = field(init=False, default=0.0)
    dropout: float = field(init=False, default=0.0)
    padded_to: int = field(init=False)
    loops: Loops = field(init=False)
    eval_loops: int = field(init=False)
    stages: tuple[Stage, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not (0 < self.first < self.updates and 0 <= self.average < 1):
            raise ValueError(
                "first must be above 0 and below updates, and average at least 0 and below 1, got"
                f" first={self.first}, updates={self.updates} and average={self.average}"
            )
        rates: dict[str, Any] = {"lr": self.lr, "lr_end": self.lr_end, "warmup": self.warmup}
        decided = {
            "padded_to": N_PREFIX + self.task.side**2,
            "loops": Loops.fixed(self.n_loops),
            "eval_loops": self.n_loops,
            "stages": (
                CosineStage(name="first", max_updates=self.first, **rates),
                CosineStage(name="final", max_updates=self.updates, **rates),
            ),
        }
        for name, value in decided.items():
            object.__setattr__(self, name, value)
        super().__post_init__()


PUZZLE_RECIPES: dict[str, PuzzleRecipe] = {
    recipe.name: recipe
    for recipe in (
        PuzzleRecipe(name="mini/sudoku/trm", task=SudokuTask(), first=400, updates=1600),
        PuzzleRecipe(
            name="mini/sudoku/trm6",
            task=SudokuTask(side=6, clues=(8, 20)),
            mixing="mlp",  # with attention the loss was still at 1.0 after 1400 updates
            first=400,
            updates=1600,
        ),
    )
}


def config_of(recipe: PuzzleRecipe) -> PuzzleConfig:
    """The config of the model that a recipe trains."""
    along = recipe.mixing == "mlp"
    sizes: dict[str, Any] = {
        "n_layers": recipe.n_layers,
        "n_loops": recipe.n_loops,
        "n_cycles": recipe.n_cycles,
        "n_low_loops": recipe.n_low_loops,
        "d_model": recipe.d_model,
        "n_heads": recipe.n_heads,
        "d_mlp": recipe.d_mlp,
        "d_vocab": recipe.task.side + 2,
        "n_ctx": recipe.padded_to,
        "n_prefix": N_PREFIX,
        "positions": "none" if along else recipe.mixing,
        "d_pos_mlp": 2 * recipe.padded_to if along else 0,
    }
    if recipe.solver == "trm":
        return TrmConfig(**sizes)
    return HrmConfig(n_high_layers=recipe.n_high_layers, **sizes)
