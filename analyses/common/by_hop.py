"""The answers after every iteration for each hop count or text: the one run that several analyses
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import AnswersConfig
from loopscope.analyses.common.inputs_of import AnswerTokens, Asked, open_inputs
from loopscope.analyses.common.look import ANSWERED
from loopscope.analyses.common.subject import Subject
from loopscope.interp.dynamics.answered import dynamics_and_lens
from loopscope.interp.dynamics.states import Dynamics
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


@dataclass(frozen=True)
class FollowedRun(HopRun):
    """The same with the motion of the state.

    Attributes:
        path: The state at the readout, after every iteration.
    """

    path: Dynamics


Runs = Mapping[int, HopRun] | Mapping[str, HopRun]
"""Runs by hop count, or by the text with its answer."""


def open_runs(config: AnswersConfig) -> tuple[Subject, Runs]:
    """Load the checkpoint that a config names, and run its questions or the given texts."""
    asked = open_inputs(config)
    if asked.given is not None:
        return asked.subject, run_each_text(asked, config.n_loops, config.answer)
    return asked.subject, run_by_hop(asked.subject, config.n_loops, config.hops)


def hops_and_texts(keys: Iterable[int | str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The hop counts among the keys of runs, and the texts; one of both is empty."""
    listed = list(keys)
    hops = tuple(key for key in listed if isinstance(key, int))
    return hops, tuple(key for key in listed if isinstance(key, str))


def run_by_hop(subject: Subject, n_loops: int, hops: int | None = None) -> dict[int, HopRun]:
    """Run every question once for `n_loops` iterations, hop count by hop count, or those of one."""
    runs = {}
    asked = subject.questions if hops is None else {hops: subject.of_hops(hops)}
    for hops, questions in tqdm(asked.items(), desc="questions by hops", leave=False):
        batch, answers = subject.encode(questions)
        runs[hops] = HopRun(readout_lens(subject.model, batch, n_loops), answers)
    return runs


def follow_by_hop(subject: Subject, n_loops: int) -> dict[int, FollowedRun]:
    """The same runs of all questions, with the motion of the state."""
    runs = {}
    for hops, questions in tqdm(subject.questions.items(), desc="questions by hops", leave=False):
        batch, answers = subject.encode(questions)
        path, lens = dynamics_and_lens(subject.model, batch, n_loops)
        runs[hops] = FollowedRun(lens, answers, path)
    return runs


def run_each_text(asked: Asked, n_loops: int, answer: str | None = None) -> dict[str, HopRun]:
    """Run each of the given texts for `n_loops` iterations, by the text with its answer."""
    group = asked.group()
    answers = asked.answers(group, answer, n_loops)
    runs = {}
    for i, text in enumerate(group.texts):
        row = slice(i, i + 1)
        told = AnswerTokens(answers.words[row], answers.ids[row], answers.own).said
        lens = readout_lens(asked.subject.model, group.batch[row], n_loops)
        runs[f"{text}{ANSWERED}{told}"] = HopRun(lens, answers.ids[row])
    return runs
