"""Two runs that are compared: a clean and a corrupted batch, and which of them is patched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

Direction = Literal["denoise", "noise"]
_Run = TypeVar("_Run")


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted batch that match row by row."""

    clean: Batch
    corrupted: Batch

    @classmethod
    def of(
        cls, model: LoopedModel, clean: Inputs, corrupted: Inputs, readout: ReadoutColumn
    ) -> Pair:
        """Both inputs as batches.

        Raises:
            ValueError: Their shapes, lengths or readouts differ.
        """
        pair = cls(as_batch(model, clean, readout), as_batch(model, corrupted, readout))
        shapes = [list(batch.tokens.shape) for batch in (pair.clean, pair.corrupted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the clean and corrupted inputs must have one shape, got {shapes[0]} and"
                f" {shapes[1]}"
            )
        if not torch.equal(pair.clean.mask, pair.corrupted.mask) or not torch.equal(
            pair.clean.readout, pair.corrupted.readout
        ):
            raise ValueError(
                "each clean input must be as long as its corrupted one and be read at the same"
                " column"
            )
        return pair


def base_and_source(direction: Direction, clean: _Run, corrupted: _Run) -> tuple[_Run, _Run]:
    """The run that is patched and the one that the patches come from.

    Raises:
        ValueError: Another direction than "denoise" and "noise".
    """
    if direction not in ("denoise", "noise"):
        raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}")
    return (corrupted, clean) if direction == "denoise" else (clean, corrupted)
