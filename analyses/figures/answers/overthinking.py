"""Does the answer get worse with more iterations? Mean logit margin against iterations run (figure
8 of arXiv 2604.07822).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.by_hop import Runs, open_runs, run_each_text
from loopscope.analyses.common.configs import AnswersConfig
from loopscope.analyses.common.look import hop_colors, hop_name
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_inputs
from loopscope.analyses.common.subject import Subject
from loopscope.interp.drawing.labels import label, shortened
from loopscope.interp.drawing.look import CATEGORIES, INK, SOFT, styled


@dataclass(frozen=True, kw_only=True)
class OverthinkingConfig(AnswersConfig):
    """Mean logit margin of the answer after each iteration, one curve per hop count or text (figure
    8 of arXiv 2604.07822).
    """


_LONGEST = 44  # characters of a name in the legend
_FALL = 0.5  # logits below the peak that count as a fall


@dataclass(frozen=True)
class Overthinking(Record):
    """Margins per group of inputs and iterations run.

    Attributes:
        groups: What each curve is over: "3 hops", or a text with its answer.
        hops: The hop counts; None for texts.
        questions: How many inputs each group has.
        margin: Float[Tensor, "hop r"], mean over the questions, in logits; column r-1 is after r
            iterations.
        t_star: Float[Tensor, " hop"], mean number of iterations after which the answer is first the
            top token, over the questions ever answered; NaN where none is.
        hit_share: Float[Tensor, " hop"], share of questions ever answered.
        trained_hops: Deepest hop count seen in training; None where unknown.
    """

    groups: tuple[str, ...]
    hops: tuple[int | None, ...]
    questions: tuple[int, ...]
    margin: Float[Tensor, "hop r"]
    t_star: Float[Tensor, " hop"]
    hit_share: Float[Tensor, " hop"]
    trained_hops: int | None

    @property
    def hop_counts(self) -> tuple[int, ...]:
        """The hop counts of questions, without texts."""
        return tuple(hop for hop in self.hops if hop is not None)

    def heading(self) -> str:
        """The texts with their answers; nothing for questions."""
        return "; ".join(self.groups) if None in self.hops else ""

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
        """group, hops, iterations (run), margin."""
        n_loops = self.margin.shape[1]
        rows = [
            (group, self.hops[i], r, float(self.margin[i, r - 1]))
            for i, group in enumerate(self.groups)
            for r in range(1, n_loops + 1)
        ]
        frame = pd.DataFrame(rows, columns=["group", "hops", "iterations", "margin"])
        return frame.astype({"hops": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per hop count or text: questions, ever answered, t*, peak margin and the
        iterations run there, last margin, drop.
        """
        peak, where = self.peak()
        of = {"text": self.groups} if None in self.hops else {"hops": self.hops}
        return pd.DataFrame(
            {
                **of,
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
    """Measure the margin of every input's answer after every iteration."""
    return measure(*open_runs(config))


def measure(subject: Subject, runs: Runs) -> Overthinking:
    """The record of runs that were made already."""
    margins, t_star, hit = [], [], []
    for done in runs.values():
        margins.append(done.lens.margin(done.answers).mean(1))
        first = done.lens.first_hit(done.answers)
        t_star.append(first.nanmean())
        hit.append(first.isfinite().float().mean())
    sizes = tuple(len(done.answers) for done in runs.values())
    return Overthinking(
        groups=tuple(hop_name(key) if isinstance(key, int) else key for key in runs),
        hops=tuple(key if isinstance(key, int) else None for key in runs),
        questions=sizes,
        margin=torch.stack(margins).float().cpu(),
        t_star=torch.stack(t_star).float().cpu(),
        hit_share=torch.stack(hit).cpu(),
        trained_hops=subject.trained_hops,
    )


def figure(record: Overthinking) -> go.Figure:
    """One curve per group, with a dashed line at its mean first hit."""
    plot = go.Figure()
    iterations = list(range(1, record.margin.shape[1] + 1))
    for i, color in enumerate(_colors(record)):
        plot.add_trace(_curve(record, i, color))
        hit = float(record.t_star[i])
        if hit == hit:
            plot.add_vline(x=hit, line={"color": color, "width": 1, "dash": "dash"})
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.add_annotation(
        x=1,
        xref="paper",
        y=0,
        text="above: the answer is the top token",
        showarrow=False,
        yshift=9,
        xanchor="right",
        font={"size": 11, "color": SOFT},
    )
    plot.update_xaxes(title="iterations", dtick=2, range=[0.7, iterations[-1] + 0.3])
    plot.update_yaxes(title="mean logit margin of the answer", showgrid=True)
    return styled(plot, max(480, 150 + 25 * len(record.hops)))  # the legend fits without scrolling


def _colors(record: Overthinking) -> list[str]:
    """By hop count, or one of a few colours for each text."""
    by_hop = hop_colors(record.hop_counts, record.trained_hops)
    return [
        CATEGORIES[i % len(CATEGORIES)] if hop is None else by_hop[hop]
        for i, hop in enumerate(record.hops)
    ]


def _curve(record: Overthinking, group: int, color: str) -> go.Scatter:
    hop, margin = record.hops[group], record.margin[group]
    name = label(shortened(record.groups[group], _LONGEST))
    beyond = None not in (hop, record.trained_hops) and (hop or 0) > (record.trained_hops or 0)
    known = hop is not None and record.trained_hops is not None
    return go.Scatter(
        x=list(range(1, len(margin) + 1)),
        y=margin.tolist(),
        mode="lines",
        name=name,
        showlegend=True,
        legendgroup="beyond" if beyond else "trained",
        legendgrouptitle_text=(
            "beyond training" if beyond else "hops in training" if known else None
        ),
        line={"color": color, "width": 2.5 if beyond else 1.8},
        hovertemplate=f"{label(record.groups[group])}<br>%{{x}} iterations<br>"
        "mean margin %{y:.2f}<extra></extra>",
    )


def _found(record: Overthinking) -> str:
    drop, (peak, where) = record.drop(), record.peak()
    answered = [i for i in range(len(record.hops)) if peak[i] > 0] or list(range(len(record.hops)))
    worst = max(answered, key=lambda i: float(drop[i]))
    falls = zip(record.groups, drop.tolist(), strict=True)
    falling = [group for group, fall in falls if fall > _FALL]
    return (
        f"Among the groups that are answered on average, {record.groups[worst]} falls most: its"
        f" mean margin peaks at {peak[worst]:.2f} after {int(where[worst])} iterations and ends at"
        f" {record.margin[worst, -1]:.2f}. Groups that end more than half a logit below their"
        f" peak: {', '.join(falling) or 'none'}."
    )


def _of_report(opened: Opened) -> Overthinking:
    if opened.asked.given is None:
        return measure(opened.subject, opened.runs)
    runs = run_each_text(opened.asked, opened.config.n_loops, opened.config.answer)
    return measure(opened.subject, runs)


SECTION = Section(
    title="Logit margin and overthinking",
    look_for=(
        "Each curve shows the mean logit margin after every iteration: the logit of the right"
        " answer minus the largest other logit. A dashed line marks t*, the mean number of"
        " iterations after which the answer is first the top token. Questions with more hops"
        " should rise later. A curve that falls after its peak is overthinking: more iterations"
        " make the answer worse."
    ),
    measure=_of_report,
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.overthinking("mini/smiles", text=["CC(=O)N", "CCO"], n_loops=12)'
