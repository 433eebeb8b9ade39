"""Every figure once, small: its record and its drawing, shared over the session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import plotly.graph_objects as go
import pytest

from golden_cases import GOLDEN
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import Record

ONE = ("mini/multi_hop/r2",)
LOOPED = ("mini/systematicity/r4_l2/ood",)
ROWS: dict[str, Any] = {"n_loops": 5, "per_hop": 3}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("overthinking", "recurrence", "halting"), ROWS),
    **dict.fromkeys(
        ("recurrence-grids", "margins", "halting-compare", "flips", "generalisation"),
        ROWS | {"checkpoints": ONE},
    ),
    "lens": {"n_loops": 3, "per_hop": 3},
    "patch": {"n_loops": 2, "per_hop": 3, "hops": 3},
    "ranks": ROWS,
    "shortcut": {"n_loops": 2, "hops": 3, "per_hop": 3, "checkpoints": ("mini/shortcut",)},
    "stages": {"checkpoints": LOOPED, "per_group": 5},
    "causal-graph": {"checkpoints": LOOPED, "per_group": 5},
    "orbits": {"n_loops": 9, "per_hop": 1},
    "steps": ROWS,
    "attention-settling": ROWS,
    "layers": ROWS,
    "exit-gate": {"checkpoint": str(GOLDEN / "ouro"), "tokens": (5, 7, 11)},
    "grokking": {},
    "hop-updates": {},
}
"""For each figure the settings of a small run."""


@cache
def _small(name: str) -> tuple[Record, go.Figure]:
    config, module = FIGURES[name].config(), FIGURES[name].module()
    settings = {"readout": "last_real"} if name == "exit-gate" else {}
    record = module.run(config(**SMALL[name], **settings))
    return record, module.figure(record)


@pytest.fixture(scope="session")
def small() -> Callable[[str], tuple[Record, go.Figure]]:
    """A figure's record and drawing by its name."""
    return _small
