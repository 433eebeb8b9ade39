"""Logs of training runs that a test writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopscope.analyses.figures.training.grokking import GROUPS


def line(
    update: int, stage: int, shares: Sequence[float], groups: Sequence[str] = GROUPS
) -> dict[str, Any]:
    return {
        "stage": stage,
        "update": update,
        "seconds": 6.0 * update,
        "accuracy": dict(zip(groups, shares, strict=True)),
    }


def write_run(folder: Path, lines: Sequence[object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    return folder
