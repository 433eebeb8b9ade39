"""Claims of the paper with their verdicts, and the helpers that claims share."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loopscope.checkpoints.locate import SHIPPED

Verdict = Literal["yes", "partly", "no"]
EXTRAPOLATES, LEARNED = 0.6, 0.9


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what is found here.

    Attributes:
        paper: What the paper says, with its figure.
        found: The numbers.
        rule: When it counts as shown, and as partly shown.
        verdict: By that rule.
    """

    paper: str
    found: str
    rule: str
    verdict: Verdict


def verdict(shown: bool, partly: bool) -> Verdict:
    """Yes, partly or no."""
    return "yes" if shown else "partly" if partly else "no"


@dataclass(frozen=True)
class Bound:
    """When one measured number counts as shown, and when as partly shown.

    Attributes:
        number: What is measured.
        sense: Whether the number must be at least the limit, or at most.
        shown, partly: The two limits.
    """

    number: str
    sense: Literal["at least", "at most"]
    shown: float
    partly: float

    def verdict(self, value: float) -> Verdict:
        """By this bound alone; a number that could not be measured shows nothing."""
        if math.isnan(value):
            return "no"
        over = [value - self.shown, value - self.partly]
        signed = over if self.sense == "at least" else [-x for x in over]
        return verdict(signed[0] >= 0, signed[1] >= 0)

    @property
    def rule(self) -> str:
        """Both limits in words."""
        return f"{self.sense} {self.shown:g} (partly: {self.partly:g})"

    def __str__(self) -> str:
        return f"{self.number}: {self.rule}"


def judged(bounds: Sequence[Bound], numbers: Mapping[str, float]) -> Verdict:
    """Yes where every bound says so, no where any says no, partly between them."""
    found = {bound.verdict(numbers[bound.number]) for bound in bounds}
    return verdict(found == {"yes"}, "no" not in found)


def read_log(name: str) -> list[dict[str, Any]]:
    """The evaluations of a shipped checkpoint's training."""
    return [json.loads(line) for line in (SHIPPED / name / "log.jsonl").read_text().splitlines()]


def short(name: str) -> str:
    """The last part of a checkpoint's name."""
    return name.rpartition("/")[2]
