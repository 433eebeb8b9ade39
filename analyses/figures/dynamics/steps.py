"""How does the state move? Size and direction of its steps over iterations, per hop count (after
arXiv 2509.23314).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.look import hop_colors, hop_name
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_inputs
from loopscope.interp.common.columns import Shown
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import CATEGORIES, FAINT, styled
from loopscope.interp.dynamics.states import Dynamics, dynamics


@dataclass(frozen=True, kw_only=True)
class StepsConfig(InputsConfig):
    """Size and direction of the steps that the state takes, over iterations, one curve per hop
    count (after arXiv 2509.23314).
    """

    n_loops: int = 32
    """Iterations to run."""
    positions: Literal["readout", "real"] = "readout"
    """readout: the state where the answer is read; real: mean over all tokens."""


STATISTICS: dict[str, Callable[[Dynamics], Tensor]] = {
    "state_norm": lambda path: path.state_norm(),
    "step_norm": lambda path: path.step_norm(),
    "relative_step": lambda path: path.step_norm(relative=True),
    "update_cosine": lambda path: path.update_cosine(),
    "angle": lambda path: (
        2 * (path.directions().step_norm() / 2).clamp(max=1.0).arcsin().rad2deg()
    ),  # exact where it is small
    "relative_distance_to_last": lambda path: path.distance_to_last(relative=True),
}
_TITLES = {
    "state_norm": "size of the state, ‖h<sub>t</sub>‖",
    "step_norm": "size of the step, ‖h<sub>t</sub> - h<sub>t-1</sub>‖",
    "relative_step": "relative step, ‖h<sub>t</sub> - h<sub>t-1</sub>‖ / ‖h<sub>t-1</sub>‖",
    "update_cosine": "cosine of consecutive steps",
    "angle": "turn of the state (degrees)",
    "relative_distance_to_last": (
        "distance to the last state, ‖h<sub>t</sub> - h<sub>T</sub>‖ / ‖h<sub>T</sub>‖"
    ),
}
_LOGARITHMIC = ("step_norm", "relative_step", "angle")
_STILL = 1.0  # degrees in an iteration


@dataclass(frozen=True)
class Steps(Record):
    """Means over the inputs of a group, at the readout or over all tokens.

    Attributes:
        groups: What each curve is over: "3 hops", or the inputs that were given.
        hops: The hop count of each group; None for texts and token ids.
        inputs: How many inputs each group has.
        trained_hops: Deepest hop count seen in training; None where unknown.
        statistics: What is measured, in the order of `values`.
        values: Float[Tensor, "statistic group point"]; point 0 is the state before the first
            iteration. NaN where a statistic is not defined yet. Angles are in degrees.
    """

    groups: tuple[str, ...]
    hops: tuple[int | None, ...]
    inputs: tuple[int, ...]
    trained_hops: int | None
    statistics: tuple[str, ...]
    values: Float[Tensor, "statistic group point"]

    def of(self, statistic: str) -> Float[Tensor, "group point"]:
        """The values of one statistic."""
        return self.values[self.statistics.index(statistic)]

    def frame(self) -> pd.DataFrame:
        """group, hops, iterations (run; 0 is before the first), and one column per statistic."""
        points = range(self.values.shape[2])
        rows = [
            (group, self.hops[i], t, *self.values[:, i, t].tolist())
            for i, group in enumerate(self.groups)
            for t in points
        ]
        return pd.DataFrame(rows, columns=["group", "hops", "iterations", *self.statistics]).astype(
            {"hops": "Int64"}
        )

    def still(self) -> list[int | str]:
        """For each group the number of iterations from which on the mean turn is below one degree;
        "never" where it is not at the end.
        """
        moving = self.of("angle")[:, 1:] >= _STILL
        from_ = [int(row.nonzero().max()) + 2 if bool(row.any()) else 1 for row in moving]
        return [count if count < self.values.shape[2] else "never" for count in from_]

    def summary(self) -> pd.DataFrame:
        """One row per group: the number of iterations from which on the mean turn is below one
        degree, and the last values.
        """
        return pd.DataFrame(
            {
                "inputs of": self.groups,
                "number": self.inputs,
                "turn below 1 degree from": self.still(),
                "last turn": self.of("angle")[:, -1],
                "last step": self.of("step_norm")[:, -1],
                "last relative step": self.of("relative_step")[:, -1],
                "last cosine of steps": self.of("update_cosine")[:, -1],
            }
        )


def run(config: StepsConfig) -> Steps:
    """Measure the steps of the state, group by group."""
    if config.n_loops < 2:
        raise ValueError(
            f"consecutive steps need at least 2 iterations, got --n-loops {config.n_loops}"
        )
    asked = open_inputs(config)
    return measure(asked, asked.groups(config.hops), config.n_loops, config.positions)


def measure(
    asked: Asked, groups: tuple[Group, ...], n_loops: int, positions: Shown = "readout"
) -> Steps:
    """The record for some groups of inputs of an open checkpoint."""
    bar = tqdm(groups, desc="steps", leave=False, disable=len(groups) < 2)
    model = asked.subject.model
    paths = (dynamics(model, group.batch, n_loops, positions=positions) for group in bar)
    return _record(asked, groups, paths)


def _record(asked: Asked, groups: tuple[Group, ...], paths: Iterable[Dynamics]) -> Steps:
    """The record of the motion of each group."""
    rows = [
        torch.stack([statistic(path)[:, path.shown].mean(1) for statistic in STATISTICS.values()])
        for path in paths
    ]
    return Steps(
        groups=tuple(_name(group) for group in groups),
        hops=tuple(group.hops for group in groups),
        inputs=tuple(len(group.batch) for group in groups),
        trained_hops=asked.subject.trained_hops,
        statistics=tuple(STATISTICS),
        values=torch.stack(rows, dim=1).cpu(),
    )


def _name(group: Group) -> str:
    if group.hops is not None:
        return hop_name(group.hops)
    return group.texts[0] if len(group.texts) == 1 else f"{len(group.texts)} texts"


def figure(record: Steps) -> go.Figure:
    """One panel per statistic, iterations along, one curve per group."""
    rows = (len(record.statistics) + 1) // 2
    titles = [_TITLES[statistic] for statistic in record.statistics]
    plot = make_subplots(
        rows=rows,
        cols=2,
        shared_xaxes="all",
        horizontal_spacing=0.12,
        vertical_spacing=0.09,
        subplot_titles=titles,
    )
    colors, last = _colors(record), record.values.shape[2] - 1
    for s, statistic in enumerate(record.statistics):
        place = {"row": s // 2 + 1, "col": s % 2 + 1}
        for i in range(len(record.groups)):
            plot.add_trace(_curve(record, s, i, colors[i]), **place)
        if statistic in _LOGARITHMIC:
            ticks = _ticks(record.values[s])
            plot.update_yaxes(
                type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks], **place
            )
        if statistic == "update_cosine":
            plot.update_yaxes(
                range=[min(-0.1, float(record.values[s].nan_to_num(0.0).min()) * 1.08), 1.08],
                **place,
            )
            plot.add_hline(y=0, line={"color": FAINT, "width": 1}, **place)
    plot.update_xaxes(showticklabels=True, range=[0.4, last + 0.6])
    plot.update_xaxes(title="iterations", row=rows)
    plot.update_yaxes(showgrid=True)
    plot.update_annotations(font_size=13)
    return styled(plot, 120 + 240 * rows)


def _curve(record: Steps, statistic: int, group: int, color: str) -> go.Scatter:
    name, beyond = (
        label(record.groups[group]),
        (record.hops[group] or 0) > (record.trained_hops or math.inf),
    )
    values = record.values[statistic, group, 1:].tolist()
    return go.Scatter(
        x=list(range(1, len(values) + 1)),
        y=values,
        mode="lines+markers",
        marker={"size": 3.5},
        line={"color": color, "width": 1.6},
        name=name,
        showlegend=statistic == 0 and len(record.groups) > 1,
        legendgroup="beyond" if beyond else "trained",
        legendgrouptitle_text=(
            "beyond training" if beyond else "hops in training" if record.trained_hops else None
        ),
        hovertemplate=(
            f"{name}<br>after %{{x}} iterations<br>{record.statistics[statistic].replace('_', ' ')}"
            " %{y:.3g}<extra></extra>"
        ),
    )


def _ticks(values: Tensor) -> list[float]:
    """Powers of ten, or 1, 2 and 5 times them where the values span less than a decade and a
    half.
    """
    kept = values[values.isfinite() & (values > 0)].log10()
    if len(kept) == 0:
        return [1.0]
    low, high = math.floor(float(kept.min())), math.ceil(float(kept.max()))
    leading = (1, 2, 5) if float(kept.max() - kept.min()) < 1.5 else (1,)
    return [digit * 10.0**power for power in range(low, high + 1) for digit in leading]


def _colors(record: Steps) -> list[str]:
    hops = [hop for hop in record.hops if hop is not None]
    by_hop = hop_colors(hops, record.trained_hops)
    return [by_hop[hop] if hop is not None else CATEGORIES[0] for hop in record.hops]


def _found(record: Steps) -> str:
    still = record.still()
    return (
        f"The state turns by less than one degree per iteration from {still[0]} iterations"
        f" ({record.groups[0]}) to {still[-1]} ({record.groups[-1]}) on."
    )


def _of_report(opened: Opened) -> Steps:
    asked, groups = opened.asked, opened.asked.groups()
    if asked.given is not None:
        return measure(asked, groups, opened.config.n_loops)
    runs = opened.runs
    return _record(asked, groups, [runs[hops].path for hops in sorted(runs)])


SECTION = Section(
    title="Step sizes and angles",
    look_for=(
        "How far and in which direction the state moves at each iteration, one curve per hop"
        " count. While the model computes, its steps turn. Once the answer is there, they should"
        " point the same way or vanish. This should come later for deeper questions."
    ),
    measure=_of_report,
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.steps("mini/smiles", text="CC(=O)N", n_loops=12)'
