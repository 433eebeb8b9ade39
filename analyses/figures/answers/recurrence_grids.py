"""How deep can each model reason with how many iterations? Accuracy grids side by side (figures 5,
7 and 12 to 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.common.claims import EXTRAPOLATES, LEARNED
from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.panels import Panel, headline, run_each, small_titles, together
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.figures.answers.recurrence import RecurrenceGrid, measure
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import ACCURACY_SCALE, MARK, styled
from loopscope.interp.exits.halting import HaltingRule


@dataclass(frozen=True, kw_only=True)
class RecurrenceGridsConfig(PanelsConfig):
    """Accuracy for each hop count and each number of iterations, several checkpoints side by side
    (figures 5, 7 and 12 to 18).
    """

    n_loops: int = 24
    """Iterations to run; one run gives the accuracy after each of them."""
    kl: float = 0.01
    """Row r*: halt when KL(p_t || p_t-1) is below this ..."""
    entropy: float = 3.0
    """... and the entropy is below this, both in nats."""


_PER_ROW = 4
_COLORBAR = {
    "title": {"text": "accuracy", "side": "right", "font": {"size": 12}},
    "thickness": 10,
    "outlinewidth": 0,
}
_READING = (
    f"<span style='color:{MARK}'>lines: the training R and the deepest hop learned</span>; r*:"
    " adaptive halting"
)


@dataclass(frozen=True)
class RecurrenceGrids(Record):
    """One grid per checkpoint.

    Attributes:
        panels: The checkpoints.
        grids: Their grids, all of the same number of iterations.
    """

    panels: tuple[Panel, ...]
    grids: tuple[RecurrenceGrid, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, hops, stop ("fixed" or "halting"), iterations, accuracy."""
        return together(self.panels, [grid.frame() for grid in self.grids])

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint: R, deepest hop count in training, learned and reached, lowest
        best accuracy on trained hops, r*.
        """
        rows = []
        for panel, grid in zip(self.panels, self.grids, strict=True):
            inside = _inside(grid)
            best = grid.accuracy.max(1).values[:inside]
            falls = best - grid.accuracy[:inside, -1]
            numbers = [
                best.min(),
                falls.mean(),
                grid.halted[:inside].mean(),
                grid.halted_loops[:inside].mean(),
            ]
            rows.append(
                (
                    panel.checkpoint,
                    panel.training_loops,
                    grid.trained_hops,
                    learned(grid),
                    reached(grid),
                    *map(float, numbers),
                )
            )
        columns = [
            "checkpoint",
            "R",
            "trained to",
            "learned to",
            "reaches",
            "least best accuracy",
            "mean fall at the last r",
        ]
        return pd.DataFrame(rows, columns=[*columns, "with halting", "mean r*"])


def _inside(grid: RecurrenceGrid) -> int:
    """How many hop counts were trained; all of them where that is unknown."""
    return len([hop for hop in grid.hops if grid.trained_hops is None or hop <= grid.trained_hops])


def leading(values: Sequence[float], least: float) -> int:
    """How many values at the beginning are at least this large."""
    return next((i for i, value in enumerate(values) if round(value, 4) < least), len(values))


def learned(grid: RecurrenceGrid) -> int:
    """Deepest trained hop count that is answered at its best r (0.9), with all below it; 0 where
    none is.
    """
    count = leading(grid.accuracy.max(1).values.tolist()[: _inside(grid)], LEARNED)
    return grid.hops[count - 1] if count else 0


def reached(grid: RecurrenceGrid) -> int:
    """Deepest hop count, trained or not, that is answered at its best r (0.6), with all below it; 0
    where none is.
    """
    count = leading(grid.accuracy.max(1).values.tolist(), EXTRAPOLATES)
    return grid.hops[count - 1] if count else 0


def run(config: RecurrenceGridsConfig) -> RecurrenceGrids:
    """Measure the grid of every checkpoint, from one run of each.

    Raises:
        ValueError: No checkpoint is named, or one has no questions.
    """
    rule = HaltingRule(config.kl, config.entropy)
    found = [
        (Panel.of(subject), measure(subject, runs, rule))
        for subject, runs in run_each(config, config.n_loops)
    ]
    return RecurrenceGrids(tuple(panel for panel, _ in found), tuple(grid for _, grid in found))


def figure(record: RecurrenceGrids) -> go.Figure:
    """Hops along, iterations upwards, accuracy as colour; r* on top; lines at the training R and
    the deepest hop learned.
    """
    columns = min(_PER_ROW, len(record.grids))
    rows = -(-len(record.grids) // columns)
    widths = [
        max(len(grid.hops) for grid in record.grids[column::columns]) for column in range(columns)
    ]
    titles = list(map(_title, record.panels, record.grids))
    plot = make_subplots(
        rows=rows,
        cols=columns,
        column_widths=widths,
        shared_yaxes=True,
        horizontal_spacing=0.035,
        vertical_spacing=0.3 / rows,
        subplot_titles=titles,
    )
    for i, grid in enumerate(record.grids):
        _draw(plot, grid, record.panels[i].checkpoint, i // columns + 1, i % columns + 1)
    n_loops = record.grids[0].accuracy.shape[1]
    marks = [1, *range(4, n_loops + 1, 4)]
    plot.update_yaxes(
        tickvals=[*marks, n_loops + 2],
        ticktext=[*map(str, marks), "r*"],
        range=[0.4, n_loops + 2.6],
    )
    plot.update_yaxes(title="iterations r", col=1)
    plot.update_xaxes(title="hops", tick0=2, dtick=2, tickangle=0, tickfont={"size": 11})
    plot.update_layout(
        coloraxis={
            "colorscale": ACCURACY_SCALE, "cmin": 0, "cmax": 1, "colorbar": _COLORBAR,
        },
    )  # fmt: skip
    styled(plot, 90 + rows * 480).update_layout(margin_t=98, margin_r=10)
    small_titles(plot, len(titles))
    headline(plot, _READING, 64)
    return plot


def _title(panel: Panel, grid: RecurrenceGrid) -> str:
    learning = f"<span style='color:{MARK}'>learned to {learned(grid)}</span>"
    return panel.title(f"{learning},<br>reaches {reached(grid)} hops")


def _draw(plot: go.Figure, grid: RecurrenceGrid, name: str, row: int, col: int) -> None:
    hops, n_loops = list(grid.hops), grid.accuracy.shape[1]
    look = {"x": hops, "coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "row": row, "col": col}
    plot.add_heatmap(
        y=list(range(1, n_loops + 1)), z=grid.accuracy.T.tolist(), **look,
        hovertemplate=f"{label(name)}<br>%{{x}} hops, r = %{{y}}<br>"
        "accuracy %{z:.2f}<extra></extra>",
    )  # fmt: skip
    plot.add_heatmap(
        y=[n_loops + 2], z=[grid.halted.tolist()], customdata=[grid.halted_loops.tolist()], **look,
        hovertemplate=f"{label(name)}<br>%{{x}} hops, halting ({label(grid.rule)})<br>"
        "accuracy %{z:.2f}<br>mean iterations %{customdata:.1f}<extra></extra>",
    )  # fmt: skip
    line = {"opacity": 1, "line": {"color": MARK, "width": 1.5}, "row": row, "col": col}
    deepest = learned(grid)
    if deepest:
        plot.add_shape(
            type="line", x0=deepest + 0.5, x1=deepest + 0.5, y0=0.5, y1=n_loops + 2.5, **line
        )
    if grid.trained_loops is not None and grid.trained_loops < n_loops:
        at = grid.trained_loops + 0.5
        plot.add_shape(type="line", x0=hops[0] - 0.5, x1=hops[-1] + 0.5, y0=at, y1=at, **line)
        plot.add_annotation(
            x=hops[-1] + 0.5,
            y=at,
            text="R",
            showarrow=False,
            xanchor="right",
            yanchor="bottom",
            font={"size": 11, "color": MARK},
            bgcolor="rgba(255,255,255,0.85)",
            borderpad=0,
            row=row,
            col=col,
        )


def _found(record: RecurrenceGrids) -> str:
    deepest = [
        f"{panel.checkpoint} {reached(grid)}"
        for panel, grid in zip(record.panels, record.grids, strict=True)
    ]
    return f"Deepest hop count at 0.60 or better at any r: {', '.join(deepest)}."


SECTION = Section(
    title="Accuracy by hops and iterations",
    look_for=(
        "The accuracy of each checkpoint by hop count and number of iterations r, on one colour"
        " scale. Lines mark R, the number of iterations in training, and the deepest hop count"
        " learned."
    ),
    measure=lambda opened: run(opened.compared(RecurrenceGridsConfig)),
    found=_found,
)

EXAMPLE = 'plots.recurrence_grids(["mini/multi_hop/r2", "mini/multi_hop/r4"], n_loops=8, per_hop=3)'
