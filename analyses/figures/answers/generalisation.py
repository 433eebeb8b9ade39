"""How far beyond its training does a model reason, and when does that begin? Deepest hops answered
over learned (figure 19).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.by_hop import run_by_hop
from loopscope.analyses.common.configs import ComparisonConfig
from loopscope.analyses.common.look import model_label, note, run_colors
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import open_subject
from loopscope.checkpoints.load import read_card
from loopscope.checkpoints.locate import shipped_names
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import FAINT, INK, SOFT, deeper, styled


@dataclass(frozen=True, kw_only=True)
class GeneralisationConfig(ComparisonConfig):
    """Ratio of the deepest hop count that is answered to the deepest one that was trained,
    along training (figure 19); by default for all shipped multi-hop models.
    """

    n_loops: int = 24
    """Iterations to run; a hop count is answered if it is at any of them."""
    threshold: float = 0.6
    """Accuracy from which a hop count counts as answered."""


_KIND = "mini/multi_hop/"


@dataclass(frozen=True)
class Generalisation(Record):
    """Checkpoints along training.

    Attributes:
        checkpoints: Their names, by run and then by updates.
        runs: The run that each belongs to.
        labels: Iterations of a training batch and layers of each.
        updates: Int[Tensor, " checkpoint"], of training.
        learned: Int[Tensor, " checkpoint"], deepest hop count in training.
        answered: Int[Tensor, " checkpoint"], deepest hop count with at least the threshold's
            accuracy at any number of iterations; 0 where none has.
        asked: Int[Tensor, " checkpoint"], deepest hop count of the questions.
        hops: Hop counts of any checkpoint's questions.
        best: Float[Tensor, "checkpoint hop"], accuracy at the best number of iterations; NaN where
            the questions lack the hop count.
        threshold: Accuracy from which a hop count counts as answered.
        n_loops: Iterations of the runs.
    """

    checkpoints: tuple[str, ...]
    runs: tuple[str, ...]
    labels: tuple[str, ...]
    updates: Int[Tensor, " checkpoint"]
    learned: Int[Tensor, " checkpoint"]
    answered: Int[Tensor, " checkpoint"]
    asked: Int[Tensor, " checkpoint"]
    hops: tuple[int, ...]
    best: Float[Tensor, "checkpoint hop"]
    threshold: float
    n_loops: int

    def ratio(self) -> Float[Tensor, " checkpoint"]:
        """The deepest hop count answered over the deepest learned."""
        return self.answered / self.learned

    def at_least(self) -> Bool[Tensor, " checkpoint"]:
        """Where the deepest questions of all are answered, so that the ratio is a lower bound."""
        return self.answered == self.asked

    def pair(self, checkpoint: int) -> str:
        """The deepest hop counts learned and answered, e.g. "6 → 9", or "10 → ≥ 16" for a lower
        bound.
        """
        bound = "≥ " if bool(self.at_least()[checkpoint]) else ""
        return f"{int(self.learned[checkpoint])} → {bound}{int(self.answered[checkpoint])}"

    def frame(self) -> pd.DataFrame:
        """checkpoint, run, updates, learned, hops, accuracy (at the best number of iterations)."""
        rows = [
            (
                name,
                self.runs[i],
                int(self.updates[i]),
                int(self.learned[i]),
                hop,
                float(self.best[i, j]),
            )
            for i, name in enumerate(self.checkpoints)
            for j, hop in enumerate(self.hops)
            if self.best[i, j].isfinite()
        ]
        return pd.DataFrame(
            rows, columns=["checkpoint", "run", "updates", "learned", "hops", "accuracy"]
        )

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint: updates, deepest learned and answered, their ratio, and whether
        it is a lower bound.
        """
        return pd.DataFrame(
            {
                "checkpoint": self.checkpoints,
                "updates": self.updates,
                "deepest learned": self.learned,
                "deepest answered": self.answered,
                "ratio": self.ratio(),
                "lower bound": ["yes" if bound else "" for bound in self.at_least().tolist()],
            }
        )


class _Facts(NamedTuple):
    """The facts in a checkpoint's card, in the order by which checkpoints are sorted."""

    dynamic: bool
    loops: tuple[int, int]
    run: str
    updates: int
    learned: int
    layers: int


def run(config: GeneralisationConfig) -> Generalisation:
    """Ask every checkpoint its questions, once each.

    Raises:
        ValueError: A checkpoint whose card does not say its recipe, its updates and how many hops
            it was trained on; a threshold that is no accuracy.
    """
    if not 0 < config.threshold <= 1:
        raise ValueError(
            f"the threshold is an accuracy above 0 and at most 1, got {config.threshold}"
        )
    facts = _sorted_facts(config)
    names, known = tuple(facts), list(facts.values())
    best = [_best(config, name) for name in tqdm(names, desc="checkpoints", leave=False)]
    hops = tuple(sorted(set().union(*best)))
    return Generalisation(
        checkpoints=names,
        runs=tuple(each.run for each in known),
        labels=tuple(model_label(each.loops, each.layers) for each in known),
        updates=torch.tensor([each.updates for each in known]),
        learned=torch.tensor([each.learned for each in known]),
        answered=torch.tensor([_deepest(found, config.threshold) for found in best]),
        asked=torch.tensor(list(map(max, best))),
        hops=hops,
        best=torch.tensor([_row(found, hops) for found in best], dtype=torch.float64),
        threshold=config.threshold,
        n_loops=config.n_loops,
    )


def _sorted_facts(config: GeneralisationConfig) -> dict[str, _Facts]:
    """The facts of every checkpoint, by run and then by updates."""
    shipped = [name for name in shipped_names() if name.startswith(_KIND)]
    facts = {name: _facts(name) for name in config.checkpoints or shipped}
    return dict(sorted(facts.items(), key=lambda item: item[1]))


def _deepest(best: Mapping[int, float], threshold: float) -> int:
    """The deepest hop count with at least this accuracy; 0 where none has it."""
    return max((hop for hop, share in best.items() if share >= threshold), default=0)


def _row(best: Mapping[int, float], hops: Sequence[int]) -> list[float]:
    """The accuracy of each hop count; NaN where it was not asked."""
    return [best.get(hop, float("nan")) for hop in hops]


def _facts(name: str) -> _Facts:
    card = read_card(name)
    recipe = card.get("recipe")
    if not isinstance(recipe, dict) or not {"updates", "trained_hops"} <= card.keys():
        raise ValueError(
            f"the card of {name} must say its recipe, updates and trained_hops, which place it in"
            " training; it lacks some"
        )
    loops = (recipe["loops"]["low"], recipe["loops"]["high"])
    return _Facts(
        loops[0] < loops[1],
        loops,
        recipe["name"],
        card["updates"],
        card["trained_hops"],
        recipe["n_layers"],
    )


def _best(config: GeneralisationConfig, name: str) -> dict[int, float]:
    """Accuracy of each hop count at its best number of iterations."""
    runs = run_by_hop(open_subject(config.source(name)), config.n_loops)
    return {
        hop: float(done.lens.correct(done.answers).double().mean(1).max())
        for hop, done in runs.items()
    }


def figure(record: Generalisation) -> go.Figure:
    """The ratio along training, one curve per run; an arrow head where it is a lower bound; labels
    say hops learned and answered.
    """
    plot = go.Figure()
    runs = list(dict.fromkeys(record.runs))
    for run_name, color in zip(runs, run_colors([i + 2 for i in range(len(runs))]), strict=True):
        plot.add_trace(_curve(record, run_name, color))
    plot.add_hline(y=1, line={"color": FAINT, "width": 1, "dash": "dot"})
    lowest, highest = float(record.ratio().min()), float(record.ratio().max())
    plot.update_xaxes(title="updates of training", range=[0, 1.12 * int(record.updates.max())])
    plot.update_yaxes(
        title="deepest hop answered / deepest learned",
        range=[min(0.85, 0.9 * lowest), 1.15 * max(1.0, highest)],
        showgrid=True,
    )
    none = {"x": 1, "xref": "paper", "y": 1, "yshift": -9, "xanchor": "right"}
    font = {"size": 11, "color": SOFT}
    note(plot, "dotted: no generalisation beyond the hops learned", font=font, **none)
    corner = {"x": 0, "xref": "paper", "y": 1, "yref": "paper", "xanchor": "left", "xshift": 8}
    example = "6 → 9: trained on up to 6 hops,<br>answers up to 9"
    note(plot, example, font={"size": 12, "color": INK}, align="left", **corner)
    return styled(plot, 460).update_layout(margin_t=30)


def _curve(record: Generalisation, run_name: str, color: str) -> go.Scatter:
    """The checkpoints of one run."""
    mine = [i for i, name in enumerate(record.runs) if name == run_name]
    pairs, model = [record.pair(i) for i in mine], record.labels[mine[-1]]
    bounds = record.at_least()[mine].tolist()
    names = [label(record.checkpoints[i]) for i in mine]
    return go.Scatter(
        x=record.updates[mine].tolist(),
        y=record.ratio()[mine].tolist(),
        mode="lines+markers+text",
        name=model,
        showlegend=False,
        line={"color": color, "width": 2},
        marker={"size": 10, "symbol": ["triangle-up" if b else "circle" for b in bounds]},
        text=[*pairs[:-1], f"<b>{model}</b><br>{pairs[-1]}"],
        textposition=["bottom right"] * (len(pairs) - 1) + ["top center"],
        textfont={"color": deeper(color), "size": 12},
        customdata=list(zip(names, pairs, strict=True)),
        hovertemplate="%{customdata[0]}<br>%{x:,} updates<br>trained to → answered:"
        " %{customdata[1]} hops<extra></extra>",
    )


EXAMPLE = 'plots.generalisation("mini/multi_hop/r4", n_loops=8, per_hop=5)'
