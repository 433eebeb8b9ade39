"""The Tiny Recursive Model, whose one small network makes both a low and a high state in nested
cycles (arXiv 2510.04871).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from loopscope.models.core.registry import family
from loopscope.models.families.puzzle_solvers.config import PuzzleConfig
from loopscope.models.families.puzzle_solvers.solver import PuzzleSolver


@dataclass(frozen=True, kw_only=True)
class TrmConfig(PuzzleConfig):
    """Sizes; n_layers counts the blocks of the one network."""

    family: ClassVar[str] = "trm"


@family(TrmConfig)
class Trm(PuzzleSolver):
    """The Tiny Recursive Model, a solver of puzzles with a low and a high state in nested cycles.
    One stack of post-norm blocks makes both states.

    A low run differs from a high run by its state and by the input embedding in what it adds; see
    `PuzzleSolver` for the cycles, the names and the prefix. With d_pos_mlp the blocks have an MLP
    along the positions in place of attention, which fixes the number of positions.

    Source:
        arXiv 2510.04871.
    """

    cfg: TrmConfig

    def __init__(self, cfg: TrmConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(self.block() for _ in range(cfg.n_layers))
        self.initialize()

    @property
    def stacks(self) -> Mapping[str, nn.ModuleList]:
        return {"low": self.blocks, "high": self.blocks}
