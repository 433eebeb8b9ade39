"""When does the model change its mind, and for the better? Changes of the top answer at each
iteration, side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.by_hop import HopRun
from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.panels import Panel, headline, run_each, small_titles, together
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import (
    ACCURACY_SCALE,
    CATEGORIES,
    GREY_SCALE,
    INK,
    MARK,
    SOFT,
    WARM_SCALE,
    styled,
)


@dataclass(frozen=True, kw_only=True)
class FlipsConfig(PanelsConfig):
    """How often the top answer changes at each iteration: to right, from right, and between wrong
    answers.
    """

    n_loops: int = 24
    """Iterations to run."""


KINDS = ("wrong to right", "right to wrong", "wrong to wrong")
_COLORS = (CATEGORIES[0], MARK, SOFT)
_SCALES = (ACCURACY_SCALE, WARM_SCALE, GREY_SCALE)


@dataclass(frozen=True)
class FlipShares:
    """Changes of the top answer of one checkpoint.

    Attributes:
        hops: The hop counts.
        questions: How many of each.
        share: Float[Tensor, "kind hop step"], share of the questions of a hop count whose top
            answer after `step` + 2 iterations is another than one iteration before, for each of
            `KINDS`.
        trained_loops: Iterations in training (the most, where they were drawn); None where unknown.
    """

    hops: tuple[int, ...]
    questions: tuple[int, ...]
    share: Float[Tensor, "kind hop step"]
    trained_loops: int | None

    def frame(self) -> pd.DataFrame:
        """hops, iterations (after which the answer is another one), kind, share."""
        rows = [
            (hop, step + 2, kind, float(self.share[k, i, step]))
            for i, hop in enumerate(self.hops)
            for step in range(self.share.shape[2])
            for k, kind in enumerate(KINDS)
        ]
        return pd.DataFrame(rows, columns=["hops", "iterations", "kind", "share"])


@dataclass(frozen=True)
class Flips(Record):
    """Changes of the top answer of several checkpoints.

    Attributes:
        panels: The checkpoints.
        flips: Their changes, all of the same number of iterations.
    """

    panels: tuple[Panel, ...]
    flips: tuple[FlipShares, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, hops, iterations (after which the answer is another one), kind, share."""
        return together(self.panels, [each.frame() for each in self.flips])

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint and hop count: changes per question over the whole run by kind,
        and those after the training R.
        """
        frames = []
        for each in self.flips:
            late = each.share[:, :, max(0, (each.trained_loops or 1) - 1) :].sum((0, 2))
            totals = {f"{kind} per question": each.share[k].sum(1) for k, kind in enumerate(KINDS)}
            frames.append(
                pd.DataFrame({"hops": each.hops, **totals, "all after the training R": late})
            )
        return together(self.panels, frames)


def run(config: FlipsConfig) -> Flips:
    """Compare the top answer of every question with that of one iteration before.

    Raises:
        ValueError: Fewer than 2 iterations, no checkpoint is named, or one has no questions.
    """
    if config.n_loops < 2:
        raise ValueError(
            f"a change of the answer needs n_loops of at least 2, got {config.n_loops}"
        )
    found = [
        (Panel.of(each), measure(runs, each.model.cfg.n_loops))
        for each, runs in run_each(config, config.n_loops)
    ]
    return Flips(tuple(panel for panel, _ in found), tuple(shares for _, shares in found))


def measure(runs: Mapping[int, HopRun], trained_loops: int | None) -> FlipShares:
    """The shares of runs that were made already."""
    shares = []
    for done in runs.values():
        top = done.lens.top(1).tokens[..., 0]
        right = top == done.answers
        before, after, changed = right[:-1], right[1:], top[1:] != top[:-1]
        shares.append(
            torch.stack([~before & after, before & ~after, changed & ~before & ~after])
            .float()
            .mean(2)
            .cpu()
        )
    return FlipShares(
        tuple(runs),
        tuple(len(done.answers) for done in runs.values()),
        torch.stack(shares, dim=1),
        trained_loops,
    )


def figure(record: Flips) -> go.Figure:
    """Rows are the kinds of change, columns the checkpoints; iterations along, hops upwards, the
    share as colour.
    """
    columns = len(record.flips)
    plot = make_subplots(
        rows=len(KINDS),
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=0.025,
        vertical_spacing=0.05,
        column_titles=[panel.title() for panel in record.panels],
    )
    for k, kind in enumerate(KINDS):
        most = max(float(each.share[k].max()) for each in record.flips) or 1.0
        plot.update_layout({f"coloraxis{k + 1}": _color_axis(k, most)})
        for col, (panel, each) in enumerate(zip(record.panels, record.flips, strict=True), start=1):
            _draw(plot, panel, each, k, col)
        plot.update_yaxes(
            title=f"<b>{kind}</b><br>hops", title_font_color=_COLORS[k], row=k + 1, col=1
        )
    last = record.flips[0].share.shape[2] + 1
    plot.update_xaxes(title="iterations", row=len(KINDS))
    plot.update_xaxes(tick0=4, dtick=4, range=[1.4, last + 0.6])
    hops = [hop for each in record.flips for hop in each.hops]
    plot.update_yaxes(tick0=4, dtick=4, range=[min(hops) - 0.5, max(hops) + 0.5])
    styled(plot, 700).update_layout(margin={"t": 64, "r": 80})
    small_titles(plot, columns)
    headline(plot, "dotted: the training R and the deepest hop in training", 26)
    return plot


def _draw(plot: go.Figure, panel: Panel, each: FlipShares, kind: int, col: int) -> None:
    last = each.share.shape[2] + 1
    plot.add_heatmap(
        x=list(range(2, last + 1)),
        y=list(each.hops),
        z=each.share[kind].tolist(),
        coloraxis=f"coloraxis{kind + 1}",
        xgap=1,
        ygap=1,
        hovertemplate=(
            f"{label(panel.checkpoint)}<br>%{{y}} hops, after %{{x}} iterations<br>{KINDS[kind]}"
            " %{z:.2f} of the questions<extra></extra>"
        ),
        row=kind + 1,
        col=col,
    )
    line = {
        "line": {"color": INK, "width": 1.2, "dash": "dot"},
        "row": kind + 1,
        "col": col,
    }
    if panel.trained_hops is not None and panel.trained_hops < each.hops[-1]:
        at = panel.trained_hops + 0.5
        plot.add_shape(type="line", x0=1.5, x1=last + 0.5, y0=at, y1=at, **line)
    if each.trained_loops is not None and 1 < each.trained_loops < last:
        at = each.trained_loops + 0.5
        plot.add_shape(
            type="line", x0=at, x1=at, y0=each.hops[0] - 0.5, y1=each.hops[-1] + 0.5, **line
        )


def _color_axis(kind: int, most: float) -> dict[str, object]:
    """A scale from white to the colour of a kind, with its bar beside its row."""
    share = 1 / len(KINDS)
    title = {"text": "share of questions", "side": "right", "font": {"size": 12}}
    bar = {
        "len": share * 0.9,
        "y": 1 - share * (kind + 0.5),
        "thickness": 10,
        "outlinewidth": 0,
        "title": title,
        "tickformat": ".1f",
    }
    return {
        "colorscale": _SCALES[kind],
        "cmin": 0,
        "cmax": most,
        "colorbar": bar,
    }


def _found(record: Flips) -> str:
    """Of a record of one checkpoint."""
    (shares,) = record.flips
    late = shares.share[:, :, max(0, (shares.trained_loops or 1) - 1) :].sum(2).mean(1)
    return (
        f"Per question, over all hop counts: {float(shares.share[0].sum(1).mean()):.2f} changes to"
        f" the right answer and {float(shares.share[1].sum(1).mean()):.2f} away from it; after the"
        f" training R, {float(late[0]):.2f} and {float(late[1]):.2f}."
    )


SECTION = Section(
    title="Answer flips",
    look_for=(
        "Each cell is the share of questions of one hop count whose top answer changes at that"
        " iteration. Right answers should appear along a diagonal, because deeper questions need"
        " more iterations. Changes from right to wrong at late iterations are overthinking, seen"
        " question by question."
    ),
    measure=lambda opened: Flips(
        (Panel.of(opened.subject),), (measure(opened.runs, opened.subject.model.cfg.n_loops),)
    ),
    found=_found,
)

EXAMPLE = 'plots.flips("mini/multi_hop/r4", n_loops=8, per_hop=5)'
