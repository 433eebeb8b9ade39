"""The sizes that the recursive puzzle solvers share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from loopscope.models.basis.fields import BASE_OF_ANGLES, MOST_BLOCKS, limits
from loopscope.models.core.config import LoopedConfig


@dataclass(frozen=True, kw_only=True)
class PuzzleConfig(LoopedConfig):
    """Sizes; n_loops counts supervision steps, n_layers the blocks of a low run, and n_ctx the
    prefix and the cells together.

    Attributes:
        n_cycles: High cycles of each supervision step.
        n_low_loops: Low runs of each high cycle.
        n_prefix: Positions in front of the cells, which hold the puzzle's vector.
        d_puzzle: Width of a puzzle's vector; 0 for none.
        n_puzzles: Rows of the table of puzzle vectors.
        positions: "rope" turns queries and keys, "learned" adds a vector to each position.
        rope_theta: Base of the rotary frequencies.
        d_pos_mlp: Inner width of the MLP along the positions that takes the place of attention; 0
            for attention.
    """

    act_fn: ClassVar[str] = "silu"
    normalization_type: ClassVar[str] = "RMS"
    tied: ClassVar[bool] = False
    TINY: ClassVar[Mapping[str, Any]] = {
        "n_layers": 1,
        "n_cycles": 2,
        "n_low_loops": 2,
        "n_prefix": 2,
        "d_puzzle": 32,
        "n_puzzles": 3,
    }
    n_cycles: int = field(metadata=limits(most=MOST_BLOCKS))
    n_low_loops: int = field(metadata=limits(most=MOST_BLOCKS))
    n_prefix: int = field(default=0, metadata=limits(least=0))
    d_puzzle: int = field(default=0, metadata=limits(least=0))
    n_puzzles: int = field(default=0, metadata=limits(least=0))
    positions: Literal["rope", "learned", "none"] = "rope"
    rope_theta: float | int = field(default=10000.0, metadata=BASE_OF_ANGLES)
    d_pos_mlp: int = field(default=0, metadata=limits(least=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.d_puzzle == 0) != (self.n_puzzles == 0) or self.d_puzzle > self._prefix_width:
            raise ValueError(
                "d_puzzle and n_puzzles must both be 0, or both not, and n_prefix * d_model must"
                f" hold d_puzzle, got d_puzzle={self.d_puzzle}, n_puzzles={self.n_puzzles} and"
                f" n_prefix={self.n_prefix}"
            )
        if self.n_ctx is None and (self.positions == "learned" or self.d_pos_mlp):
            raise ValueError(
                "n_ctx must be given where positions are learned or an MLP runs along them"
            )

    @property
    def _prefix_width(self) -> int:
        return self.n_prefix * self.d_model

    def width_of_head(self) -> int:
        return max(1, self.d_model // self.n_heads)
