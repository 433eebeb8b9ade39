"""Does the answer get worse with more iterations? Mean logit margin against iterations run (figure
8 of arXiv 2604.07822).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.by_hop import HopRun, run_by_hop
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.look import FAINT, INK, hop_colors, hop_name, styled
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.common.subject import Subject, open_subject


@dataclass(frozen=True, kw_only=True)
class OverthinkingConfig(SourceConfig):
    """Mean logit margin of the answer after each iteration, one curve per hop count (figure 8 of
    arXiv 2604.07822).
    """

    n_loops: int = 24
    """Iterations to run."""


@dataclass(frozen=True)
class Overthinking(Record):
    """Margins per hop count and iterations run.

    Attributes:
        hops: The hop counts.
        questions: How many of each.
        margin: Float[Tensor, "hop r"], mean over the questions, in logits; column r-1 is after r
            iterations.
        t_star: Float[Tensor, " hop"], mean number of iterations after which the answer is first the
            top token, over the questions ever answered; NaN where none is.
        hit_share: Float[Tensor, " hop"], share of questions ever answered.
        trained_hops: Deepest hop count seen in training; None where unknown.
    """

    hops: tuple[int, ...]
    questions: tuple[int, ...]
    margin: Float[Tensor, "hop r"]
    t_star: Float[Tensor, " hop"]
    hit_share: Float[Tensor, " hop"]
    trained_hops: int | None

    def peak(self) -> tuple[Float[Tensor, " hop"], Int[Tensor, " hop"]]:
        """The largest mean margin of each hop count, and after how many iterations it is there."""
        best = self.margin.max(1)
        return best.values, best.indices + 1

    def drop(self) -> Float[Tensor, " hop"]:
        """How far the mean margin has fallen from its peak at the last iteration: the size of
        overthinking.
        """
        return self.peak()[0] - self.margin[:, -1]

    def frame(self) -> pd.DataFrame:
        """hops, iterations (run), margin."""
        n_loops = self.margin.shape[1]
        rows = [
            (hop, r, float(self.margin[i, r - 1]))
            for i, hop in enumerate(self.hops)
            for r in range(1, n_loops + 1)
        ]
        return pd.DataFrame(rows, columns=["hops", "iterations", "margin"])

    def summary(self) -> pd.DataFrame:
        """One row per hop count: questions, ever answered, t*, peak margin and the iterations run
        there, last margin, drop.
        """
        peak, where = self.peak()
        return pd.DataFrame(
            {
                "hops": self.hops,
                "questions": self.questions,
                "ever right": self.hit_share,
                "t*": self.t_star,
                "peak margin": peak,
                "at iterations": where,
                "last margin": self.margin[:, -1],
                "drop": self.drop(),
            }
        )


def run(config: OverthinkingConfig) -> Overthinking:
    """Measure the margin of every question after every iteration."""
    subject = open_subject(config)
    return measure(subject, run_by_hop(subject, config.n_loops))


def measure(subject: Subject, runs: Mapping[int, HopRun]) -> Overthinking:
    """The record of runs that were made already."""
    margins, t_star, hit = [], [], []
    for done in runs.values():
        margins.append(done.lens.margin(done.answers).mean(1))
        first = done.lens.first_hit(done.answers)
        t_star.append(first.nanmean())
        hit.append(first.isfinite().float().mean())
    sizes = tuple(len(done.answers) for done in runs.values())
    return Overthinking(
        hops=tuple(runs),
        questions=sizes,
        margin=torch.stack(margins).float().cpu(),
        t_star=torch.stack(t_star).float().cpu(),
        hit_share=torch.stack(hit).cpu(),
        trained_hops=subject.trained_hops,
    )


def figure(record: Overthinking) -> go.Figure:
    """One curve per hop count, with a dashed line at its mean first hit."""
    plot = go.Figure()
    colors = hop_colors(record.hops, record.trained_hops)
    iterations = list(range(1, record.margin.shape[1] + 1))
    for i, hop in enumerate(record.hops):
        beyond = record.trained_hops is not None and hop > record.trained_hops
        plot.add_scatter(
            x=iterations,
            y=record.margin[i].tolist(),
            mode="lines",
            name=hop_name(hop),
            legendgroup="beyond" if beyond else "trained",
            legendgrouptitle_text=(
                "beyond training" if beyond else "hops in training" if record.trained_hops else None
            ),
            line={"color": colors[hop], "width": 2.5 if beyond else 1.8},
            hovertemplate=(
                f"{hop_name(hop)}<br>%{{x}} iterations<br>mean margin %{{y:.2f}}<extra></extra>"
            ),
        )
        hit = float(record.t_star[i])
        if hit == hit:
            plot.add_vline(
                x=hit, line={"color": colors[hop], "width": 1, "dash": "dash"}, opacity=0.55
            )
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.add_annotation(
        x=1,
        xref="paper",
        y=0,
        text="above: the answer is the top token",
        showarrow=False,
        yshift=9,
        xanchor="right",
        font={"size": 11, "color": FAINT},
    )
    plot.update_xaxes(title="iterations", dtick=2, range=[0.7, iterations[-1] + 0.3])
    plot.update_yaxes(title="mean logit margin of the answer", showgrid=True)
    return styled(plot, max(480, 150 + 25 * len(record.hops)))  # the legend fits without scrolling


def _found(record: Overthinking) -> str:
    drop, (peak, where) = record.drop(), record.peak()
    answered = [i for i in range(len(record.hops)) if peak[i] > 0] or list(range(len(record.hops)))
    worst = max(answered, key=lambda i: float(drop[i]))
    falling = [str(hop) for hop, fall in zip(record.hops, drop.tolist(), strict=True) if fall > 0.5]
    return (
        f"Among the hop counts that are answered on average, {record.hops[worst]} falls most: its"
        f" mean margin peaks at {peak[worst]:.2f} after {int(where[worst])} iterations and ends at"
        f" {record.margin[worst, -1]:.2f}. Hop counts that end more than half a logit below their"
        f" peak: {', '.join(falling) or 'none'}."
    )


SECTION = Section(
    title="Logit margin and overthinking",
    look_for=(
        "Each curve is the mean margin of the right answer over its strongest rival after every"
        " iteration. A dashed line marks the mean number of iterations at which the answer is first"
        " on top (t*). A curve that falls after its peak is overthinking: more iterations make the"
        " answer worse. Questions with more hops should rise later."
    ),
    measure=lambda opened: measure(opened.subject, opened.runs),
    found=_found,
)
