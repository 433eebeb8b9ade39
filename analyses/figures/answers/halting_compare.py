"""Does halting on agreement alone stop too early? Iterations used and accuracy per hop count, side
by side (figures 9 and 10).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.panels import Panel, headline, run_each, small_titles, together
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.figures.answers.halting import HaltingCurves, measure
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import CATEGORIES, INK, MARK, styled


@dataclass(frozen=True, kw_only=True)
class HaltingCompareConfig(PanelsConfig):
    """Iterations used and accuracy per hop count with halting on KL and entropy and on KL alone,
    per checkpoint (figures 9 and 10).
    """

    n_loops: int = 24
    """The cap: an example that never halts uses the last iteration."""
    kl: float = 0.01
    """Threshold of KL(p_t || p_t-1), in nats."""
    entropy: float = 3.0
    """Threshold of the entropy, in nats."""


RULES = 2
"""The rules of `HaltingCurves` that are compared: KL and entropy, and KL alone, which come first
there.
"""
_LOOKS = ({"color": CATEGORIES[0], "dash": "solid"}, {"color": MARK, "dash": "dash"})
_BEYOND = "#fdf1e7"
_MARKERS = ("circle", "diamond-open")


@dataclass(frozen=True)
class HaltingCompare(Record):
    """Where the two rules stop, for several checkpoints.

    Attributes:
        panels: The checkpoints.
        curves: What each rule does there.
    """

    panels: tuple[Panel, ...]
    curves: tuple[HaltingCurves, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, rule, hops, iterations (mean), accuracy, halted (share)."""
        frames = [curve.frame() for curve in self.curves]
        kept = [
            frame[frame["rule"].isin(curve.rules[:RULES])]
            for frame, curve in zip(frames, self.curves, strict=True)
        ]
        return together(self.panels, kept)

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint and rule, over its trained hop counts: mean iterations and
        accuracy, gap to the best r, halted.
        """
        rows = []
        for panel, curve in zip(self.panels, self.curves, strict=True):
            inside = [
                i
                for i, hop in enumerate(curve.hops)
                if panel.trained_hops is None or hop <= panel.trained_hops
            ]
            for k, rule in enumerate(curve.rules[:RULES]):
                used, right, halted = (
                    part[k, inside] for part in (curve.iterations, curve.accuracy, curve.halted)
                )
                gap = curve.best[inside] - right
                rows.append(
                    (
                        panel.checkpoint,
                        rule,
                        float(used.mean()),
                        float(right.mean()),
                        float(gap.mean()),
                        float(halted.mean()),
                    )
                )
        return pd.DataFrame(
            rows,
            columns=[
                "checkpoint",
                "rule",
                "mean iterations",
                "mean accuracy",
                "below the best r",
                "halted",
            ],
        )


def run(config: HaltingCompareConfig) -> HaltingCompare:
    """Run every checkpoint once and apply both rules.

    Raises:
        ValueError: No checkpoint is named, or one has no questions.
    """
    found = [
        (Panel.of(subject), measure(runs, config.kl, config.entropy))
        for subject, runs in run_each(config, config.n_loops)
    ]
    return HaltingCompare(tuple(panel for panel, _ in found), tuple(curve for _, curve in found))


def figure(record: HaltingCompare) -> go.Figure:
    """Above: mean iterations used; below: accuracy when stopped and at the best fixed r; one column
    per checkpoint.
    """
    columns = len(record.curves)
    plot = make_subplots(
        rows=2,
        cols=columns,
        shared_xaxes="columns",
        shared_yaxes="rows",
        horizontal_spacing=0.03,
        vertical_spacing=0.07,
        column_titles=[panel.title() for panel in record.panels],
    )
    for col, (panel, curve) in enumerate(zip(record.panels, record.curves, strict=True), start=1):
        _draw(plot, panel, curve, col)
    plot.update_xaxes(tick0=2, dtick=2, tickfont_size=11)
    plot.update_xaxes(title="hops", row=2)
    most = max(float(curve.iterations[:RULES].max()) for curve in record.curves)
    plot.update_yaxes(range=[0, 1.06 * most], showgrid=True, row=1)
    plot.update_yaxes(range=[-0.04, 1.06], showgrid=True, row=2)
    plot.update_yaxes(title="mean iterations used", col=1, row=1)
    plot.update_yaxes(title="accuracy when stopped", col=1, row=2)
    plot.update_layout(
        legend={"orientation": "h", "y": -0.15, "x": 0.5, "xanchor": "center", "yanchor": "top"}
    )
    styled(plot, 560).update_layout(margin={"t": 64, "b": 100})
    small_titles(plot, columns)
    headline(plot, "shaded: hop counts beyond training", 26)
    return plot


def _draw(plot: go.Figure, panel: Panel, curve: HaltingCurves, col: int) -> None:
    hops = list(curve.hops)
    for k, rule in enumerate(curve.rules[:RULES]):
        name = label(rule.replace("<", " < ")).replace("H ", "entropy ")
        look = {
            "x": hops,
            "mode": "lines+markers",
            "name": name,
            "legendgroup": rule,
            "line": {**_LOOKS[k], "width": 2},
            "marker": {"size": 7 - k, "symbol": _MARKERS[k]},
            "col": col,
        }
        plot.add_scatter(
            y=curve.iterations[k].tolist(), row=1, showlegend=col == 1,
            customdata=curve.halted[k].tolist(), **look,
            hovertemplate=f"{name}<br>%{{x}} hops<br>%{{y:.1f}} iterations<br>stopped by the rule"
            " %{customdata:.2f}<extra></extra>",
        )  # fmt: skip
        plot.add_scatter(
            y=curve.accuracy[k].tolist(), row=2, showlegend=False, **look,
            hovertemplate=f"{name}<br>%{{x}} hops<br>accuracy %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    plot.add_scatter(
        x=hops, y=curve.best.tolist(), mode="lines", name="best fixed r", showlegend=col == 1,
        line={"color": INK, "dash": "dot", "width": 1.5}, row=2, col=col,
        hovertemplate="best r<br>%{x} hops<br>accuracy %{y:.2f}<extra></extra>",
    )  # fmt: skip
    plot.update_xaxes(range=[hops[0] - 0.5, hops[-1] + 0.5], col=col)
    if panel.trained_hops is not None and panel.trained_hops < hops[-1]:
        for row in (1, 2):
            plot.add_vrect(
                x0=panel.trained_hops + 0.5, x1=hops[-1] + 0.5, fillcolor=_BEYOND, opacity=1,
                line_width=0, layer="below", row=row, col=col,
            )  # fmt: skip


def _found(record: HaltingCompare) -> str:
    rows = [
        f"{panel.checkpoint} {float(curves.accuracy[0].mean()):.2f} in"
        f" {float(curves.iterations[0].mean()):.1f}"
        for panel, curves in zip(record.panels, record.curves, strict=True)
    ]
    return f"Accuracy and mean iterations with both conditions: {', '.join(rows)}."


SECTION = Section(
    title="Adaptive halting",
    look_for=(
        "Iterations used, and accuracy when stopped, for two halting rules: KL and entropy"
        " together, and KL alone. Each column is one checkpoint. Shaded hop counts were not in"
        " training."
    ),
    measure=lambda opened: run(opened.compared(HaltingCompareConfig)),
    found=_found,
)

EXAMPLE = 'plots.halting_compare("mini/multi_hop/r4", n_loops=8, per_hop=5)'
