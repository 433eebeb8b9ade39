"""The four shipped multi-hop models with their answers after every iteration, run once."""

from __future__ import annotations

from functools import cache

from loopscope.analyses.common.by_hop import HopRun
from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.panels import Panel, run_each
from loopscope.analyses.common.subject import Subject

ITERATIONS, PER_HOP = 12, 20


@cache
def shipped_runs() -> tuple[tuple[Panel, Subject, dict[int, HopRun]], ...]:
    found = run_each(PanelsConfig(per_hop=PER_HOP), ITERATIONS)
    return tuple((Panel.of(subject), subject, runs) for subject, runs in found)


def shipped_panels() -> tuple[Panel, ...]:
    return tuple(panel for panel, _, _ in shipped_runs())
