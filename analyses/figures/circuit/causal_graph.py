"""Along which states does a two-hop answer travel? Decodability and patching strength as a graph
(figure 11).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import tyro
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import TwoHopConfig
from loopscope.analyses.common.look import GROUP_NAMES, model_label, note, shade_loops
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.common.two_hop import (
    GROUPS,
    READ_AT,
    TARGETS,
    ask,
    shape_of,
    with_other_start,
)
from loopscope.interp.drawing.labels import AXIS, EMBED, loop_and_layer, spoken, tick
from loopscope.interp.drawing.look import (
    ACCURACY_SCALE,
    CELL_TEXT,
    FAINT,
    INK,
    WARM_SCALE,
    Scale,
    styled,
)
from loopscope.interp.lens.decoding import decodability
from loopscope.interp.patching.tracing import denoising_map


@dataclass(frozen=True, kw_only=True)
class CausalGraphConfig(TwoHopConfig):
    """After which block the logit lens reads the entities of two-hop questions, and which
    single states bring back the answer (figure 11).
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/systematicity/r4_l2/ood",
        "mini/systematicity/r1_l8/id",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""


COLUMNS = ("h", "r1", "r2")
_CLEAR, _ANSWERS = 0.5, 0.1


@dataclass(frozen=True)
class TwoHopPanel:
    """One checkpoint on one group of facts.

    Attributes:
        checkpoint: Its name.
        shape: Its iterations and layers.
        group: The facts.
        questions: How many.
        decoded: Float[Tensor, "depth target"], how often the logit lens reads the bridge at r1 and
            the target at r2; row d-1 is after d blocks.
        answered: Float[Tensor, "depth position"], share of corrupted questions whose top token is
            the clean answer once the clean state is restored at one depth and position; depth 0 is
            the embedding.
        margin: Float[Tensor, "depth position"], the same in the answer's mean margin: 0 as the
            corrupted run, 1 as the clean one.
        clean_answered, corrupted_answered: The share with no state restored.
        clean_margin, corrupted_margin: The mean margins of those runs, in logits.
    """

    checkpoint: str
    shape: tuple[int, int]
    group: str
    questions: int
    decoded: Float[Tensor, "depth target"]
    answered: Float[Tensor, "depth_from_0 position"]
    margin: Float[Tensor, "depth_from_0 position"]
    clean_answered: float
    corrupted_answered: float
    clean_margin: float
    corrupted_margin: float

    def first_decoded(self, target: int) -> int | None:
        """The smallest depth at which the lens reads a target for at least half of the questions;
        None where it never does.
        """
        reached = (self.decoded[:, target] >= _CLEAR).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def sites(self, position: int) -> list[int]:
        """Depths at which restoring a position's state brings back at least half of the answers;
        none where there are hardly any.
        """
        lost = self.clean_answered - self.corrupted_answered
        if lost < _ANSWERS:
            return []
        gain = (self.answered[:, position] - self.corrupted_answered) / lost
        return [depth for depth, share in enumerate(gain.tolist()) if share >= _CLEAR]


@dataclass(frozen=True)
class CausalGraph(Record):
    """All panels.

    Attributes:
        panels: Checkpoint by checkpoint, and for each the held-out ID facts and then the OOD facts.
    """

    panels: tuple[TwoHopPanel, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, group, hook (the state), loop, layer, depth (blocks run), position, decoded
        (its entity), answered, margin.
        """
        columns = [
            "checkpoint",
            "group",
            "hook",
            "loop",
            "layer",
            "depth",
            "position",
            "decoded",
            "answered",
            "margin",
        ]
        rows = [_row(panel, *node) for panel in self.panels for node in _nodes(panel)]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype({"loop": "Int64", "layer": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per panel: questions, share answered, first depth of bridge and target, depths at
        which restoring r1 brings back half.
        """
        rows = []
        for panel in self.panels:
            firsts = [panel.first_decoded(target) or "never" for target in range(len(TARGETS))]
            sites = ", ".join(map(str, panel.sites(1))) or "none"
            rows.append(
                (
                    panel.checkpoint,
                    panel.group,
                    panel.questions,
                    panel.clean_answered,
                    *firsts,
                    sites,
                )
            )
        columns = [
            "checkpoint",
            "group",
            "questions",
            "answered",
            "bridge from depth",
            "target from depth",
            "causal depths of r1",
        ]
        return pd.DataFrame(rows, columns=columns)


def run(config: CausalGraphConfig) -> CausalGraph:
    """Read and patch every checkpoint on held-out ID and OOD facts.

    Raises:
        ValueError: No checkpoint is named, or one has no graph, no two-hop questions of a group, or
            blocks outside the loop.
    """
    panels = []
    for source in tqdm(config.sources(), desc="checkpoints", leave=False):
        subject = open_subject(source)
        panels += [
            measure(subject, group, config.per_group, config.n_loops) for group in GROUPS[1:]
        ]
    return CausalGraph(tuple(panels))


def measure(
    subject: Subject, group: str, per_group: int | None = None, n_loops: int | None = None
) -> TwoHopPanel:
    """One group of facts of an open checkpoint.

    Raises:
        ValueError: As `run`.
    """
    shape, asked = shape_of(subject, n_loops), ask(subject, group, per_group)
    answers = asked.targets[:, 1]
    corrupted = subject.model.encode(with_other_start(subject, asked.questions))
    decoded = decodability(
        subject.model, asked.batch, asked.targets, list(READ_AT), n_loops
    ).accuracy
    trace = denoising_map(subject.model, asked.batch, corrupted, answers, n_loops=n_loops)
    sweep = trace.sweep
    return TwoHopPanel(
        checkpoint=subject.name,
        shape=shape,
        group=group,
        questions=len(answers),
        decoded=decoded.cpu(),
        answered=(sweep.values > 0)
        .double()
        .mean(1)
        .view(trace.effect.shape)
        .cpu(),  # a positive margin: the answer is on top
        margin=trace.effect.double().cpu(),
        clean_answered=float((sweep.clean > 0).double().mean()),
        corrupted_answered=float((sweep.corrupted > 0).double().mean()),
        clean_margin=float(sweep.clean.mean()),
        corrupted_margin=float(sweep.corrupted.mean()),
    )


def _nodes(panel: TwoHopPanel) -> Iterator[tuple[int, int]]:
    """Depth and position of every state."""
    return (
        (depth, position)
        for depth in range(len(panel.answered))
        for position in range(len(COLUMNS))
    )


def _row(panel: TwoHopPanel, depth: int, position: int) -> tuple[object, ...]:
    """The row of a state in the frame."""
    hook = _hook(panel, depth)
    effects = (float(panel.answered[depth, position]), float(panel.margin[depth, position]))
    place = (panel.checkpoint, panel.group, hook, *loop_and_layer(hook), depth, COLUMNS[position])
    return (*place, _decoded(panel, depth, position), *effects)


def _hook(panel: TwoHopPanel, depth: int) -> str:
    """The hook point of the state that so many blocks have made."""
    if depth == 0:
        return EMBED
    loop, layer = divmod(depth - 1, panel.shape[1])
    return f"loops.{loop}.blocks.{layer}.hook_resid_post"


def _decoded(panel: TwoHopPanel, depth: int, position: int) -> float:
    """How often the entity that belongs to a position is read there; NaN where none belongs or
    nothing is read.
    """
    return (
        float(panel.decoded[depth - 1, READ_AT.index(position)])
        if depth and position in READ_AT
        else float("nan")
    )


def figure(record: CausalGraph) -> go.Figure:
    """Rows are groups of facts; each checkpoint has a graph of what is decodable and one of what a
    restored state brings back.
    """
    names = list(dict.fromkeys(panel.checkpoint for panel in record.panels))
    groups = list(dict.fromkeys(panel.group for panel in record.panels))
    deepest = max(len(panel.answered) for panel in record.panels)
    plot = make_subplots(rows=len(groups), cols=2 * len(names), vertical_spacing=0.16)
    for panel in record.panels:
        row, col = groups.index(panel.group) + 1, 2 * names.index(panel.checkpoint) + 1
        _add_hops(plot, panel, row, col)
        _add_states(plot, panel, row, col)
        _frame(plot, panel, row, col)
    for col, domain in enumerate(_domains(len(names)), start=1):
        plot.update_xaxes(domain=domain, col=col)
    for row, group in enumerate(groups, start=1):
        plot.update_yaxes(title=f"{GROUP_NAMES[group]}, {AXIS}", row=row, col=1)
    return styled(plot, 110 + len(groups) * (90 + 29 * deepest)).update_layout(
        margin={"t": 75, "b": 40, "r": 15}, showlegend=False
    )


def _domains(models: int) -> list[list[float]]:
    """Where each column lies across the figure: the two graphs of a model close together, models
    apart.
    """
    apart, within = 0.09, 0.02
    graph = (1 - apart * (models - 1) - within * models) / (2 * models)
    starts = [
        k * (2 * graph + within + apart) + side * (graph + within)
        for k in range(models)
        for side in (0, 1)
    ]
    return [[start, start + graph] for start in starts]


def _add_hops(plot: go.Figure, panel: TwoHopPanel, row: int, col: int) -> None:
    """The residual streams, and a line for each hop into the first depth at which its entity is
    decodable.
    """
    top = len(panel.answered) - 1
    for position in range(len(COLUMNS)):
        for graph in (col, col + 1):
            plot.add_scatter(
                x=[position, position],
                y=[0, top],
                mode="lines",
                line={"color": FAINT, "width": 1.5},
                hoverinfo="skip",
                row=row,
                col=graph,
            )
    for target, depth in enumerate(map(panel.first_decoded, range(len(TARGETS)))):
        if depth is not None:
            plot.add_scatter(
                x=[target, target + 1],
                y=[depth - 1, depth],
                mode="lines",
                line={"color": INK, "width": 3},
                hoverinfo="skip",
                row=row,
                col=col,
            )


def _add_states(plot: go.Figure, panel: TwoHopPanel, row: int, col: int) -> None:
    """A node for each state, its number inside; empty where no entity belongs."""
    nodes = list(_nodes(panel))
    read = [_decoded(panel, *node) for node in nodes]
    restored = [float(panel.answered[node]) for node in nodes]
    for graph, values, scale in ((col, read, ACCURACY_SCALE), (col + 1, restored, WARM_SCALE)):
        plot.add_scatter(
            x=[position for _, position in nodes],
            y=[depth for depth, _ in nodes],
            mode="markers+text",
            cliponaxis=False,
            **_circles(values, scale),
            customdata=[_hover(panel, *node) for node in nodes],
            hovertemplate="%{customdata}<extra></extra>",
            row=row,
            col=graph,
        )


def _circles(values: list[float], scale: Scale) -> dict[str, Any]:
    """Markers and texts of nodes; a NaN is a small pale circle without a number."""
    known = [not math.isnan(value) for value in values]
    both = list(zip(values, known, strict=True))
    return {
        "marker": {
            "size": [23 if there else 9 for there in known],
            "line": {"color": FAINT, "width": 1},
            "opacity": 1,
            "color": [value if there else 0.0 for value, there in both],
            "colorscale": scale,
            "cmin": 0,
            "cmax": 1,
        },
        "text": [f"{value:.2f}".removeprefix("0") if there else "" for value, there in both],
        "textfont": {**CELL_TEXT, "size": 9},
    }


def _hover(panel: TwoHopPanel, depth: int, position: int) -> str:
    name = _hook(panel, depth)
    where = f"{name}<br>{spoken(name)}, depth {depth}"
    read = _decoded(panel, depth, position)
    entity = f"<br>{TARGETS[READ_AT.index(position)]} on top for {read:.2f}" if read == read else ""
    effect = (
        f"answered {panel.answered[depth, position]:.2f}, margin"
        f" {panel.margin[depth, position]:.2f} of the way back"
    )
    return f"{where}, position {COLUMNS[position]}{entity}<br>restored: {effect}"


def _frame(plot: go.Figure, panel: TwoHopPanel, row: int, col: int) -> None:
    """Shades for every second loop, axes, and titles."""
    loops, layers = panel.shape
    top = loops * layers + 0.6
    labels = [tick(_hook(panel, depth)) for depth in range(loops * layers + 1)]
    for graph, title in ((col, "decodable"), (col + 1, "answered once restored")):
        at = {"row": row, "col": graph}
        shade_loops(plot, panel.shape, "y", **at)
        note(plot, title, font={"size": 12}, x=1, y=top, yanchor="bottom", **at)
        plot.update_xaxes(tickvals=[0, 1, 2], ticktext=list(COLUMNS), range=[-0.5, 2.5], **at)
        plot.update_yaxes(
            tickvals=list(range(len(labels))), ticktext=labels, range=[-0.6, len(labels) - 0.4],
            showticklabels=graph == col, **at,
        )  # fmt: skip
    model = (
        f"<b>{model_label((loops, loops), layers)}</b> answers {panel.clean_answered:.2f} of"
        f" {panel.questions}"
    )
    place = {"x": -0.5, "xanchor": "left", "y": top, "yanchor": "bottom", "yshift": 20}
    note(plot, model, font={"size": 13}, **place, row=row, col=col)


EXAMPLE = 'plots.causal_graph("mini/systematicity/r4_l2/ood", per_group=5)'
