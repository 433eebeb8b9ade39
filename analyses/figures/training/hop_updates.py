"""How long does each further hop take to learn? Updates until each hop count first passed its gate
(figure 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from loopscope.analyses.common.configs import LogsConfig
from loopscope.analyses.common.look import hop_name, note, run_colors
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.training_logs import TrainingLog, read_logs
from loopscope.interp.drawing.look import INK, deeper, styled


@dataclass(frozen=True, kw_only=True)
class HopUpdatesConfig(LogsConfig):
    """Updates needed until each hop count was first learned, one curve per run (figure 6)."""

    gate: float | None = None
    """A hop count is learned once its accuracy exceeds this; by default the gate of the run's own
    curriculum.
    """


@dataclass(frozen=True)
class HopUpdates(Record):
    """When each hop count was learned, run by run.

    Attributes:
        runs: The runs' names.
        labels: Iterations and layers of each.
        gates: The accuracy that a hop count has to exceed, of each run.
        hops: The hop counts.
        updates: Float[Tensor, "run hop"], updates of the first evaluation whose accuracy exceeds
            the gate; NaN where none does.
        minutes: Float[Tensor, "run hop"], the same in minutes of training.
        gated: Bool[Tensor, "run hop"], whether passing it ended a stage of its own, so that the
            next hop count came only then.
    """

    runs: tuple[str, ...]
    labels: tuple[str, ...]
    gates: tuple[float, ...]
    hops: tuple[int, ...]
    updates: Float[Tensor, "run hop"]
    minutes: Float[Tensor, "run hop"]
    gated: Bool[Tensor, "run hop"]

    def frame(self) -> pd.DataFrame:
        """run, model, hops, updates, minutes, gated; only what was learned."""
        rows = [
            (
                name,
                self.labels[i],
                hop,
                int(self.updates[i, j]),
                float(self.minutes[i, j]),
                bool(self.gated[i, j]),
            )
            for i, name in enumerate(self.runs)
            for j, hop in enumerate(self.hops)
            if self.updates[i, j].isfinite()
        ]
        return pd.DataFrame(rows, columns=["run", "model", "hops", "updates", "minutes", "gated"])

    def summary(self) -> pd.DataFrame:
        """One row per run: updates until 2 hops, the deepest hop count learned and its updates,
        mean updates per further hop count.
        """
        rows = []
        for i, name in enumerate(self.runs):
            learned = {
                hop: float(self.updates[i, j])
                for j, hop in enumerate(self.hops)
                if self.updates[i, j].isfinite()
            }
            deepest, two = max(learned, default=0), learned.get(2, math.nan)
            last = learned.get(deepest, math.nan)
            each = (last - two) / (deepest - 2) if deepest > 2 else math.nan
            rows.append((name, self.labels[i], self.gates[i], two, deepest, last, each))
        columns = [
            "run",
            "model",
            "gate",
            "updates to 2 hops",
            "deepest learned",
            "updates to it",
            "updates per further hop",
        ]
        return pd.DataFrame(rows, columns=columns)


def run(config: HopUpdatesConfig) -> HopUpdates:
    """Read the logs; nothing is computed again.

    Raises:
        ValueError: A log that is none of multi-hop questions, or a gate that is no accuracy, or one
            that must be given.
    """
    if config.gate is not None and not 0 <= config.gate < 1:
        raise ValueError(f"a gate is an accuracy from 0 to below 1, got {config.gate}")
    logs = sorted(
        read_logs(config.runs, "mini/multi_hop", ["1", "2"]),
        key=lambda log: (log.loops[0] < log.loops[1], log.loops),
    )
    gates = [_gate(log) if config.gate is None else config.gate for log in logs]
    hops = tuple(range(1, max(max(map(int, log.accuracy)) for log in logs) + 1))
    found = torch.tensor(
        [[_first(log, hop, gate) for hop in hops] for log, gate in zip(logs, gates, strict=True)],
        dtype=torch.float64,
    )
    return HopUpdates(
        runs=tuple(log.name for log in logs),
        labels=tuple(log.label for log in logs),
        gates=tuple(gates),
        hops=hops,
        updates=found[..., 0],
        minutes=found[..., 1],
        gated=found[..., 2].bool(),
    )


def _gate(log: TrainingLog) -> float:
    """The one gate of a curriculum."""
    gates = set(log.gates.values())
    if len(gates) != 1:
        raise ValueError(
            f"the stages of {log.name} have the gates {sorted(gates) or 'none'}, not one; pass"
            " --gate"
        )
    return gates.pop()


def _first(log: TrainingLog, hop: int, gate: float) -> tuple[float, float, bool]:
    """Updates and minutes of the first evaluation above the gate, and whether that ended a gated
    stage.
    """
    passed = (
        (log.accuracy[str(hop)] > gate).nonzero()[:, 0].tolist() if str(hop) in log.accuracy else []
    )
    if not passed:
        return math.nan, math.nan, False
    at = passed[0]
    ends_stage = at + 1 < len(log.stage) and bool(log.stage[at + 1] > log.stage[at])
    return float(log.updates[at]), float(log.minutes[at]), ends_stage and str(hop) in log.gates


def figure(record: HopUpdates) -> go.Figure:
    """One curve per run; filled marks ended a stage of their own, hollow ones did not."""
    plot = go.Figure()
    for i, color in enumerate(run_colors([i + 2 for i in range(len(record.runs))])):
        plot.add_trace(_curve(record, i, color))
    reading = (
        "filled: passed the gate of its own stage<br>hollow: passed it in a stage without that gate"
    )
    corner = {"x": 0, "xref": "paper", "y": 1, "yref": "paper", "xanchor": "left", "xshift": 8}
    note(plot, reading, font={"size": 12, "color": INK}, align="left", **corner)
    plot.update_xaxes(
        title="hops",
        tickvals=list(record.hops),
        range=[record.hops[0] - 0.3, record.hops[-1] + 1.9],
    )
    plot.update_yaxes(title="updates until first learned", rangemode="tozero", showgrid=True)
    return styled(plot, 460).update_layout(margin_t=30)


def _curve(record: HopUpdates, run: int, color: str) -> go.Scatter:
    """The hop counts that one run learned."""
    learned, name = record.updates[run].isfinite(), record.labels[run]
    hops = [hop for hop, there in zip(record.hops, learned.tolist(), strict=True) if there]
    filled = [color if gated else "white" for gated in record.gated[run][learned].tolist()]
    minutes = record.minutes[run][learned].tolist()
    right = not hops or _is_free(record, run, hops[-1])
    return go.Scatter(
        x=hops,
        y=record.updates[run][learned].tolist(),
        mode="lines+markers+text",
        name=name,
        showlegend=False,
        line={"color": color, "width": 2},
        marker={"size": 9, "color": filled, "line": {"color": color, "width": 2}},
        text=[""] * (len(hops) - 1) + [f" {name} "] * bool(hops),
        textfont={"color": deeper(color), "size": 12},
        textposition="middle right" if right else "top left",
        cliponaxis=False,
        customdata=list(zip(map(hop_name, hops), minutes, strict=True)),
        hovertemplate=f"{name}<br>%{{customdata[0]}} learned after %{{y:,}} updates<br>"
        "%{customdata[1]:.1f} minutes<extra></extra>",
    )


def _is_free(record: HopUpdates, run: int, hop: int) -> bool:
    """Whether no other curve passes where a label to the right of a run's last mark would stand."""
    if hop == record.hops[-1]:
        return True
    here = record.hops.index(hop)
    others = torch.cat([record.updates[:run, here + 1], record.updates[run + 1 :, here + 1]])
    return not bool(
        (
            (others - record.updates[run, here]).abs() < 0.12 * record.updates.nan_to_num().max()
        ).any()
    )


EXAMPLE = "plots.hop_updates()"
