"""The section of the report about a figure, and the checkpoint that all sections share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

from loopscope.analyses.common.by_hop import HopRun, run_by_hop
from loopscope.analyses.common.configs import ComparisonConfig, ReportConfig, taken_from
from loopscope.analyses.common.inputs_of import Asked
from loopscope.analyses.common.subject import Subject

_Comparison = TypeVar("_Comparison", bound=ComparisonConfig)
_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Opened:
    """The checkpoint of a report.

    Attributes:
        config: The report's settings.
        subject: The checkpoint.
    """

    config: ReportConfig
    subject: Subject

    @property
    def asked(self) -> Asked:
        """The checkpoint with its own questions."""
        return Asked(self.subject, None)

    @cached_property
    def runs(self) -> dict[int, HopRun]:
        """Every question run once, for all figures that are about answers."""
        return run_by_hop(self.subject, self.config.n_loops)

    @property
    def n_loops(self) -> int:
        """The iterations that the checkpoint records, else those of the report."""
        return self.subject.model.cfg.n_loops or self.config.n_loops

    def compared(self, kind: type[_Comparison]) -> _Comparison:
        """The settings of a comparison: the report's own, for its checkpoint and the others."""
        checkpoints = (self.config.checkpoint, *self.config.compare)
        return taken_from(kind, self.config, checkpoints=checkpoints)


@dataclass(frozen=True)
class Section(Generic[_Record]):
    """The section of the report about a figure; the figure's file holds it as `SECTION`.

    Attributes:
        title: The heading.
        look_for: What to look for in the figure of any checkpoint.
        measure: Makes the record for the report's checkpoint.
        found: What a record shows, in numbers.
    """

    title: str
    look_for: str
    measure: Callable[[Opened], _Record]
    found: Callable[[Any], str]
