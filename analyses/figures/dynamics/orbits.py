"""Where does the state go? Its paths on the first principal components: fixed points, orbits,
sliders (after arXiv 2502.05171).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig, taken_from
from loopscope.analyses.common.inputs_of import Asked, open_inputs
from loopscope.analyses.common.look import hop_colors, hop_name
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section, of_inputs
from loopscope.analyses.common.subject import words
from loopscope.interp.common.columns import Shown
from loopscope.interp.drawing.curves import arrows
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import ORDER, shades, styled
from loopscope.interp.dynamics.states import Dynamics, dynamics
from loopscope.models.basis.tokens import Batch


@dataclass(frozen=True, kw_only=True)
class OrbitsConfig(InputsConfig):
    """Paths of the state on its principal components: fixed points, orbits and sliders (after
    figures of arXiv 2502.05171).
    """

    n_loops: int = 32
    """Iterations to run."""
    positions: Literal["readout", "tokens"] = "readout"
    """readout: one path per input, where its answer is read; tokens: one path per token of one
    input.
    """
    paths: int = 8
    """At most this many paths; without --hops, questions of as many hop counts as that."""
    components: Literal[2, 3] = 2
    """Principal components to draw."""
    tol: float = 0.01
    """A period p is found where ||h_t+p - h_t|| / ||h_t|| stays below this over the last
    iterations.
    """


SPACES = ("state", "direction")
_PERIODS, _WINDOW = (
    4,
    8,
)  # the longest period that is looked for, and the last points in which it is
_STRAIGHT, _STEADY = 0.9, 0.9


@dataclass(frozen=True)
class OrbitPaths(Record):
    """Paths on principal components, of the state h and of its direction h / ||h||; a final norm
    reads the direction alone.

    Attributes:
        labels: What each path is: an input, or a token.
        hops: The hop count of each path's question; None for texts and token ids.
        trained_hops: Deepest hop count seen in training; None where unknown.
        coordinates: Float[Tensor, "space path point component"], space 0 being the state and 1 the
            direction; point r-1 is after r iterations.
        explained: Float[Tensor, "space component"], each component's share of the variance.
        period: Float[Tensor, "space path"], 1 for a fixed point; NaN where no period up to 4 fits.
        straightness: Float[Tensor, " path"], smallest cosine between consecutive steps over the
            last iterations.
        step_ratio: Float[Tensor, " path"], the last step of the state over the one six iterations
            earlier.
    """

    labels: tuple[str, ...]
    hops: tuple[int | None, ...]
    trained_hops: int | None
    coordinates: Float[Tensor, "space path point component"]
    explained: Float[Tensor, "space component"]
    period: Float[Tensor, "space path"]
    straightness: Float[Tensor, " path"]
    step_ratio: Float[Tensor, " path"]

    def kinds(self) -> list[tuple[str, str]]:
        """The kind of each path over its last 8 points, as a state and as a direction.

        A slider goes straight on (every cosine between consecutive steps at least 0.9) with steps
        that do not shrink (by less than a tenth). Else a period that `Dynamics.period` finds is a
        fixed point or an orbit; what has none is settling while its steps shrink, and wanders
        otherwise.
        """
        sliding = (self.straightness >= _STRAIGHT) & (self.step_ratio >= _STEADY)
        rest = [
            "settling" if shrinks else "wandering"
            for shrinks in (self.step_ratio < _STEADY).tolist()
        ]
        state = [_named(p, other) for p, other in zip(self.period[0].tolist(), rest, strict=True)]
        moving = [_named(p, "moving") for p in self.period[1].tolist()]
        return [
            ("slider" if slides else kind, turn)
            for slides, kind, turn in zip(sliding.tolist(), state, moving, strict=True)
        ]

    def frame(self) -> pd.DataFrame:
        """space, path, hops, iterations (run), kind, pc1, pc2, ..."""
        _, paths, iterations, components = self.coordinates.shape
        kinds, rows = self.kinds(), []
        for s, i, t in product(range(len(SPACES)), range(paths), range(iterations)):
            point = self.coordinates[s, i, t].tolist()
            rows.append((SPACES[s], self.labels[i], self.hops[i], t + 1, kinds[i][s], *point))
        columns = [
            "space",
            "path",
            "hops",
            "iterations",
            "kind",
            *(f"pc{k + 1}" for k in range(components)),
        ]
        return pd.DataFrame(rows, columns=columns).astype({"hops": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per path: what the state and its direction come to, and the two numbers behind
        it.
        """
        state, direction = zip(*self.kinds(), strict=True)
        return pd.DataFrame(
            {
                "path": self.labels,
                "hops": self.hops,
                "state": state,
                "direction": direction,
                "least cosine of steps": self.straightness,
                "last step / 6 earlier": self.step_ratio,
            }
        ).astype({"hops": "Int64"})


def _named(period: float, otherwise: str) -> str:
    """The name of a period; `otherwise` for NaN."""
    if period != period:
        return otherwise
    return "fixed point" if period == 1 else f"orbit of {period:.0f}"


def run(config: OrbitsConfig) -> OrbitPaths:
    """Follow the state of several inputs at the readout, or of every token of one."""
    if config.n_loops < _WINDOW:
        raise ValueError(
            f"an orbit is looked for in the last {_WINDOW} iterations, got only --n-loops"
            f" {config.n_loops}; pass more"
        )
    if config.paths < 1:
        raise ValueError(f"at least one path is needed, got --paths {config.paths}")
    return measure(open_inputs(config), config)


def measure(asked: Asked, config: OrbitsConfig) -> OrbitPaths:
    """The record of an open checkpoint."""
    model = asked.subject.model
    chosen = _tokens(asked, config) if config.positions == "tokens" else _inputs(asked, config)
    state = _together(
        [
            dynamics(model, batch, config.n_loops, positions=positions)
            for batch, positions, _, _ in chosen
        ]
    )
    spaces = (state, state.directions())
    planes = [space.orbits(config.components) for space in spaces]
    steps = state.step_norm()[:, :, 0]
    return OrbitPaths(
        labels=tuple(chain.from_iterable(labels for _, _, labels, _ in chosen)),
        hops=tuple(hop for _, _, labels, hop in chosen for _ in labels),
        trained_hops=asked.subject.trained_hops,
        coordinates=torch.stack([plane.coordinates[:, :, 0].movedim(0, 1) for plane in planes]),
        explained=torch.stack([plane.explained for plane in planes]),
        period=torch.stack([space.period(_PERIODS, config.tol, _WINDOW)[:, 0] for space in spaces]),
        straightness=state.update_cosine()[-(_WINDOW - 2) :, :, 0].amin(0),
        step_ratio=steps[-1] / steps[1 - _WINDOW],
    )


def _together(runs: Sequence[Dynamics]) -> Dynamics:
    """The paths of several runs after 1, 2, ... iterations, as those of one run."""
    paths = torch.cat([run.states[1:].flatten(1, 2) for run in runs], dim=1)[:, :, None].cpu()
    columns = torch.zeros(paths.shape[1], 1, dtype=torch.int64)
    return Dynamics.of(
        paths, range(1, len(paths) + 1), (columns, torch.ones_like(columns).bool()), "resid"
    )


Chosen = tuple[Batch, Shown, tuple[str, ...], int | None]


def _inputs(asked: Asked, config: OrbitsConfig) -> list[Chosen]:
    """Questions of one hop count, or one of each of some hop counts spread over all, or what was
    given; at the readout.
    """
    if asked.given is not None or config.hops is not None:
        group = asked.group(config.hops)
        return [(group.batch[: config.paths], "readout", group.texts[: config.paths], group.hops)]
    every = sorted(asked.subject.questions)
    count = min(config.paths, len(every))
    hops = [every[round(i * (len(every) - 1) / max(1, count - 1))] for i in range(count)]
    return [
        (group.batch[:1], "readout", group.texts[:1], hop)
        for hop in hops
        for group in asked.groups(hop)
    ]


def _tokens(asked: Asked, config: OrbitsConfig) -> list[Chosen]:
    """Every token of the first input."""
    group = asked.group(config.hops)
    columns = list(range(min(config.paths, int(group.batch.mask[0].sum()))))
    names = words(asked.subject.model, group.batch.tokens[0])
    return [(group.batch[:1], columns, tuple(f"{i} {names[i]}" for i in columns), None)]


def figure(record: OrbitPaths) -> go.Figure:
    """Left the state, right its direction; one path per input, from the ring (one iteration run)
    along the arrows to the square (the last).
    """
    last = record.coordinates.shape[-1]
    plot = make_subplots(
        rows=last - 1,
        cols=2,
        horizontal_spacing=0.14,
        vertical_spacing=0.06,
        shared_xaxes="columns",
        subplot_titles=_titles(record),
    )
    for s, k in product(range(len(SPACES)), range(1, last)):
        _draw(plot, record, s, k)
        plot.update_yaxes(title=_axis(record, s, k), row=k, col=s + 1)
    for s in range(len(SPACES)):
        plot.update_xaxes(title=_axis(record, s, 0), row=last - 1, col=s + 1)
    place = {"orientation": "h", "y": -0.22 / (last - 1), "x": 0.5, "xanchor": "center"}
    plot.update_layout(legend={**place, "font": {"size": 12}})
    plot.update_xaxes(zeroline=False, showgrid=True)
    plot.update_yaxes(zeroline=False, showgrid=True)
    return styled(plot, 180 + 330 * (last - 1)).update_layout(margin_b=120)


def _draw(plot: go.Figure, record: OrbitPaths, space: int, component: int) -> None:
    """All paths of one space on its first component and another one."""
    colors, place = _colors(record), {"row": component, "col": space + 1}
    paths = record.coordinates[space][..., [0, component]]
    near = 0.025 * float((paths.flatten(0, 1).amax(0) - paths.flatten(0, 1).amin(0)).norm())
    for i, (path, kinds) in enumerate(zip(paths, record.kinds(), strict=True)):
        name, hover = _text(record, i, kinds[space])
        trace = arrows(path, near, colors[i], name, hover)
        plot.add_trace(trace.update(showlegend=(space, component) == (0, 1)), **place)
    for at, symbol, size, width in ((0, "circle-open", 9, 2), (-1, "square", 8, 0)):
        plot.add_scatter(
            x=paths[:, at, 0].tolist(),
            y=paths[:, at, 1].tolist(),
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": colors, "line": {"width": width}},
            hoverinfo="skip",
            showlegend=False,
            **place,
        )


def _titles(record: OrbitPaths) -> tuple[str, str]:
    """The name of each space, with the number of paths of each kind."""
    counts = [Counter(kinds) for kinds in zip(*record.kinds(), strict=True)]
    found = [
        ", ".join(f"{n} of {len(record.labels)}: {kind}" for kind, n in count.most_common())
        for count in counts
    ]
    return (
        f"the state h<br><sup>{found[0]}</sup>",
        f"its direction h / ‖h‖<br><sup>{found[1]}</sup>",
    )


def _text(record: OrbitPaths, i: int, kind: str) -> tuple[str, str]:
    """The name of a path in the legend, and what is shown when it is pointed at."""
    name = label(record.labels[i])
    hop = record.hops[i]
    many = len(set(record.hops)) == len(record.hops) > 1
    return (hop_name(hop) if many and hop is not None else name), f"{name}: {kind}"


def _axis(record: OrbitPaths, space: int, component: int) -> str:
    return f"PC{component + 1} ({100 * float(record.explained[space, component]):.0f} %)"


def _colors(record: OrbitPaths) -> list[str]:
    """By hop count where each path has its own, else along one scale."""
    hops = [hop for hop in record.hops if hop is not None]
    if len(set(hops)) == len(record.labels):
        by_hop = hop_colors(hops, record.trained_hops)
        return [by_hop[hop] for hop in hops]
    return shades(ORDER, len(record.labels))


def _found(record: OrbitPaths) -> str:
    kinds = [f"{state} ({direction} in direction)" for state, direction in record.kinds()]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"Of the paths shown: {counted}."


SECTION = Section(
    title="Orbits of the state",
    look_for=(
        "The state at the answer position after every iteration, on its first principal"
        " components, and the same for its direction alone, which is what the final norm passes"
        " on. There are three kinds of paths: a fixed point stops, a slider goes straight on, an"
        " orbit comes back."
    ),
    measure=lambda opened: measure(
        opened.asked,
        taken_from(
            OrbitsConfig, opened.config, n_loops=max(opened.config.n_loops, _WINDOW), hops=None
        ),
    ),
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.orbits("mini/smiles", text="CC(=O)N", positions="tokens")'
