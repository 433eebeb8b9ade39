"""Where do iterations lead? Whether the state of right and of wrong answers settles, and whether
runs from changed first states end in the same state and the same answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section, of_inputs
from loopscope.interp.drawing.look import CATEGORIES, MARK, styled
from loopscope.interp.dynamics.attractors import fixed_points
from loopscope.interp.dynamics.basins import basins
from loopscope.interp.dynamics.statistics import median_of

_RULES = ("one run", "majority", "steadiest")


@dataclass(frozen=True, kw_only=True)
class AttractorsConfig(InputsConfig):
    """Whether the state settles, and where runs from changed first states end (after arXiv
    2605.21488).
    """

    n_loops: int = 24
    """Iterations to run."""
    deepest: int = 5
    """How many hop counts to run, the deepest first; --hops runs one."""
    n_starts: int = 8
    """Runs of each input, the unchanged one counted."""
    scale: float | None = None
    """Size of the change of the first state, as a share of it; by default the first states are
    drawn anew where the model draws one, and 0.1 elsewhere.
    """
    space: Literal["state", "direction"] = "direction"
    """state: compare states; direction: their directions, for a state that grows without bound."""


@dataclass(frozen=True)
class Attractors(Record):
    """The end of each input's runs.

    Attributes:
        texts: The inputs.
        hops: Their hop counts; None for texts and token ids.
        n_starts: Runs of each input.
        residual: Float[Tensor, "iteration batch"], the relative step of the unchanged run.
        iterations: Float[Tensor, " batch"], after which it has settled; NaN where it has not.
        right: Bool[Tensor, "rule batch"], whether the answer of one run, of the majority and of the
            run with the smallest last step is right; where no answer is known, the model's own
            counts as right.
        same_state, same_answer: Float[Tensor, " batch"], the share of the other starts that end as
            the unchanged one.
    """

    texts: tuple[str, ...]
    hops: tuple[int | None, ...]
    n_starts: int
    residual: Float[Tensor, "iteration batch"]
    iterations: Float[Tensor, " batch"]
    right: Bool[Tensor, "rule batch"]
    same_state: Float[Tensor, " batch"]
    same_answer: Float[Tensor, " batch"]

    def frame(self) -> pd.DataFrame:
        """One row per input: input, hops, iterations (until settled), residual (the last one),
        same_state, same_answer, and whether each rule is right.
        """
        columns = {
            "iterations": self.iterations,
            "residual": self.residual[-1],
            "same_state": self.same_state,
            "same_answer": self.same_answer,
            **dict(zip(_RULES, self.right, strict=True)),
        }
        frame = pd.DataFrame({name: value.tolist() for name, value in columns.items()})
        frame.insert(0, "hops", list(self.hops))
        frame.insert(0, "input", list(self.texts))
        return frame.astype({"hops": "Int64"})

    def summary(self) -> pd.DataFrame:
        """Right and wrong answers of one run: their number, the share that settled, the median last
        step, and how often other starts end alike.
        """
        rows = []
        for name, chosen in (("right", self.right[0]), ("wrong", ~self.right[0])):
            last = self.residual[-1, chosen]
            rows.append(
                (
                    name,
                    int(chosen.sum()),
                    float((~self.iterations[chosen].isnan()).double().mean()),
                    f"{median_of(last):.2g}" if len(last) else "",
                    float(self.same_state[chosen].mean()),
                    float(self.same_answer[chosen].mean()),
                )
            )
        names = ["answer", "inputs", "settled", "last step", "same state", "same answer"]
        return pd.DataFrame(rows, columns=names)


def run(config: AttractorsConfig) -> Attractors:
    """Run the deepest questions, or what is given, from several first states."""
    if config.deepest < 1:
        raise ValueError(f"at least one hop count is needed, got --deepest {config.deepest}")
    asked = open_inputs(config)
    return measure(asked, asked.groups(config.hops)[-config.deepest :], config)


def measure(asked: Asked, groups: tuple[Group, ...], config: AttractorsConfig) -> Attractors:
    """The record for some groups of inputs of an open checkpoint."""
    model, n_loops, found = asked.subject.model, config.n_loops, []
    for group in tqdm(groups, desc="attractors", leave=False, disable=len(groups) < 2):
        points = fixed_points(model, group.batch, n_loops, space=config.space)
        ends = basins(
            model, group.batch, config.n_starts, config.scale, n_loops, space=config.space
        )
        answers, vote = asked.answers(group, n_loops=n_loops).ids, ends.vote()
        right = [rule == answers for rule in (vote.single, vote.majority, vote.steadiest)]
        found.append(
            {
                "residual": points.residual,
                "iterations": points.iterations,
                "right": torch.stack(right),
                "same_state": ends.same_state,
                "same_answer": ends.same_answer,
            }
        )
    joined = {name: torch.cat([each[name].cpu() for each in found], dim=-1) for name in found[0]}
    texts = tuple(text for group in groups for text in group.texts)
    hops = tuple(group.hops for group in groups for _ in group.texts)
    return Attractors(texts, hops, config.n_starts, **joined)


def figure(record: Attractors) -> go.Figure:
    """The relative step over iterations on the left, the accuracy of each rule on the right."""
    plot = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.13,
        subplot_titles=("relative step (median; dotted: quartiles)", f"{record.n_starts} starts"),
    )
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    first = record.right[0]
    for name, chosen, color in (("right", first, CATEGORIES[0]), ("wrong", ~first, MARK)):
        if not bool(chosen.any()):
            continue
        steps = record.residual[:, chosen].double().quantile(shares, dim=1)
        for row, width in zip(steps, (1, 2.5, 1), strict=True):
            plot.add_scatter(
                x=list(range(1, len(row) + 1)),
                y=row.tolist(),
                mode="lines",
                name=f"{name} ({int(chosen.sum())})",
                legendgroup=name,
                showlegend=width > 1,
                line={"color": color, "width": width, "dash": "solid" if width > 1 else "dot"},
                hovertemplate=f"{name}<br>%{{x}} iterations<br>%{{y:.3g}}<extra></extra>",
                row=1,
                col=1,
            )
    heights = [*record.right.double().mean(1).tolist(), float(record.same_state.mean())]
    plot.add_bar(
        x=[*(f"{rule} right" for rule in _RULES), "same state", "same answer"],
        y=[*heights, float(record.same_answer.mean())],
        marker_color=[*CATEGORIES[2:3] * 3, *CATEGORIES[5:6] * 2],
        showlegend=False,
        hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        row=1,
        col=2,
    )
    step = "‖h<sub>t</sub> - h<sub>t-1</sub>‖ / ‖h<sub>t-1</sub>‖"
    plot.update_yaxes(type="log", dtick="D2", title=step, row=1, col=1)
    plot.update_xaxes(title="iterations", row=1, col=1)
    plot.update_yaxes(title="share", range=[0, 1.02], row=1, col=2)
    plot.update_xaxes(tickangle=-40, row=1, col=2)
    return styled(plot, 440).update_layout(legend={"x": 0.4, "y": 0.98})


def _found(record: Attractors) -> str:
    one, majority, steadiest = record.right.double().mean(1).tolist()
    settled = float((~record.iterations.isnan()).double().mean())
    return (
        f"{100 * settled:.0f} % of the states settle. Of {record.n_starts} starts the majority is"
        f" right for {100 * majority:.1f} % and the run with the smallest last step for"
        f" {100 * steadiest:.1f} %, against {100 * one:.1f} % for one run."
    )


SECTION = Section(
    title="Where do iterations lead?",
    look_for=(
        "The length of the state's step at each iteration, for right and for wrong answers. Steps"
        " that fall to nothing end in a fixed point; wrong answers may settle too, at a wrong"
        " fixed point. The bars compare runs from changed first states: do they agree, and is"
        " their majority vote, or the run that settles best, right more often than a single run?"
    ),
    measure=lambda opened: measure(
        opened.asked,
        (opened.asked.group(opened.config.hops),),
        AttractorsConfig(n_loops=opened.config.n_loops, n_starts=4),
    ),
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.attractors("mini/smiles", text="CC(=O)N", n_loops=8, n_starts=3)'
