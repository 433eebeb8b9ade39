"""Which models overthink? Mean logit margin against iterations run, side by side (figure 8 of arXiv
2604.07822).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.look import hop_colors, hop_name, spread
from loopscope.analyses.common.panels import Panel, headline, run_each, small_titles, together
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.figures.answers.overthinking import Overthinking, measure
from loopscope.interp.drawing.look import CATEGORIES, INK, MARK, deeper, styled


@dataclass(frozen=True, kw_only=True)
class MarginsConfig(PanelsConfig):
    """Mean logit margin after each iteration, one curve per hop count and one panel per checkpoint
    (figure 8).
    """

    n_loops: int = 24
    """Iterations to run."""


_PER_ROW, _ROW_HEIGHT, _LABEL = 2, 330, 11.5
_TOP, _BOTTOM, _BETWEEN = 64, 54, 64
_Mark = dict[str, Any]
_READING = (
    f"hops at the end of each curve: <span style='color:{CATEGORIES[0]}'>in training</span>, "
    f"<span style='color:{MARK}'>beyond</span>; dashed: mean first hit t*"
)


@dataclass(frozen=True)
class Margins(Record):
    """Margins of several checkpoints.

    Attributes:
        panels: The checkpoints.
        margins: Their margins per hop count and iteration, all of the same number of iterations.
    """

    panels: tuple[Panel, ...]
    margins: tuple[Overthinking, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, hops, iterations (run), margin."""
        return together(self.panels, [each.frame() for each in self.margins])

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint and hop count: ever answered, t*, peak margin and the
        iterations run there, last margin, drop.
        """
        return together(self.panels, [each.summary() for each in self.margins])


def run(config: MarginsConfig) -> Margins:
    """Measure the margin of every question after every iteration, checkpoint by checkpoint.

    Raises:
        ValueError: No checkpoint is named, or one has no questions.
    """
    found = [
        (Panel.of(subject), measure(subject, runs))
        for subject, runs in run_each(config, config.n_loops)
    ]
    return Margins(tuple(panel for panel, _ in found), tuple(each for _, each in found))


def figure(record: Margins) -> go.Figure:
    """One curve per hop count, labelled at its end; a dashed line at t* of each that is answered at
    least every other time.
    """
    columns = min(_PER_ROW, len(record.margins))
    rows = -(-len(record.margins) // columns)
    height = _TOP + _BOTTOM + rows * _ROW_HEIGHT + (rows - 1) * _BETWEEN
    inner = height - _TOP - _BOTTOM
    plot = make_subplots(
        rows=rows,
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.07,
        vertical_spacing=_BETWEEN / inner if rows > 1 else 0,
        subplot_titles=[panel.title() for panel in record.panels],
    )
    low = min(float(each.margin.min()) for each in record.margins)
    high = max(float(each.margin.max()) for each in record.margins)
    room = 0.06 * (high - low)
    gap = _LABEL * (high - low + 2 * room) / _ROW_HEIGHT
    lines: list[_Mark] = []
    labels: list[_Mark] = []
    for i, each in enumerate(record.margins):
        ends = placed(
            each.margin[:, -1].tolist(), gap, (low - room + gap / 2, high + room - gap / 2)
        )
        own_lines, own_labels = _draw(plot, each, ends, i // columns + 1, i % columns + 1)
        lines, labels = lines + own_lines, labels + own_labels
    n_loops = record.margins[0].margin.shape[1]
    plot.update_layout(shapes=lines, annotations=[*plot.layout.annotations, *labels])
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.update_xaxes(range=[0.7, n_loops + 0.3], tick0=4, dtick=4, showticklabels=True)
    plot.update_xaxes(title="iterations", row=rows)
    plot.update_yaxes(range=[low - room, high + room], showgrid=True)
    plot.update_yaxes(title="mean logit margin of the answer", col=1)
    styled(plot, height).update_layout(margin={"t": _TOP, "b": _BOTTOM}, showlegend=False)
    small_titles(plot, len(record.panels))
    headline(plot, _READING, 26)
    return plot


def _draw(
    plot: go.Figure, each: Overthinking, ends: Sequence[float], row: int, col: int
) -> tuple[list[_Mark], list[_Mark]]:
    """Draw the curves; the lines and labels that belong to them are returned, because plotly is
    slow at adding them one by one.
    """
    colors = hop_colors(each.hop_counts, each.trained_hops)
    x, y = (axis.plotly_name.replace("axis", "") for axis in plot.get_subplot(row, col))
    lines: list[_Mark] = []
    labels: list[_Mark] = []
    last = each.margin.shape[1]
    for i, hop in enumerate(each.hop_counts):
        hit, share, color = float(each.t_star[i]), float(each.hit_share[i]), colors[hop]
        plot.add_scatter(
            x=list(range(1, last + 1)), y=each.margin[i].tolist(), mode="lines", name=hop_name(hop),
            line={"color": color, "width": 2},
            hovertemplate=f"{hop_name(hop)}<br>%{{x}} iterations<br>mean margin %{{y:.2f}}<br>"
            f"ever right {share:.2f}, t* {hit:.1f}<extra></extra>",
            row=row, col=col,
        )  # fmt: skip
        if share >= 0.5:
            line = {"color": color, "width": 1, "dash": "dash"}
            ends_of_line = {"x0": hit, "x1": hit, "y0": 0, "y1": 1, "xref": x}
            lines.append({**ends_of_line, "yref": f"{y} domain", "line": line})
        font = {"size": 10.5, "color": deeper(color)}
        place = {"x": last + 0.3, "y": ends[i], "xref": x, "yref": y, "xshift": 2}
        text = {"text": str(hop), "showarrow": False, "xanchor": "left", "font": font}
        labels.append({**place, **text})
    return lines, labels


def placed(heights: Sequence[float], gap: float, bounds: tuple[float, float]) -> list[float]:
    """Heights of labels moved apart, up as far as down, until no two are closer than `gap`, and
    moved between the bounds.

    Their order stays. Where the bounds leave too little room, labels go below the lower one.
    """
    order = sorted(range(len(heights)), key=heights.__getitem__)
    rising = [heights[i] for i in order]
    apart = [
        (above + below) / 2
        for above, below in zip(spread(rising, gap), _spread_down(rising, gap), strict=True)
    ]
    risen = spread([max(height, bounds[0]) for height in apart], gap)
    found = dict(
        zip(order, _spread_down([min(height, bounds[1]) for height in risen], gap), strict=True)
    )
    return [found[i] for i in range(len(heights))]


def _spread_down(rising: Sequence[float], gap: float) -> list[float]:
    """As `spread`, downwards, for heights in rising order."""
    return [-height for height in spread([-height for height in reversed(rising)], gap)][::-1]


def _found(record: Margins) -> str:
    falls = [
        f"{panel.checkpoint} {float(each.drop().max()):.2f}"
        for panel, each in zip(record.panels, record.margins, strict=True)
    ]
    return f"Largest fall of a mean margin below its peak, in logits: {', '.join(falls)}."


SECTION = Section(
    title="Logit margins",
    look_for=(
        "Each panel is one checkpoint and each curve one hop count: the mean logit margin of the"
        " answer after each iteration, on one scale. Dashed lines mark t*, the mean number of"
        " iterations after which the answer is first the top token."
    ),
    measure=lambda opened: run(opened.compared(MarginsConfig)),
    found=_found,
)

EXAMPLE = 'plots.margins("mini/multi_hop/r4", n_loops=8, per_hop=5)'
