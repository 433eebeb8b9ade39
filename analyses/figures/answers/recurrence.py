"""How deep can it reason with how many iterations? Accuracy for each hop count and r (figures 5, 7,
12 to 18).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.by_hop import Runs, hops_and_texts, open_runs
from loopscope.analyses.common.claims import EXTRAPOLATES
from loopscope.analyses.common.configs import AnswersConfig
from loopscope.analyses.common.look import groups_along, note
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.common.subject import Subject
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import ACCURACY_SCALE, CELL_TEXT, INK, color_bar, styled
from loopscope.interp.exits.halting import HaltingRule, apply_rule


@dataclass(frozen=True, kw_only=True)
class RecurrenceConfig(AnswersConfig):
    """Accuracy for each hop count or text and each number of iterations (figures 5, 7 and 12 to
    18).
    """

    kl: float = 0.01
    """Row r*: halt when KL(p_t || p_t-1) is below this ..."""
    entropy: float = 3.0
    """... and the entropy is below this, both in nats."""
    trained_hops: int | None = None
    """Deepest hop count seen in training, to mark in the figure; by default what card.json says."""


@dataclass(frozen=True)
class RecurrenceGrid(Record):
    """Accuracy after each number of iterations.

    Attributes:
        hops: The hop counts; empty where texts are run.
        questions: How many of each.
        accuracy: Float[Tensor, "hop r"]; column r-1 is what a call with n_loops=r answers. Of a
            text it is 1 where the answer is the top token, else 0.
        halted: Float[Tensor, " hop"], accuracy with adaptive halting (the row r*).
        halted_loops: Float[Tensor, " hop"], mean iterations that halting used.
        rule: The halting rule.
        trained_hops, trained_loops: Deepest hop count and iterations in training; None where
            unknown.
        texts: The texts with their answers, each in the place of a hop count.
    """

    hops: tuple[int, ...]
    questions: tuple[int, ...]
    accuracy: Float[Tensor, "hop r"]
    halted: Float[Tensor, " hop"]
    halted_loops: Float[Tensor, " hop"]
    rule: str
    trained_hops: int | None
    trained_loops: int | None
    texts: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[str, tuple[int, ...] | tuple[str, ...]]:
        """The kind of the rows of the accuracy, and their names."""
        return ("text", self.texts) if self.texts else ("hops", self.hops)

    def heading(self) -> str:
        """The texts with their answers; nothing for questions."""
        return "; ".join(self.texts)

    def frame(self) -> pd.DataFrame:
        """hops (or text), stop ("fixed", or "halting" for the row r*), iterations (run; with
        halting their mean), accuracy.
        """
        n_loops = self.accuracy.shape[1]
        rows: list[tuple[object, str, float, float]] = []
        kind, names = self.groups
        for i, hop in enumerate(names):
            rows += [
                (hop, "fixed", float(r), float(self.accuracy[i, r - 1]))
                for r in range(1, n_loops + 1)
            ]
            rows.append((hop, "halting", float(self.halted_loops[i]), float(self.halted[i])))
        return pd.DataFrame(rows, columns=[kind, "stop", "iterations", "accuracy"])

    def summary(self) -> pd.DataFrame:
        """One row per hop count or text: best accuracy over r, the smallest r that reaches it,
        accuracy at the last r and with halting.
        """
        best, (kind, names) = self.accuracy.max(1), self.groups
        return pd.DataFrame(
            {
                kind: names,
                "questions": self.questions,
                "best accuracy": best.values,
                "at r": best.indices + 1,
                f"at r = {self.accuracy.shape[1]}": self.accuracy[:, -1],
                "with halting (r*)": self.halted,
                "mean r*": self.halted_loops,
            }
        )


def run(config: RecurrenceConfig) -> RecurrenceGrid:
    """Measure accuracy after each of `n_loops` iterations, from one run."""
    subject, runs = open_runs(config)
    rule = HaltingRule(config.kl, config.entropy)
    return measure(subject, runs, rule, config.trained_hops)


def measure(
    subject: Subject, runs: Runs, rule: HaltingRule, trained_hops: int | None = None
) -> RecurrenceGrid:
    """The record of runs that were made already."""
    accuracy, halted, used = [], [], []
    for done in runs.values():
        accuracy.append(done.lens.correct(done.answers).float().mean(1))
        stopped = apply_rule(done.lens, rule)
        halted.append(stopped.correct(done.answers).float().mean())
        used.append(stopped.iterations.float().mean())
    sizes = tuple(len(done.answers) for done in runs.values())
    hops, texts = hops_and_texts(runs)
    known = subject.trained_hops if trained_hops is None else trained_hops
    return RecurrenceGrid(
        hops=hops,
        questions=sizes,
        accuracy=torch.stack(accuracy).cpu(),
        halted=torch.stack(halted).cpu(),
        halted_loops=torch.stack(used).cpu(),
        rule=str(rule),
        trained_hops=None if texts else known,
        trained_loops=subject.model.cfg.n_loops,
        texts=texts,
    )


def figure(record: RecurrenceGrid) -> go.Figure:
    """Hops or texts along, iterations upwards, accuracy as colour; the row r* on top; lines at what
    training covered.
    """
    n_loops = record.accuracy.shape[1]
    share = 1.4 / (n_loops + 2)
    plot = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[share, 1 - share], vertical_spacing=0.025
    )
    scale = {"colorscale": ACCURACY_SCALE, "zmin": 0, "zmax": 1, "xgap": 2, "ygap": 2}
    places = groups_along(plot, record.hops, record.texts)
    where = "%{hovertext}" if record.texts else "%{x} hops"
    names = [list(map(label, record.texts))] * n_loops if record.texts else None
    look = {"x": places, "texttemplate": "%{text}", "textfont": CELL_TEXT, "col": 1, **scale}
    plot.add_heatmap(
        y=["r*"],
        hovertext=names and names[:1],
        z=[record.halted.tolist()],
        customdata=[record.halted_loops.tolist()],
        text=[[f"{a:.2f}" for a in record.halted.tolist()]],
        hovertemplate=f"{where}, halting ({label(record.rule)})<br>accuracy %{{z:.2f}}<br>"
        "mean iterations %{customdata:.1f}<extra></extra>",
        showscale=False,
        row=1,
        **look,
    )
    plot.add_heatmap(
        y=list(range(1, n_loops + 1)),
        hovertext=names,
        z=record.accuracy.T.tolist(),
        text=[[f"{a:.2f}".removeprefix("0") for a in row] for row in record.accuracy.T.tolist()],
        hovertemplate=f"{where}, r = %{{y}}<br>accuracy %{{z:.2f}}<extra></extra>",
        colorbar=color_bar("accuracy"),
        row=2,
        **look,
    )
    _mark_training(plot, record)
    plot.update_xaxes(visible=False, row=1, col=1)
    plot.update_yaxes(title="iterations r", dtick=2, tick0=2, row=2, col=1)
    return styled(plot, 560)


def _mark_training(plot: go.Figure, record: RecurrenceGrid) -> None:
    """Lines right of the deepest hop count, and above the iterations, of training."""
    if record.trained_hops is not None:
        at = record.trained_hops + 0.5
        plot.add_vline(x=at, line={"color": INK, "width": 1.5, "dash": "dot"})
        place = {"x": at, "y": 1.0, "yref": "paper", "yshift": 14}
        note(plot, "in training", xanchor="right", xshift=-4, **place)
        note(plot, "beyond", xanchor="left", xshift=4, **place)
    if record.trained_loops is not None and record.trained_loops < record.accuracy.shape[1]:
        line = {"color": INK, "width": 1, "dash": "dot"}
        plot.add_hline(y=record.trained_loops + 0.5, line=line, row=2, col=1)


def _found(record: RecurrenceGrid) -> str:
    best = record.accuracy.max(1).values
    trained = record.trained_hops or 0
    beyond = [
        hop
        for hop, accuracy in zip(record.hops, best.tolist(), strict=True)
        if hop > trained and accuracy >= EXTRAPOLATES
    ]
    reach = "no hop count reaches 0.60"
    if beyond:
        reach = f"up to {max(beyond)} hops stay at 0.60 or better"
    if not trained:
        return f"Over all hop counts, {reach}."
    inside = best[: sum(hop <= trained for hop in record.hops)]
    return (
        f"Hop counts in training reach at least {inside.min():.2f} at their best r. Beyond"
        f" training {reach}."
    )


SECTION = Section(
    title="Accuracy by hops and iterations",
    look_for=(
        "Each cell is the accuracy if the model is stopped after r iterations; all rows come from"
        " one run. Hop counts to the right of the dotted line were not in training. Deeper"
        " questions need more iterations. A column whose colour fades towards the top overthinks."
        " In the row r* an adaptive rule chooses when to stop."
    ),
    measure=lambda opened: measure(
        opened.subject, opened.runs, HaltingRule(RecurrenceConfig.kl, RecurrenceConfig.entropy)
    ),
    found=_found,
)

EXAMPLE = 'plots.recurrence("mini/multi_hop/r4", n_loops=8, per_hop=5)'
