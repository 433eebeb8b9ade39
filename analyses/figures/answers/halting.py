"""When would it stop, and is it right when it does? Iterations used and accuracy per rule (figures
9 and 10).
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
from loopscope.analyses.common.configs import AnswersConfig
from loopscope.analyses.common.look import groups_along
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import CATEGORIES, FAINT, INK, styled
from loopscope.interp.exits.halting import HaltingRule, apply_rule


@dataclass(frozen=True, kw_only=True)
class HaltingConfig(AnswersConfig):
    """Iterations used and accuracy per hop count or text, for several halting rules (figures 9 and
    10).
    """

    n_loops: int = 24
    """The cap: an example that never halts uses the last iteration."""
    kl: float = 0.01
    """Threshold of KL(p_t || p_t-1), in nats."""
    entropy: float = 3.0
    """Threshold of the entropy, in nats."""


_COLORS = (*CATEGORIES[:3], FAINT)


@dataclass(frozen=True)
class HaltingCurves(Record):
    """Where several rules stop.

    Attributes:
        hops: The hop counts; empty where texts are run.
        rules: The rules' names.
        iterations: Float[Tensor, "rule hop"], mean iterations used.
        accuracy: Float[Tensor, "rule hop"], after the iterations at which each example stopped. Of
            a text it is 1 where the answer is the top token there, else 0.
        halted: Float[Tensor, "rule hop"], share of examples that the rule stopped before the cap
            made it.
        best: Float[Tensor, " hop"], the best accuracy over all fixed r, for comparison.
        cap: Iterations of the run.
        texts: The texts with their answers, each in the place of a hop count.
    """

    hops: tuple[int, ...]
    rules: tuple[str, ...]
    iterations: Float[Tensor, "rule hop"]
    accuracy: Float[Tensor, "rule hop"]
    halted: Float[Tensor, "rule hop"]
    best: Float[Tensor, " hop"]
    cap: int
    texts: tuple[str, ...] = ()

    def heading(self) -> str:
        """The texts with their answers; nothing for questions."""
        return "; ".join(self.texts)

    def frame(self) -> pd.DataFrame:
        """rule, hops (or text), iterations (mean), accuracy, halted (share)."""
        rows = [
            (
                rule,
                hop,
                float(self.iterations[i, j]),
                float(self.accuracy[i, j]),
                float(self.halted[i, j]),
            )
            for i, rule in enumerate(self.rules)
            for j, hop in enumerate(self.texts or self.hops)
        ]
        kind = "text" if self.texts else "hops"
        return pd.DataFrame(rows, columns=["rule", kind, "iterations", "accuracy", "halted"])

    def summary(self) -> pd.DataFrame:
        """One row per rule, over all hop counts or texts alike: mean iterations, mean accuracy,
        share halted, gap to the best r.
        """
        return pd.DataFrame(
            {
                "rule": self.rules,
                "mean iterations": self.iterations.mean(1),
                "mean accuracy": self.accuracy.mean(1),
                "below the best r": (self.best - self.accuracy).mean(1),
                "halted": self.halted.mean(1),
            }
        )


def run(config: HaltingConfig) -> HaltingCurves:
    """Run once and apply four rules: KL and entropy, KL only, entropy only, fixed."""
    _, runs = open_runs(config)
    return measure(runs, config.kl, config.entropy)


def measure(runs: Runs, kl: float, entropy: float) -> HaltingCurves:
    """The record of runs that were made already."""
    rules = (
        HaltingRule(kl, entropy),
        HaltingRule(kl, None),
        HaltingRule(None, entropy),
        HaltingRule(None, None),
    )
    used, accuracy, halted = [], [], []
    for rule in rules:
        stops = [(apply_rule(done.lens, rule), done.answers) for done in runs.values()]
        used.append([float(stop.iterations.float().mean()) for stop, _ in stops])
        accuracy.append([float(stop.correct(answers).float().mean()) for stop, answers in stops])
        halted.append([float(stop.halted.float().mean()) for stop, _ in stops])
    best = [float(done.lens.correct(done.answers).float().mean(1).max()) for done in runs.values()]
    cap, (hops, texts) = len(next(iter(runs.values())).lens.names), hops_and_texts(runs)
    return HaltingCurves(
        hops=hops,
        rules=tuple(map(str, rules)),
        iterations=torch.tensor(used),
        accuracy=torch.tensor(accuracy),
        halted=torch.tensor(halted),
        best=torch.tensor(best),
        cap=cap,
        texts=texts,
    )


def figure(record: HaltingCurves) -> go.Figure:
    """Left: iterations used per hop count or text; right: accuracy; one line per rule."""
    plot = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=("iterations used", "accuracy when stopped"),
        horizontal_spacing=0.1,
    )
    hops = groups_along(plot, record.hops, record.texts)
    where = "%{text}" if record.texts else "%{x} hops"
    for i, (rule, color) in enumerate(zip(record.rules, _COLORS, strict=True)):
        name = f"fixed, r = {record.cap}" if rule == "fixed" else label(rule)
        look = {
            "mode": "markers" if record.texts else "lines+markers",
            "name": name,
            "legendgroup": rule,
            "text": list(map(label, record.texts)) or None,
            "line": {"color": color, "width": 2},
            "marker": {"size": 6},
        }
        plot.add_scatter(
            x=hops, y=record.iterations[i].tolist(), row=1, col=1, **look,
            hovertemplate=f"{name}<br>{where}<br>%{{y:.1f}} iterations<extra></extra>",
        )  # fmt: skip
        plot.add_scatter(
            x=hops, y=record.accuracy[i].tolist(), row=1, col=2, showlegend=False, **look,
            hovertemplate=f"{name}<br>{where}<br>accuracy %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    plot.add_scatter(
        x=hops,
        y=record.best.tolist(),
        row=1,
        col=2,
        mode="lines",
        name="best fixed r",
        text=list(map(label, record.texts)) or None,
        line={"color": INK, "dash": "dot", "width": 1.5},
        hovertemplate=f"best r<br>{where}<br>accuracy %{{y:.2f}}<extra></extra>",
    )
    plot.update_yaxes(rangemode="tozero", showgrid=True)
    below = -0.45 if record.texts else -0.22
    plot.update_layout(legend={"orientation": "h", "y": below, "x": 0.5, "xanchor": "center"})
    return styled(plot, 420).update_layout(margin_b=150 if record.texts else 90)


def _found(record: HaltingCurves) -> str:
    both, kl_only = record.accuracy.mean(1)[:2].tolist()
    used = record.iterations.mean(1).tolist()
    return (
        f"The rule with both conditions uses {used[0]:.1f} iterations on average for an accuracy of"
        f" {both:.2f}; KL alone stops after {used[1]:.1f} with {kl_only:.2f}."
    )


SECTION = Section(
    title="Adaptive halting",
    look_for=(
        "A halting rule watches the model's own answers. It stops when two successive answers"
        " agree (small KL) and the answer is sure (small entropy). A good rule uses more"
        " iterations for deeper questions, and its accuracy is close to that of the best fixed"
        " number of iterations r (dotted). KL alone tends to stop too early, before anything has"
        " happened."
    ),
    measure=lambda opened: measure(opened.runs, HaltingConfig.kl, HaltingConfig.entropy),
    found=_found,
)

EXAMPLE = 'plots.halting("mini/multi_hop/r4", n_loops=8, per_hop=5)'
