"""The Hierarchical Reasoning Model, two stacks of blocks that make a low and a high state in nested
cycles (arXiv 2506.21734).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.core.registry import family
from loopscope.models.families.puzzle_solvers.config import PuzzleConfig
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver


@dataclass(frozen=True, kw_only=True)
class HrmConfig(PuzzleConfig):
    """Sizes; n_layers counts the blocks of the low stack.

    Attributes:
        n_high_layers: Blocks of the high stack.
    """

    family: ClassVar[str] = "hrm"
    TINY: ClassVar[Mapping[str, Any]] = {**PuzzleConfig.TINY, "n_high_layers": 1}
    n_high_layers: int = field(metadata=limits(most=MOST_BLOCKS))


@family(HrmConfig)
class Hrm(PuzzleSolver):
    """The Hierarchical Reasoning Model, a solver of puzzles with a low and a high state in nested
    cycles. Each state has a stack of post-norm blocks of its own.

    See `PuzzleSolver` for the cycles, the names and the prefix. The language model of the same name
    is the family `hrm_text`.

    Source:
        arXiv 2506.21734.
    """

    cfg: HrmConfig
    learns_to_continue: ClassVar[bool] = True

    def __init__(self, cfg: HrmConfig) -> None:
        super().__init__(cfg)
        self.low = nn.ModuleList(self.block() for _ in range(cfg.n_layers))
        self.high = nn.ModuleList(self.block() for _ in range(cfg.n_high_layers))
        self.initialize()

    @property
    def stacks(self) -> Mapping[str, nn.ModuleList]:
        return {"low": self.low, "high": self.high}

    @property
    def trained_from(self) -> str:
        return f"{super().trained_from}.low.{self.cfg.n_low_loops - 1}"
