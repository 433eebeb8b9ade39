"""Training steps at paper size, with only the columns that matter, against the same batches padded to 50 columns."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.timing import interleaved
from models.tokens import Batch
from training.catalog import RECIPES
from training.setup import TrainingBatch
from training.trainer import Trainer

RECIPE, BATCH, PADDED, HOPS, ROUNDS, RATE = "paper/multi_hop/r4", 8, 50, (2, 5, 12), 2, 1e-6


def run() -> str:
    """One line for each stage: steps per second of both, and their ratio, after checking that the losses agree."""
    recipe = replace(RECIPES[RECIPE], batch_size=BATCH)
    stages = [stage for stage in recipe.stages if max(stage.hops) in HOPS]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(recipe, stages=tuple(stages)), Path(folder) / "run")
        for stage in stages:
            batch = trainer.batch(stage)
            wide = padded(batch)
            losses = [trainer.update(each, 0.0) for each in (batch, wide)]
            if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
                raise RuntimeError(f"the two ways of training disagree: losses {losses}")
            times = interleaved({"ours": lambda b=batch: trainer.update(b, RATE), "padded": lambda b=wide: trainer.update(b, RATE)}, ROUNDS)
            lines.append(
                f"training at d=768, L=4, 4 iterations, batch {BATCH}, {stage.name}: {1 / times['ours']:.2f} steps/s against "
                f"{1 / times['padded']:.2f} padded to {PADDED}, {times['padded'] / times['ours']:.1f} times faster"
            )
    return "\n".join(lines)


def padded(batch: TrainingBatch) -> TrainingBatch:
    """The same batch as 50 columns, read at the last."""
    tokens, mask = (F.pad(x, (0, PADDED - x.shape[1])) for x in (batch.inputs.tokens, batch.inputs.mask))
    return TrainingBatch(Batch(tokens, mask, torch.full((len(tokens),), PADDED - 1)), batch.answers, batch.n_loops)
