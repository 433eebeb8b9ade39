"""Material of several measurements of the atlas: checkpoints, their questions, controls."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor

from loopscope.analyses.common.configs import DEFAULT_CHECKPOINT, SourceConfig
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.puzzles.solver import (
    Cycles,
    Solver,
    SolverConfig,
    first_states,
    open_solver,
    run_cycles,
)
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

Numbers = dict[str, float]
STARTS, STEPS = 8, 16  # random first states of a puzzle, and the supervision steps run from each


@cache
def opened(checkpoint: str = DEFAULT_CHECKPOINT) -> Subject:
    """A shipped checkpoint with its questions."""
    return open_subject(SourceConfig(checkpoint=checkpoint))


def asked(hops: int, checkpoint: str = DEFAULT_CHECKPOINT) -> tuple[Batch, Tensor]:
    """All questions of a hop count, and their answers."""
    subject = opened(checkpoint)
    return subject.encode(subject.of_hops(hops))


def solver(puzzles: int) -> Solver:
    """The shipped puzzle solver with some of its held-out puzzles."""
    return open_solver(SolverConfig(), puzzles)


@cache
def from_random_states(puzzles: int = 300) -> tuple[Solver, tuple[Cycles, ...]]:
    """The solver's runs from random first states."""
    subject = solver(puzzles)
    runs = [
        run_cycles(subject, STEPS, *first_states(subject, 0, restart))
        for restart in range(1, STARTS + 1)
    ]
    return subject, tuple(runs)


def shuffled(model: LoopedModel, seed: int = 0) -> LoopedModel:
    """A copy of a model with the entries of each matrix in random order."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                order = torch.randperm(weight.numel(), generator=generator)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return model
