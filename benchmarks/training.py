"""Training steps at paper size by the trainer, against plain ones on the same batches padded to 50
columns, as the public code pads.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import interleaved
from loopscope.training.catalog import RECIPES
from loopscope.training.setup import Answering, TrainingBatch
from loopscope.training.trainer import Trainer

RECIPE, BATCH, PADDED, HOPS, ROUNDS, RATE = "paper/multi_hop/r4", 8, 50, (2, 5, 12), 3, 1e-6


class Padded(Answering):
    """The same model on whole inputs of 50 columns, padding and all, read at the last."""

    def forward(self, batch: TrainingBatch) -> Tensor:
        tokens, mask = (
            F.pad(x, (0, PADDED - x.shape[1])) for x in (batch.inputs.tokens, batch.inputs.mask)
        )
        state = self.model.advance(self.model.begin(tokens, mask, n_loops=batch.n_loops))
        return self.model.readout(state, torch.full((len(tokens),), PADDED - 1))


def run() -> str:
    """One line for each stage: steps per second of both, and their ratio, after checking that the
    losses agree.
    """
    recipe = replace(RECIPES[RECIPE], batch_size=BATCH)
    stages = [stage for stage in recipe.stages if max(stage.hops) in HOPS]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(replace(recipe, stages=tuple(stages)), Path(folder) / "run")
        ways = {"ours": trainer.answering, "padded": Padded(trainer.model)}

        def step(way: str, batch: TrainingBatch, rate: float) -> float:
            trainer.answering, trainer.shares_gradients = ways[way], way == "ours"
            return trainer.update(batch, rate)

        for stage in stages:
            batch = trainer.batch(stage)
            losses = [step(way, batch, 0.0) for way in ways]
            if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
                raise RuntimeError(f"the two ways of training disagree: losses {losses}")
            times = interleaved({way: partial(step, way, batch, RATE) for way in ways}, ROUNDS)
            lines.append(
                f"training at d=768, L=4, 4 iterations, batch {BATCH}, {stage.name}:"
                f" {1 / times['ours']:.2f} steps/s against {1 / times['padded']:.2f} padded to"
                f" {PADDED}, {times['padded'] / times['ours']:.1f} times faster"
            )
    return "\n".join(lines)
