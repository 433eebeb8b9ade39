"""Does the model keep one code of its answer? Probes fitted at one iteration and tested at
another.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.interp.common.places import loop_and_layer
from loopscope.interp.probes.probe import probe
from loopscope.interp.probes.transfer import TransferMatrix, transfer_matrix
from loopscope.tasks.questions import Question


@dataclass(frozen=True, kw_only=True)
class CodeTransferConfig(SourceConfig):
    """Linear probes of the answer, fitted on the states of one iteration and tested on those of
    another, for every block. Look for columns of one colour: then a probe of any iteration reads
    the answer as well as the probe of the same iteration does, so the model keeps one code. A
    bright diagonal alone would mean a code of its own for each iteration.
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    strength: float = 1.0
    """The weight of the squared length of a probe beside its squared error."""
    seed: int = 0
    """Seed of the questions that are held out, and of the control task."""


@dataclass(frozen=True)
class CodeTransfer(Record):
    """The transfer of probes of the answer.

    Attributes:
        questions: How many questions.
        matrix: Accuracy by block, fitted and tested iteration, on questions that were held out.
        control: Float[Tensor, "block loop"], accuracy of the control task, in which every head
            entity has a random answer, at its own iteration.
    """

    questions: int
    matrix: TransferMatrix
    control: Float[Tensor, "block loop"]

    def frame(self) -> pd.DataFrame:
        """visit and its loop and layer (where the probe was fitted), tested (the loop of the test),
        score, constant, control (at the fitted visit).
        """
        found = self.matrix.frame()
        visits = [
            f"loops.{t}.{block}" for t, block in zip(found["fitted"], found["block"], strict=True)
        ]
        loops, layers = zip(*map(loop_and_layer, visits), strict=True)
        control = self.control.repeat_interleave(self.control.shape[1], dim=1).flatten()
        columns = {"visit": visits, "loop": loops, "layer": layers, "tested": found["tested"]}
        return pd.DataFrame(columns).assign(
            score=found["score"], constant=found["constant"], control=control.numpy()
        )

    def summary(self) -> pd.DataFrame:
        """One row per block: questions, score at the last loop of probes that were fitted at the
        last and at the middle loop, what a probe keeps elsewhere, best control, score without any
        state.
        """
        kept, score = self.matrix.kept(), self.matrix.score
        middle = score.shape[1] // 2
        rows = [
            (
                block,
                self.questions,
                float(score[i, -1, -1]),
                float(score[i, middle, -1]),
                float(kept[i]),
                float(self.control[i].max()),
                self.matrix.constant,
            )
            for i, block in enumerate(self.matrix.blocks)
        ]
        columns = [
            "block",
            "questions",
            "fitted and tested at the last loop",
            f"fitted at loop {middle}, tested at the last",
            "share kept elsewhere",
            "best control task",
            "without any state",
        ]
        return pd.DataFrame(rows, columns=columns)


def run(config: CodeTransferConfig) -> CodeTransfer:
    """Probe the answer of all questions of at least two hops that were trained.

    Raises:
        ValueError: The checkpoint has no such questions.
    """
    subject = open_subject(config)
    batch, answers = subject.encode(_asked(subject))
    matrix = transfer_matrix(
        subject.model, batch, answers, config.n_loops, strength=config.strength, seed=config.seed
    )
    names = [
        f"loops.{loop}.{block}.{subject.model.lens_site}"
        for block in matrix.blocks
        for loop in range(matrix.score.shape[1])
    ]
    probes = probe(
        subject.model,
        batch,
        answers,
        names,
        config.n_loops,
        types=batch.tokens[:, 0],
        strength=config.strength,
        seed=config.seed,
    )
    assert probes.control is not None, "the control task was asked for"
    by_name = dict(zip((place.name for place in probes.places), probes.control, strict=True))
    control = torch.stack([by_name[name] for name in names]).view(len(matrix.blocks), -1)
    return CodeTransfer(len(batch), matrix, control)


def _asked(subject: Subject) -> list[Question]:
    """The questions of two hops and more, up to the deepest that was trained."""
    deepest = subject.trained_hops or max(subject.questions, default=0)
    found = [
        question
        for hops, group in subject.questions.items()
        for question in group
        if 2 <= hops <= deepest
    ]
    if not found:
        raise ValueError(f"{subject.name} has no questions of two hops or more beside it")
    return found


def figure(record: CodeTransfer) -> go.Figure:
    """One map per block: rows are the iteration of the fit, columns that of the test."""
    return record.matrix.plot()


EXAMPLE = 'plots.code_transfer("mini/multi_hop/r2", per_hop=9)'
