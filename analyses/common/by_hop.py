"""The answers after every iteration for each hop count: the one run that several analyses read."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.subject import Subject
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.lens.record import Lens


@dataclass(frozen=True)
class HopRun:
    """All questions of one hop count, run once.

    Attributes:
        lens: Their answers after every iteration.
        answers: Int[Tensor, " batch"], the right ones.
    """

    lens: Lens
    answers: Int[Tensor, " batch"]


def run_by_hop(subject: Subject, n_loops: int) -> dict[int, HopRun]:
    """Run every question once for `n_loops` iterations, hop count by hop count."""
    runs = {}
    for hops, questions in tqdm(subject.questions.items(), desc="questions by hops", leave=False):
        batch, answers = subject.encode(questions)
        runs[hops] = HopRun(readout_lens(subject.model, batch, n_loops), answers)
    return runs
