"""The work of each block over iterations: how far it turns the stream, and the size and steps of
its output (after arXiv 2604.11791).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section, of_a_text
from loopscope.interp.common.columns import Shown
from loopscope.interp.drawing.labels import loop_and_layer
from loopscope.interp.drawing.look import CATEGORIES, FAINT, ORDER, color_bar, shades, styled
from loopscope.interp.dynamics.layers import LayerDynamics, layer_dynamics
from loopscope.interp.dynamics.states import Dynamics


@dataclass(frozen=True, kw_only=True)
class LayersConfig(InputsConfig):
    """The work of each block over loops: the angle by which it turns the state, and the norm
    and the steps of its output (after arXiv 2604.11791).
    """

    n_loops: int = 16
    """Iterations to run."""
    positions: Literal["readout", "real"] = "real"
    """readout: where the answer is read; real: mean over all tokens."""


_ANGLE = "angular_distance"
_OVER_ITERATIONS: dict[str, Callable[[Dynamics], Tensor]] = {
    "output_norm": lambda path: path.state_norm(),
    "relative_step": lambda path: path.step_norm(relative=True),
    "update_cosine": lambda path: path.update_cosine(),
}
_NAMED = 16  # with more blocks only the first and the last have a name in the legend
_TITLES = {
    _ANGLE: "angle to the block before (of a half turn)",
    "output_norm": "size of the block's output",
    "relative_step": "relative step of the output",
    "update_cosine": "cosine of its consecutive steps",
}


@dataclass(frozen=True)
class Layers(Record):
    """Means over the inputs and their tokens, of what leaves each block in each loop.

    Attributes:
        inputs: How many inputs.
        hops: Their hop count; None for texts and token ids.
        names: What each block is called within an iteration, in the order in which they run.
        statistics: What is measured, in the order of `values`.
        values: Float[Tensor, "statistic loop layer"]. angular_distance is the angle, over pi,
            between the output of the block that ran before (of the iteration before for the first
            one) and its own; the others follow one block from iteration to iteration. NaN where
            there is none before.
    """

    inputs: int
    hops: int | None
    names: tuple[str, ...]
    statistics: tuple[str, ...]
    values: Float[Tensor, "statistic loop layer"]

    def of(self, statistic: str) -> Float[Tensor, "loop layer"]:
        """The values of one statistic."""
        return self.values[self.statistics.index(statistic)]

    def frame(self) -> pd.DataFrame:
        """visit (its name), loop, layer, and one column per statistic."""
        n_loops = self.values.shape[1]
        rows = [
            (visit, *loop_and_layer(visit), *self.values[:, t, i].tolist())
            for t in range(n_loops)
            for i, name in enumerate(self.names)
            for visit in (f"loops.{t}.{name}",)
        ]
        return pd.DataFrame(rows, columns=["visit", "loop", "layer", *self.statistics])

    def summary(self) -> pd.DataFrame:
        """One row per block: its turn in loop 1 and in the last one, its last output's size, its
        last relative step.
        """
        angle, second = self.of(_ANGLE), min(1, self.values.shape[1] - 1)
        return pd.DataFrame(
            {
                "block": self.names,
                f"angle in loop {second} (of pi)": angle[second],
                "last angle (of pi)": angle[-1],
                "last output's size": self.of("output_norm")[-1],
                "last relative step": self.of("relative_step")[-1],
                "last cosine of steps": self.of("update_cosine")[-1],
            }
        )


def run(config: LayersConfig) -> Layers:
    """Follow every block's output on the questions of one hop count, or on what is given."""
    if config.n_loops < 2:
        raise ValueError(
            "what changes between iterations needs at least 2 of them, got --n-loops"
            f" {config.n_loops}"
        )
    asked = open_inputs(config)
    return measure(asked, asked.group(config.hops), config.n_loops, config.positions)


def measure(asked: Asked, group: Group, n_loops: int, positions: Shown = "real") -> Layers:
    """The record for one group of inputs of an open checkpoint."""
    found = layer_dynamics(asked.subject.model, group.batch, n_loops, positions=positions)
    values = torch.full(
        (1 + len(_OVER_ITERATIONS), n_loops, len(found.names)), math.nan, dtype=torch.float64
    )
    values[0] = _angles(found, n_loops)
    for i, path in enumerate(found.layers):
        loops = torch.tensor(path.iterations) - 1
        for s, statistic in enumerate(_OVER_ITERATIONS.values(), start=1):
            values[s, loops, i] = statistic(path)[:, path.shown].mean(1).double().cpu()
    return Layers(len(group.batch), group.hops, found.names, (_ANGLE, *_OVER_ITERATIONS), values)


def _angles(found: LayerDynamics, n_loops: int) -> Float[Tensor, "loop layer"]:
    """Angle over pi between each output and that of the visit before, mean over the places that are
    shown.
    """
    angles = torch.full((n_loops, len(found.names)), math.nan, dtype=torch.float64)
    visits = [
        (t, i)
        for t in range(n_loops)
        for i, path in enumerate(found.layers)
        if t + 1 in path.iterations
    ]
    before = None
    for t, i in visits:
        path = found.layers[i].directions()
        now = path.states[path.iterations.index(t + 1)][path.shown].double()
        if before is not None:
            angles[t, i] = (
                2 * ((now - before).norm(dim=-1) / 2).clamp(max=1.0).arcsin() / math.pi
            ).mean()
        before = now
    return angles


def figure(record: Layers) -> go.Figure:
    """First panel: blocks along, a curve per loop; the others: loops along, a curve per block."""
    plot = make_subplots(
        rows=2,
        cols=2,
        horizontal_spacing=0.12,
        vertical_spacing=0.2,
        subplot_titles=[_TITLES[name] for name in record.statistics],
    )
    n_loops, n_layers = record.values.shape[1:]
    for t, shade in enumerate(shades(ORDER, n_loops)):
        plot.add_scatter(
            x=list(record.names),
            y=record.values[0, t].tolist(),
            mode="lines+markers",
            line={"color": shade, "width": 1.8},
            marker={"size": 6},
            showlegend=False,
            row=1,
            col=1,
            hovertemplate=f"loops.{t}.%{{x}}.hook_resid_post<br>angle %{{y:.3f}} of a half turn"
            "<extra></extra>",
        )
    _scale(plot, n_loops)
    for s in range(1, len(record.statistics)):
        place = {"row": s // 2 + 1, "col": s % 2 + 1}
        for i in range(n_layers):
            plot.add_trace(_over_loops(record, s, i), **place)
        plot.update_xaxes(title="loop", range=[-0.5, n_loops - 0.5], **place)
    named = {"showticklabels": n_layers <= _NAMED, "tickfont": {"size": 10 if n_layers > 4 else 13}}
    plot.update_xaxes(type="category", **named, row=1, col=1)
    plot.update_yaxes(rangemode="tozero", showgrid=True)
    plot.update_yaxes(range=[-1.05, 1.05], row=2, col=2)
    plot.add_hline(y=0, line={"color": FAINT, "width": 1}, row=2, col=2)
    plot.update_annotations(font_size=13)
    plot.update_layout(legend={"orientation": "h", "y": -0.14, "x": 0.5, "xanchor": "center"})
    return styled(plot, 640).update_layout(margin_b=90)


def _over_loops(record: Layers, statistic: int, layer: int) -> go.Scatter:
    """One statistic of one block; with many blocks only the first and the last are in the
    legend.
    """
    name, n_layers = record.names[layer], len(record.names)
    what = record.statistics[statistic].replace("_", " ")
    return go.Scatter(
        x=list(range(record.values.shape[1])),
        y=record.values[statistic, :, layer].tolist(),
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=statistic == 1 and (n_layers <= _NAMED or layer in (0, n_layers - 1)),
        marker={"size": 5},
        line={"color": _color(layer, n_layers), "width": 2},
        hovertemplate=f"loops.%{{x}}.{name}.hook_resid_post<br>{what} %{{y:.3g}}<extra></extra>",
    )


def _color(layer: int, n_layers: int) -> str:
    """One of a few colours that all can tell apart, or a shade from first to last where the blocks
    are many.
    """
    if n_layers <= 6:
        return CATEGORIES[layer]
    return shades(ORDER, n_layers)[layer]


def _scale(plot: go.Figure, n_loops: int) -> None:
    """Which colour is which loop, as a bar beside the first panel."""
    bar = color_bar("loop<br>(first panel)", y=1, yanchor="top", len=0.45)
    plot.add_scatter(
        x=[None], y=[None], mode="markers", showlegend=False, hoverinfo="skip", row=1, col=1,
        marker={
            "color": [0], "cmin": 0, "cmax": n_loops - 1, "colorbar": bar,
            "colorscale": ORDER,
        },
    )  # fmt: skip


def _found(record: Layers) -> str:
    last, first = record.of("relative_step")[-1], record.of("relative_step")[1]
    moving = int(last.argmax())
    return (
        f"From loop 1 to loop {record.values.shape[1] - 1} the mean relative step of the blocks"
        f" goes from {float(first.mean()):.3f} to {float(last.mean()):.3f}; {record.names[moving]}"
        " moves most at the end."
    )


SECTION = Section(
    title="The work of each block",
    look_for=(
        "How far each block turns the state, and how its output changes from loop to loop. If the"
        " steps of all blocks vanish, each block has come to a fixed point of its own, and the"
        " state goes through these points once per iteration."
    ),
    measure=lambda opened: measure(opened.asked, opened.asked.group(), opened.config.n_loops),
    found=_found,
    serves=of_a_text,
)

EXAMPLE = 'plots.layers("mini/smiles", text="CC(=O)N", n_loops=12)'
