"""The claims of twelve papers about looped models on the shipped miniatures, each with its rule,
its numbers and its control.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from loopscope.analyses.atlas import motion, puzzles, reading
from loopscope.analyses.atlas.material import Numbers
from loopscope.analyses.atlas.question import Question
from loopscope.analyses.atlas.rules import QUESTIONS
from loopscope.analyses.common.claims import Claim, judged
from loopscope.analyses.common.records import markdown_table, write_text

MEASURES: dict[str, Callable[[], Numbers]] = {
    "deeper": reading.deeper,
    "cycle": motion.cycle,
    "two_scales": motion.two_scales,
    "latent_chain": reading.latent_chain,
    "recall": motion.recall,
    "stability": motion.stability,
    "realignment": reading.realigned,
    "realignment_depths": reading.realigned_depths,
    "wandering": motion.wandering,
    "cancellation": motion.cancellation,
    "relational": reading.relational,
    "locality": puzzles.locality,
    "depth_and_breadth": puzzles.depth_and_breadth,
    "trivial_puzzles": puzzles.trivial_puzzles,
    "spurious_ends": puzzles.spurious_ends,
    "vote": puzzles.vote,
}
_HEAD = """# An atlas of claims about looped models

Written by `loopscope atlas` from the shipped checkpoints. It tests claims of published papers on
looped models on the miniatures, the small models that come with this package. Each claim has a
control.

The rule that decides between yes, partly and no was fixed before the atlas was first run, in a
commit of its own. Some numbers could be known then from other pages of this project; each section
says which. A yes means that the phenomenon appears at this size. A no may need the paper's models,
or data that no miniature was trained on; its reason is given.

In the tables of the sections, *number* says what is measured, *found* is its value, *rule* the
value that the claim needs, and *role* marks controls. *Shuffled weights* are those of the model
with the entries of each matrix in random order. The [glossary](glossary.md) explains the other
words."""


@dataclass(frozen=True)
class Answer:
    """A question with its numbers."""

    question: Question
    numbers: Numbers

    @property
    def claim(self) -> Claim:
        """The claim with its verdict."""
        bounds = self.question.bounds
        found = "; ".join(f"{name}: {value:.3g}" for name, value in self.numbers.items())
        verdict = judged(bounds, self.numbers)
        return Claim(self.question.claim, found, "; ".join(map(str, bounds)), verdict)


def chosen(papers: Sequence[str]) -> tuple[Question, ...]:
    """The questions of some papers, given by number or by the name of the question; all by default.

    Raises:
        ValueError: No question has that paper or name.
    """
    known = dict.fromkeys([q.paper for q in QUESTIONS] + [q.name for q in QUESTIONS])
    unknown = [each for each in papers if each not in known]
    if unknown:
        raise ValueError(
            f"the atlas has no paper or question {unknown[0]!r}; it has {', '.join(known)}"
        )
    return tuple(q for q in QUESTIONS if not papers or {q.paper, q.name} & set(papers))


def answers(questions: Iterable[Question]) -> list[Answer]:
    """Every question, measured on the shipped checkpoints."""
    return [Answer(q, MEASURES[q.name]()) for q in tqdm(list(questions), desc="atlas")]


def page(found: Sequence[Answer]) -> str:
    """A table of verdicts, and a section for each question, as Markdown."""
    rows = pd.DataFrame(
        [(answer.question.paper, answer.claim.paper, answer.claim.verdict) for answer in found],
        columns=["paper", "claim", "shown?"],
    )
    shown = {answer.question.paper for answer in found if answer.claim.verdict != "no"}
    papers = {answer.question.paper for answer in found}
    count = f"{len(shown)} of {len(papers)} papers have a claim that is shown, or partly."
    return "\n\n".join([_HEAD, markdown_table(rows), count, *map(section, found)]) + "\n"


def section(answer: Answer) -> str:
    """One question: what is asked, every number with its rule, calls and picture, differences."""
    question, claim = answer.question, answer.claim
    bounds = {bound.number: bound for bound in question.bounds}
    rows = []
    for name, value in answer.numbers.items():
        bound, role = bounds.get(name), "control" if name in question.control else ""
        told = ("", "") if bound is None else (bound.rule, bound.verdict(value))
        rows.append((name, f"{value:.3g}", *told, role))
    table = pd.DataFrame(rows, columns=["number", "found", "rule", "holds?", "role"])
    calls = ", ".join(f"`{call}`" for call in question.calls)
    picture = f" Picture: `{question.figure}`." if question.figure else ""
    parts = [
        f"## {question.paper}: {question.name.replace('_', ' ')}",
        f"*{question.title}*: {question.claim} **{claim.verdict.capitalize()}.**",
        question.asked,
        markdown_table(table),
        f"Run it again: `loopscope atlas --papers {question.name}`, by {calls}.{picture}"
        f" How it differs: {question.differs}"
        f" Known when the rule was written: {question.known}.",
    ]
    said = " ".join(filter(None, [_failed(answer), question.note]))
    return "\n\n".join([*parts[:2], *filter(None, [said]), *parts[2:]])


def _failed(answer: Answer) -> str:
    """Which bounds a claim that is not shown has missed."""
    missed = [b for b in answer.question.bounds if b.verdict(answer.numbers[b.number]) == "no"]
    told = "; ".join(
        f"{bound.number} is {answer.numbers[bound.number]:.3g}, where {bound.sense}"
        f" {bound.partly:g} was needed"
        for bound in missed
    )
    return f"Why not: {told}." if missed else ""


def write(path: Path, papers: Sequence[str] = ()) -> Path:
    """Measure the questions of some papers, or all, and write the page, whole or not at all."""
    return write_text(path, page(answers(chosen(papers))))
