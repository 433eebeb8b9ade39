"""Claims of the paper with their verdicts, and the helpers that claims share."""

from __future__ import annotations

import json
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


def read_log(name: str) -> list[dict[str, Any]]:
    """The evaluations of a shipped checkpoint's training."""
    return [json.loads(line) for line in (SHIPPED / name / "log.jsonl").read_text().splitlines()]


def short(name: str) -> str:
    """The last part of a checkpoint's name."""
    return name.rpartition("/")[2]
