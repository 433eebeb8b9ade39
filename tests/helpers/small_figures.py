"""Every figure once, small: its settings, its record and its drawing."""

from __future__ import annotations

from functools import cache
from typing import Any

import plotly.graph_objects as go

from golden_cases import GOLDEN
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import Record

ONE = ("mini/multi_hop/r2",)
SOLVER = "mini/sudoku/trm"
LOOPED = ("mini/systematicity/r4_l2/ood",)
ROWS: dict[str, Any] = {"n_loops": 5, "per_hop": 3}
SMALL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("overthinking", "recurrence", "halting"), ROWS),
    **dict.fromkeys(
        ("recurrence-grids", "margins", "halting-compare", "flips", "generalisation"),
        ROWS | {"checkpoints": ONE},
    ),
    "lens": {"n_loops": 3, "per_hop": 3},
    "readouts": {"n_loops": 3, "per_hop": 3},
    "patch": {"n_loops": 2, "per_hop": 3, "hops": 3},
    "ranks": ROWS,
    "feature": {"checkpoint": ONE[0], "per_hop": 2, "examples": 3},
    "circuit": {"checkpoint": ONE[0], "n_loops": 2, "per_hop": 3, "hops": 2, "edges": 20},
    "shortcut": {"n_loops": 2, "hops": 3, "per_hop": 3, "checkpoints": ("mini/shortcut",)},
    "stages": {"checkpoints": LOOPED, "per_group": 5},
    "causal-graph": {"checkpoints": LOOPED, "per_group": 5},
    "realignment": {"checkpoints": LOOPED, "per_group": 5, "resamples": 50},
    "code-transfer": {"checkpoint": ONE[0], "per_hop": 6, "n_loops": 2},
    "inference-stages": {"n_loops": 3, "per_hop": 3},
    "orbits": {"n_loops": 9, "per_hop": 1},
    "steps": ROWS,
    "lyapunov": ROWS | {"deepest": 16, "per_hop": 1},
    "attractors": {"n_loops": 24, "per_hop": 1, "deepest": 16, "n_starts": 3},
    "schedule-edit": {"n_loops": 2, "per_hop": 3},
    "attention-settling": ROWS,
    "layers": ROWS,
    "exit-gate": {
        "checkpoint": str(GOLDEN / "ouro"),
        "tokens": (5, 7, 11),
        "readout": "last_real",
    },
    "cell-patch": {"checkpoint": SOLVER, "puzzles": 2},
    "fixed-points": {"checkpoint": SOLVER, "puzzles": 5},
    "sudoku": {"checkpoint": SOLVER, "puzzles": 5, "restarts": 2},
    "grokking": {},
    "hop-updates": {},
}
"""For each figure the settings of a small run."""


def small_config(name: str, **others: Any) -> Any:
    """The settings of a figure's small run, some of them replaced."""
    return FIGURES[name].config()(**SMALL[name] | others)


@cache
def small_figure(name: str) -> tuple[Record, go.Figure]:
    module = FIGURES[name].module()
    record = module.run(small_config(name))
    return record, module.figure(record)
