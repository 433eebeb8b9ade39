"""When does a looped model grok, and when does it generalise? Accuracy on two-hop facts along
training (figure 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import LogsConfig
from loopscope.analyses.common.look import GROUP_COLORS, GROUP_NAMES, note, run_colors
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.training_logs import TrainingLog, read_logs
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import FAINT, deeper, styled


@dataclass(frozen=True, kw_only=True)
class GrokkingConfig(LogsConfig):
    """Accuracy on two-hop facts along training, one curve per number of iterations, and the stages
    of a run (figure 3).
    """

    stages_of: str | None = None
    """The run whose stages to show, such as r4_l2; by default the one that ends with the best OOD
    accuracy.
    """


GROUPS = ("train_inferred", "test_inferred_iid", "test_inferred_ood")
OOD = GROUPS[-1]
_KNOWN = 0.9


@dataclass(frozen=True)
class Grokking(Record):
    """Logs of two-hop runs.

    Attributes:
        runs: In order of iterations, then of layers.
        stages_of: Which of them is shown stage by stage.
    """

    runs: tuple[TrainingLog, ...]
    stages_of: int

    def curve(self, run: int, group: str) -> Float[Tensor, " evaluation"]:
        """The accuracy of a run on a group of facts, evaluation by evaluation."""
        return self.runs[run].accuracy[group]

    def ends(self, run: int) -> list[tuple[str, int]]:
        """Each stage that the run has begun, and the update of its last evaluation."""
        log = self.runs[run]
        return [
            (log.stages[stage], int(log.updates[log.stage == stage].max()))
            for stage in log.stage.unique().tolist()
        ]

    def frame(self) -> pd.DataFrame:
        """run, iterations (fewest of a batch), layers, stage, update, minutes, group, accuracy."""
        parts = []
        for log in self.runs:
            for group in GROUPS:
                part = pd.DataFrame(
                    {
                        "stage": [log.stages[i] for i in log.stage],
                        "update": log.updates,
                        "minutes": log.minutes,
                    }
                )
                part.insert(0, "run", log.name)
                part.insert(1, "iterations", log.loops[0])
                part.insert(2, "layers", log.n_layers)
                parts.append(part.assign(group=group, accuracy=log.accuracy[group].numpy()))
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> pd.DataFrame:
        """One row per run: updates, minutes, updates until training and ID facts were known (0.9),
        OOD accuracy at the end and at best.
        """
        rows = []
        for i, log in enumerate(self.runs):
            known = [
                first_at_least(log.updates, self.curve(i, group), _KNOWN) for group in GROUPS[:2]
            ]
            ood = self.curve(i, OOD)
            last, best = (
                float(ood[-1]),
                float(ood[~ood.isnan()].max()) if bool((~ood.isnan()).any()) else float("nan"),
            )
            rows.append(
                (
                    log.name,
                    log.label,
                    int(log.updates[-1]),
                    float(log.minutes[-1]),
                    *known,
                    last,
                    best,
                )
            )
        columns = [
            "run",
            "model",
            "updates",
            "minutes",
            "training facts known at",
            "ID facts known at",
            "OOD at the end",
            "best OOD",
        ]
        return pd.DataFrame(rows, columns=columns)


def first_at_least(updates: Tensor, accuracy: Tensor, least: float) -> str:
    """The update of the first evaluation with at least this accuracy, or "never"."""
    reached = updates[accuracy >= least]
    return f"{int(reached[0]):,}" if len(reached) else "never"


def run(config: GrokkingConfig) -> Grokking:
    """Read the logs; nothing is computed again.

    Raises:
        ValueError: A log that is none of two-hop facts, or no run of the name whose stages are
            asked for.
    """
    logs = sorted(
        read_logs(config.runs, "mini/systematicity", GROUPS),
        key=lambda log: (log.loops, log.n_layers),
    )
    return Grokking(tuple(logs), _chosen(logs, config.stages_of))


def _chosen(logs: Sequence[TrainingLog], name: str | None) -> int:
    if name is None:
        return max(range(len(logs)), key=lambda i: float(logs[i].accuracy[OOD].nan_to_num()[-1]))
    found = [i for i, log in enumerate(logs) if name in (log.name, log.name.rpartition("/")[2])]
    if not found:
        raise ValueError(
            f"stages_of must be one of {', '.join(log.name for log in logs)}, got {name!r}"
        )
    return found[0]


def figure(record: Grokking) -> go.Figure:
    """Above: ID and OOD accuracy of every run by updates and by minutes; below: one run, stage by
    stage, on a log axis.
    """
    plot = make_subplots(
        rows=3, cols=2, specs=[[{}, {}], [{}, {}], [{"colspan": 2}, None]], horizontal_spacing=0.06
    )
    colors = run_colors([log.loops[0] for log in record.runs])
    for row, group in ((1, GROUPS[1]), (2, OOD)):
        for col in (1, 2):
            for i, log in enumerate(record.runs):
                line = _line(log, record.curve(i, group), col, colors[i])
                plot.add_scatter(
                    **line | {"showlegend": (row, col) == (1, 1)},
                    legendgroup=log.name,
                    row=row,
                    col=col,
                )
    _add_stages(plot, record)
    for col, title in ((1, "updates"), (2, "minutes of training")):
        plot.update_xaxes(matches=f"x{col + 2}", showticklabels=False, row=1, col=col)
        plot.update_xaxes(title=title, title_standoff=6, rangemode="tozero", row=2, col=col)
    plot.update_yaxes(range=[-0.03, 1.06], dtick=0.5, showgrid=True)
    for row, title, domain in (
        (1, "ID accuracy", [0.8, 1]),
        (2, "OOD accuracy", [0.48, 0.76]),
        (3, "accuracy", [0, 0.34]),
    ):
        plot.update_yaxes(domain=domain, row=row)
        plot.update_yaxes(title=title, row=row, col=1)
        plot.update_yaxes(showticklabels=False, row=row, col=2)
    return styled(plot, 820).update_layout(
        legend={"orientation": "h", "y": 1.01, "yanchor": "bottom", "x": 0}
    )


def _line(log: TrainingLog, accuracy: Tensor, col: int, color: str) -> dict[str, Any]:
    """A curve over updates (the first column) or minutes, with a dot at its end."""
    x = (log.updates if col == 1 else log.minutes).tolist()
    when = f"{log.label}<br>%{{customdata[0]:,}} updates, %{{customdata[1]:.1f}} minutes"
    return {
        "x": x,
        "y": accuracy.tolist(),
        "customdata": list(zip(log.updates.tolist(), log.minutes.tolist(), strict=True)),
        "name": log.label,
        "mode": "lines+markers",
        "line": {"color": color, "width": 2},
        "marker": {
            "color": color,
            "size": [0] * (len(x) - 1) + [7],
            "opacity": 1,
            "line": {"width": 0},
        },
        "hovertemplate": f"{when}<br>accuracy %{{y:.2f}}<extra></extra>",
        "showlegend": False,
    }


def _add_stages(plot: go.Figure, record: Grokking) -> None:
    """The last panel; on its log axis annotations are placed by logarithms and shapes by values."""
    log = record.runs[record.stages_of]
    here = {"row": 3, "col": 1}
    for group in GROUPS:
        curve, color = record.curve(record.stages_of, group), GROUP_COLORS[group]
        plot.add_scatter(**_line(log, curve, 1, color), **here)
        half = next((i for i, share in enumerate(curve.tolist()) if share >= 0.5), len(curve) - 1)
        place = {"x": math.log10(int(log.updates[half])), "xanchor": "right", "xshift": -8}
        height = max(0.12, float(curve.nan_to_num()[half]))
        font = {"size": 12, "color": deeper(color)}
        note(plot, GROUP_NAMES[group], font=font, y=height, yshift=8, **place, **here)
    edges = [int(log.updates[0]), *(end for _, end in record.ends(record.stages_of))]
    for i, (name, _) in enumerate(record.ends(record.stages_of)):
        begin, end = edges[i], edges[i + 1]
        plot.add_vrect(
            x0=begin, x1=end, fillcolor=FAINT, opacity=0.16 * (i % 2), line_width=0,
            layer="below", **here,
        )  # fmt: skip
        place = {"x": math.log10(begin * end) / 2, "y": 1.0, "yref": "y5 domain"}
        note(plot, f"stage {label(name)}", font={"size": 12}, yanchor="bottom", **place, **here)
    plot.update_xaxes(
        type="log",
        title=f"updates of {log.label} (log scale)",
        tickvals=[n * 10**k for k in range(2, 8) for n in (1, 2, 5)],
        range=[math.log10(edges[0]), math.log10(edges[-1] * 1.02)],
        **here,
    )


EXAMPLE = "plots.grokking()"
