"""Would the second hop be found if the bridge's state were the bridge's embedding? A realignment
that is chosen on one half of the questions and reported on the other (after arXiv 2607.00341).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import TwoHopConfig
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.common.two_hop import READ_AT, TwoHopQuestions, ask, shape_of
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import CATEGORIES, MARK, styled
from loopscope.interp.edit.realignment import Realigned, realign
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.core.base import LoopedModel


@dataclass(frozen=True, kw_only=True)
class RealignmentConfig(TwoHopConfig):
    """Accuracy on two-hop questions if the state at the bridge entity's position is replaced by
    the embedding of the token that the logit lens reads there (realignment, after arXiv
    2607.00341). Iteration and variant are chosen on one half of the questions and reported on
    the other, beside three controls. Look for a realigned bar far above the base on
    out-of-distribution questions. The controls should show a rescaled bar like the base, and
    bars near zero for a random entity and for the second-best token.
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = tuple(
        f"mini/systematicity/{stage}"
        for stage in ("r4_l2/train", "r4_l2/id", "r4_l2/ood", "r2_l2/ood", "r8_l2/ood")
    )
    """Names from `loopscope list`, checkpoint files, or folders."""
    resamples: int = 2000
    """Bootstrap draws of the questions for each interval."""
    seed: int = 0
    """Seed of the halves, the random entities and the bootstrap."""


GROUPS = {"test_inferred_ood": "OOD", "test_inferred_iid": "ID"}
VARIANTS: tuple[Realigned, ...] = ("replace", "blend")
BARS = ("base", "realigned", "rescaled", "random entity", "second-best token")


@dataclass(frozen=True)
class Outcome:
    """One group of questions of one checkpoint.

    Attributes:
        explored: Float[Tensor, "loop variant"], accuracy on all questions after each iteration but
            the last, for each of `VARIANTS`.
        chosen: The iteration and the variant that were best on each half.
        right: For each of `BARS`, Bool[Tensor, " question"], whether the answer is right; each
            question by what was chosen on the other half.
    """

    explored: Float[Tensor, "loop variant"]
    chosen: tuple[tuple[int, Realigned], ...]
    right: Mapping[str, Bool[Tensor, " question"]]

    def interval(self, bar: str, resamples: int, seed: int) -> tuple[float, float]:
        """The 95 % bootstrap interval of the accuracy, over questions."""
        right = self.right[bar].double()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(right), (resamples, len(right)), generator=generator)
        edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = right[drawn].mean(1).quantile(edges).tolist()
        return low, high


@dataclass(frozen=True)
class Realignment(Record):
    """The outcomes of several checkpoints.

    Attributes:
        checkpoints: Their names.
        stages: The stage of training of each; its name where no card says.
        outcomes: For each checkpoint, by group of questions.
        resamples, seed: Of the bootstrap.
    """

    checkpoints: tuple[str, ...]
    stages: tuple[str, ...]
    outcomes: tuple[Mapping[str, Outcome], ...]
    resamples: int
    seed: int

    def frame(self) -> pd.DataFrame:
        """checkpoint, group, questions, bar, accuracy, low and high (the 95 % interval), chosen."""
        rows = [
            (
                name,
                group,
                len(one.right[bar]),
                bar,
                float(one.right[bar].double().mean()),
                *one.interval(bar, self.resamples, self.seed),
                ", ".join(f"{how} after loop {loop}" for loop, how in one.chosen),
            )
            for name, found in zip(self.checkpoints, self.outcomes, strict=True)
            for group, one in found.items()
            for bar in BARS
        ]
        columns = ["checkpoint", "group", "questions", "bar", "accuracy", "low", "high", "chosen"]
        return pd.DataFrame(rows, columns=columns)

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint and group: questions, what was chosen on each half, and the
        accuracy of each bar.
        """
        frame = self.frame()
        keys = ["checkpoint", "group", "questions", "chosen"]
        wide = frame.pivot(index=keys, columns="bar", values="accuracy")[list(BARS)]
        first = frame[keys].drop_duplicates()
        return wide.loc[list(first.itertuples(index=False, name=None))].reset_index()


def run(config: RealignmentConfig) -> Realignment:
    """Realign every checkpoint's states at the first relation.

    Raises:
        ValueError: No checkpoint is named, or one has no graph, no two-hop questions of a group or
            only one, blocks outside the loop, or a single iteration.
    """
    stages, outcomes = [], []
    for source in tqdm(config.sources(), desc="checkpoints", leave=False):
        subject = open_subject(source)
        n_loops, _ = shape_of(subject, config.n_loops)
        if n_loops < 2:
            raise ValueError(
                f"{subject.name} runs one iteration, so none follows a realigned state; name a"
                " checkpoint with more"
            )
        asked = {GROUPS[group]: ask(subject, group, config.per_group) for group in GROUPS}
        stages.append(str(subject.card.get("stage", subject.name)))
        outcomes.append(
            {name: measure(subject, each, n_loops, config.seed) for name, each in asked.items()}
        )
    return Realignment(
        config.checkpoints, tuple(stages), tuple(outcomes), config.resamples, config.seed
    )


def measure(subject: Subject, asked: TwoHopQuestions, n_loops: int, seed: int) -> Outcome:
    """Choose on each half of the questions, and report on the other.

    Raises:
        ValueError: Fewer than two questions.
    """
    model, count = subject.model, len(asked.questions)
    if count < 2:
        raise ValueError(
            "a realignment is chosen on one half of a group's questions and reported on the"
            f" other, which takes at least 2, got {count}; pass a larger per_group"
        )
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(count, dtype=torch.bool)
    first[torch.randperm(count, generator=generator)[: count // 2]] = True
    tries = {
        (loop, how): _right(model, asked, n_loops, at=loop, how=how)
        for loop, how in product(range(n_loops - 1), VARIANTS)
    }
    chosen = [max(tries, key=lambda key: int(tries[key][half].sum())) for half in (first, ~first)]
    controls: dict[str, dict[str, Any]] = {
        "rescaled": {"how": "rescale"},
        "random entity": {"tokens": _other_entities(subject, asked, generator)},
        "second-best token": {"rank": 1},
    }
    right = {"base": _right(model, asked, n_loops)}
    right["realigned"] = torch.where(first, tries[chosen[1]], tries[chosen[0]])
    for bar, control in controls.items():
        by_half = [
            _right(model, asked, n_loops, **{"at": loop, "how": how, **control})
            for loop, how in chosen
        ]
        right[bar] = torch.where(first, by_half[1], by_half[0])
    explored = torch.stack([x.double().mean() for x in tries.values()])
    return Outcome(explored.view(-1, len(VARIANTS)), tuple(chosen), right)


def _right(
    model: LoopedModel, asked: TwoHopQuestions, n_loops: int, **how: Any
) -> Bool[Tensor, " question"]:
    """Which answers are right when the state at the first relation is realigned; without arguments,
    when it is not.
    """
    moved = realign(model, positions=[READ_AT[0]], n_loops=n_loops, **how) if how else nullcontext()
    with moved:
        return readout_lens(model, asked.batch, n_loops).correct(asked.targets[:, 1])[-1].cpu()


def _other_entities(subject: Subject, asked: TwoHopQuestions, generator: torch.Generator) -> Tensor:
    """For each question a random entity that is not its bridge."""
    assert subject.graph is not None, "asked questions have a graph"
    first, count = subject.model.to_single_token("<e_0>"), subject.graph.n_entities
    bridges = asked.targets[:, 0].cpu() - first
    steps = torch.randint(1, count, bridges.shape, generator=generator)
    return (bridges + steps) % count + first


_COLORS = dict(zip(BARS, (CATEGORIES[0], MARK, *CATEGORIES[2:5]), strict=True))


def figure(record: Realignment) -> go.Figure:
    """Above: the accuracy of the base, the realigned run and the controls, with 95 % intervals.
    Below: every iteration and variant on all questions, from which one was chosen.
    """
    count = len(record.checkpoints)
    plot = make_subplots(
        rows=2,
        cols=count,
        shared_yaxes="rows",
        vertical_spacing=0.16,
        horizontal_spacing=0.04,
        subplot_titles=[
            f"{len(found['OOD'].explored) + 1} iterations, stage {label(stage)}"
            for stage, found in zip(record.stages, record.outcomes, strict=True)
        ],
    )
    frame = record.frame()
    for col, (name, found) in enumerate(
        zip(record.checkpoints, record.outcomes, strict=True), start=1
    ):
        _draw_bars(plot, frame[frame["checkpoint"] == name], col)
        _draw_tries(plot, found, col)
    plot.update_yaxes(range=[0, 1.08], showgrid=True)
    plot.update_yaxes(title="two-hop accuracy", row=1, col=1)
    plot.update_yaxes(title="accuracy, all questions", row=2, col=1)
    plot.update_xaxes(title="questions", row=1)
    plot.update_xaxes(title="realigned after loop", dtick=1, row=2)
    plot.update_layout(
        barmode="group",
        legend={"orientation": "h", "y": -0.14, "x": 0.5, "xanchor": "center", "yanchor": "top"},
    )
    styled(plot, 620).update_annotations(font_size=13)
    return plot.update_layout(margin={"b": 120, "t": 50})


def _draw_bars(plot: go.Figure, frame: pd.DataFrame, col: int) -> None:
    for bar in BARS:
        part = frame[frame["bar"] == bar]
        plot.add_bar(
            x=part["group"].tolist(),
            y=part["accuracy"].tolist(),
            error_y={
                "array": (part["high"] - part["accuracy"]).tolist(),
                "arrayminus": (part["accuracy"] - part["low"]).tolist(),
                "thickness": 1,
                "width": 3,
            },
            name=bar,
            legendgroup=bar,
            showlegend=col == 1,
            marker_color=_COLORS[bar],
            customdata=part["chosen"].tolist(),
            hovertemplate=f"{bar}<br>%{{x}}: %{{y:.3f}}<br>chosen: %{{customdata}}<extra></extra>",
            row=1,
            col=col,
        )


def _draw_tries(plot: go.Figure, found: Mapping[str, Outcome], col: int) -> None:
    for (i, how), (group, one) in product(enumerate(VARIANTS), found.items()):
        plot.add_scatter(
            x=list(range(len(one.explored))),
            y=one.explored[:, i].tolist(),
            mode="lines+markers",
            name=f"{group}, {how}",
            legendgroup=f"{group}, {how}",
            showlegend=col == 1,
            line={
                "color": CATEGORIES[5] if group == "OOD" else CATEGORIES[6],
                "dash": "solid" if how == "replace" else "dot",
            },
            row=2,
            col=col,
        )


EXAMPLE = 'plots.realignment("mini/systematicity/r4_l2/ood", per_group=9)'
