"""One claim of a paper, as the atlas asks it."""

from __future__ import annotations

from dataclasses import dataclass

from loopscope.analyses.common.claims import Bound


@dataclass(frozen=True, kw_only=True)
class Question:
    """One claim of a paper, as it is asked of the miniatures.

    Attributes:
        name: A short name, the same as that of the measurement.
        paper: Its number on arXiv, or where else it is found.
        title: Its title.
        claim: What the paper says.
        asked: What is measured, and on what.
        calls: The public calls that give the numbers.
        figure: The command that draws the picture; empty where there is none.
        bounds: The rule. All of them must hold.
        control: The numbers that are controls.
        differs: How miniature and paper differ, and what of the paper cannot be asked here.
        known: What was known of the numbers when the limits were written.
        note: What the numbers say, in words; written after the run.
    """

    name: str
    paper: str
    title: str
    claim: str
    asked: str
    calls: tuple[str, ...]
    figure: str = ""
    bounds: tuple[Bound, ...]
    control: tuple[str, ...]
    differs: str
    known: str
    note: str = ""
