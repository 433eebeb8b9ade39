"""Which hop does a model learn first, and where? The bridge and the target by depth, stage by stage
of training (figure 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import TwoHopConfig
from loopscope.analyses.common.look import (
    GROUP_COLORS,
    GROUP_NAMES,
    model_label,
    note,
    shade_loops,
)
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.common.two_hop import GROUPS, READ_AT, TARGETS, ask, shape_of
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import INK, styled
from loopscope.interp.lens.decoding import decodability


@dataclass(frozen=True, kw_only=True)
class StagesConfig(TwoHopConfig):
    """After which block the logit lens reads the bridge entity and the answer of two-hop
    questions, at each stage of training (figure 4).
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/systematicity/r4_l2/train",
        "mini/systematicity/r4_l2/id",
        "mini/systematicity/r4_l2/ood",
        "mini/systematicity/r1_l8/train",
        "mini/systematicity/r1_l8/id",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


_SYMBOLS = dict(zip(GROUPS, ("square", "circle", "diamond"), strict=True))
_SIZES = dict(
    zip(GROUPS, (8, 6, 7), strict=True)
)  # the curves of training and ID facts often lie on one another


@dataclass(frozen=True)
class StageDepths(Record):
    """Decodability in several checkpoints.

    Attributes:
        checkpoints: Their names.
        stages: The stage of training of each; its name where no card says.
        shapes: Iterations and layers of each.
        groups: The groups of questions.
        questions: How many of each group, for each checkpoint.
        accuracy: For each checkpoint a Float[Tensor, "group depth target"]: how often the logit
            lens reads the bridge at the first relation, and the target at the second, after each
            layer of each iteration.
    """

    checkpoints: tuple[str, ...]
    stages: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    groups: tuple[str, ...]
    questions: tuple[tuple[int, ...], ...]
    accuracy: tuple[Float[Tensor, "group _depth target"], ...]

    def first(self, checkpoint: int, group: int, target: int, least: float = 0.5) -> int | None:
        """The smallest depth (blocks run) at which a target is read for at least this share of
        questions; None where it never is.
        """
        reached = (self.accuracy[checkpoint][group, :, target] >= least).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def frame(self) -> pd.DataFrame:
        """checkpoint, stage, group, visit, loop, layer, depth (blocks run), target, accuracy."""
        rows = [
            (
                name,
                self.stages[i],
                group,
                f"loops.{depth // layers}.blocks.{depth % layers}",
                depth // layers,
                depth % layers,
                depth + 1,
                target,
                float(found[j, depth, k]),
            )
            for i, (name, (loops, layers), found) in enumerate(
                zip(self.checkpoints, self.shapes, self.accuracy, strict=True)
            )
            for j, group in enumerate(self.groups)
            for depth in range(loops * layers)
            for k, target in enumerate(TARGETS)
        ]
        return pd.DataFrame(
            rows,
            columns=[
                "checkpoint",
                "stage",
                "group",
                "visit",
                "loop",
                "layer",
                "depth",
                "target",
                "accuracy",
            ],
        )

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint and group: questions, best accuracy of bridge and target, and the
        first depth with at least 0.5.
        """
        rows = []
        for i, name in enumerate(self.checkpoints):
            for j, group in enumerate(self.groups):
                best = self.accuracy[i][j].max(0).values.tolist()
                depths = [self.first(i, j, k) or "never" for k in range(len(TARGETS))]
                rows.append(
                    (name, group, self.questions[i][j], best[0], depths[0], best[1], depths[1])
                )
        columns = [
            "checkpoint",
            "group",
            "questions",
            "best bridge",
            "bridge from depth",
            "best target",
            "target from depth",
        ]
        return pd.DataFrame(rows, columns=columns)


def run(config: StagesConfig) -> StageDepths:
    """Read every checkpoint's states by the logit lens.

    Raises:
        ValueError: No checkpoint is named, or one has no graph, no two-hop questions of a group, or
            blocks outside the loop.
    """
    stages, shapes, questions, accuracy = [], [], [], []
    for source in tqdm(config.sources(), desc="checkpoints", leave=False):
        subject = open_subject(source)
        asked = [ask(subject, group, config.per_group) for group in GROUPS]
        found = [
            decodability(subject.model, each.batch, each.targets, list(READ_AT), config.n_loops)
            for each in asked
        ]
        stages.append(str(subject.card.get("stage", subject.name)))
        shapes.append(shape_of(subject, config.n_loops))
        questions.append(tuple(len(each.batch) for each in asked))
        accuracy.append(torch.stack([each.accuracy for each in found]).cpu())
    return StageDepths(
        config.checkpoints, tuple(stages), tuple(shapes), GROUPS, tuple(questions), tuple(accuracy)
    )


def figure(record: StageDepths) -> go.Figure:
    """One column per checkpoint: the bridge above, the target below, one curve per group of facts;
    shades are loops.
    """
    names = [
        f"{model_label((loops, loops), layers)}<br>stage {label(stage)}"
        for stage, (loops, layers) in zip(record.stages, record.shapes, strict=True)
    ]
    plot = make_subplots(
        rows=2,
        cols=len(names),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        vertical_spacing=0.06,
        subplot_titles=names,
    )
    for col in range(1, len(names) + 1):
        for row in (1, 2):
            _add_curves(plot, record, row, col)
            shade_loops(plot, record.shapes[col - 1], "x", row=row, col=col)
        _label_loops(plot, record.shapes[col - 1], col)
    plot.update_xaxes(dtick=1, tickangle=0)
    plot.update_yaxes(range=[-0.04, 1.12], tickvals=[0, 0.5, 1], showgrid=True)
    for row, title in ((1, "bridge read at r1"), (2, "target read at r2")):
        plot.update_yaxes(title=f"{title}<br>(share of questions)", row=row, col=1)
    below = {"y": 0, "yref": "paper", "yshift": -28, "yanchor": "top"}
    note(plot, "effective depth (layers applied)", font={"size": 16}, x=0.5, xref="paper", **below)
    plot.update_layout(
        legend={"orientation": "h", "y": -0.17, "x": 0.5, "xanchor": "center", "yanchor": "top"}
    )
    styled(plot, 520).update_annotations(selector={"yanchor": "bottom"}, font_size=13)
    return plot.update_layout(margin={"b": 105, "t": 60})


def _add_curves(plot: go.Figure, record: StageDepths, row: int, col: int) -> None:
    loops, layers = record.shapes[col - 1]
    places = [f"loops.{loop}.blocks.{layer}" for loop in range(loops) for layer in range(layers)]
    for j, group in enumerate(record.groups):
        name = f"{GROUP_NAMES[group]} ({record.questions[col - 1][j]})"
        plot.add_scatter(
            x=list(range(1, loops * layers + 1)),
            y=record.accuracy[col - 1][j, :, row - 1].tolist(),
            mode="lines+markers",
            name=GROUP_NAMES[group],
            legendgroup=group,
            showlegend=(row, col) == (1, 1),
            cliponaxis=False,
            line={"color": GROUP_COLORS[group], "width": 2},
            marker={"symbol": _SYMBOLS[group], "size": _SIZES[group]},
            customdata=places,
            hovertemplate=(
                f"{TARGETS[row - 1]}, {name}<br>%{{customdata}}.hook_resid_post, depth"
                " %{x}<br>read for %{y:.2f}<extra></extra>"
            ),
            row=row,
            col=col,
        )


def _label_loops(plot: go.Figure, shape: tuple[int, int], col: int) -> None:
    """The number of each loop, from 0, in the upper panel."""
    loops, layers = shape
    for loop in range(loops):
        text = str(loop) if loop else "loop 0"
        plot.add_annotation(
            x=loop * layers + (layers + 1) / 2,
            y=1.12,
            yanchor="top",
            text=text,
            showarrow=False,
            font={"size": 10, "color": INK},
            row=1,
            col=col,
        )


EXAMPLE = 'plots.stages("mini/systematicity/r4_l2/ood", per_group=5)'
