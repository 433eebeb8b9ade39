"""The section of the report about a figure, and the checkpoint that all sections share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from loopscope.analyses.common.by_hop import FollowedRun, follow_by_hop
from loopscope.analyses.common.configs import (
    ComparisonConfig,
    PairConfig,
    ReportConfig,
    taken_from,
)
from loopscope.analyses.common.inputs_of import AnswerTokens, Asked, Group, asked_of
from loopscope.analyses.common.pairs_of import TextPairs, make_pairs, rows_of
from loopscope.analyses.common.subject import Subject

_Comparison = TypeVar("_Comparison", bound=ComparisonConfig)
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Opened:
    """The checkpoint of a report.

    Attributes:
        config: The report's settings.
        subject: The checkpoint.
        ours: Whether the report's text is the project's own, because the user gave none.
    """

    config: ReportConfig
    subject: Subject
    ours: bool = False

    @cached_property
    def asked(self) -> Asked:
        """The checkpoint with the report's text, or with its own questions."""
        text = self.config.text or self.config.clean
        return Asked(self.subject, None) if text is None else asked_of(self.subject, [text])

    def answers(self, group: Group) -> AnswerTokens:
        """The answers of some inputs, by the settings of the report."""
        return self.asked.answers(group, self.config.answer, self.n_loops)

    @cached_property
    def pairs(self) -> TextPairs:
        """The report's pair, or the pairs of its data, or the questions of one hop count."""
        settings = taken_from(PairConfig, self.config)
        return make_pairs(self.subject, rows_of(self.subject, settings), self.n_loops)

    @cached_property
    def runs(self) -> dict[int, FollowedRun]:
        """Every question run once, for all figures that are about answers and their states."""
        return follow_by_hop(self.subject, self.config.n_loops)

    @property
    def n_loops(self) -> int:
        """The iterations that the checkpoint records, else those of the report."""
        return self.subject.model.cfg.n_loops or self.config.n_loops

    def compared(self, kind: type[_Comparison]) -> _Comparison:
        """The settings of a comparison: the report's own, for its checkpoint and the others."""
        checkpoints = (self.config.checkpoint, *self.config.compare)
        return taken_from(kind, self.config, checkpoints=checkpoints)


def of_inputs(opened: Opened) -> bool:
    """Whether there is an input to run: a question or a text. For figures of any input."""
    return True


def of_a_text(opened: Opened) -> bool:
    """Whether the report runs a text of the user's. For figures that questions need not have."""
    return opened.asked.given is not None


def of_pairs(opened: Opened) -> bool:
    """Whether there are pairs to compare: the user's, or those of the questions."""
    return opened.config.corrupted is not None or bool(opened.subject.questions)


@dataclass(frozen=True)
class Section(Generic[_Record]):
    """The section of the report about a figure; the figure's file holds it as `SECTION`.

    Attributes:
        title: The heading.
        look_for: What to look for in the figure of any checkpoint.
        measure: Makes the record for the report's checkpoint.
        found: What a record shows, in numbers.
        serves: Whether the figure is about what the report runs; by default it is about the
            checkpoint's questions. A section that does not serve is left out.
    """

    title: str
    look_for: str
    measure: Callable[[Opened], _Record]
    found: Callable[[Any], str]
    serves: Callable[[Opened], bool] = lambda opened: bool(opened.subject.questions)
