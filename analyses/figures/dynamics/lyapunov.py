"""Do small changes of the state grow where the answer is wrong? Finite-time Lyapunov exponents of
right and wrong answers, and the share of each sublayer in them.
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
from loopscope.interp.drawing.look import CATEGORIES, INK, MARK, styled
from loopscope.interp.dynamics.growth import Separation, half_of
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.statistics import median_of
from loopscope.interp.lens.lens import readout_lens


@dataclass(frozen=True, kw_only=True)
class LyapunovConfig(InputsConfig):
    """Growth of a small change of the state over iterations, for right and wrong answers, with the
    margin at half depth as a control.
    """

    n_loops: int = 24
    """Iterations to run."""
    deepest: int = 5
    """How many hop counts to run, the deepest first; --hops runs one."""
    space: Literal["state", "direction"] = "direction"
    """state: changes of the state; direction: of its direction, for a state that grows without
    bound.
    """


@dataclass(frozen=True)
class Lyapunov(Record):
    """The leading exponent of each input.

    Attributes:
        texts: The inputs.
        hops: Their hop counts; None for texts and token ids.
        right: Bool[Tensor, " batch"], whether the last answer is right; where no answer is known,
            the model's own counts as right.
        exponent: Float[Tensor, " batch"], nats per iteration.
        margin: Float[Tensor, " batch"], of the answer after half of the iterations.
        sublayers: What an iteration runs.
        shares: Float[Tensor, "answer loop sublayer"], the mean share of each in the growth, in
            nats, of right and of wrong answers; NaN where there are none.
        separation: How well exponent and margin tell wrong from right.
    """

    texts: tuple[str, ...]
    hops: tuple[int | None, ...]
    right: Bool[Tensor, " batch"]
    exponent: Float[Tensor, " batch"]
    margin: Float[Tensor, " batch"]
    sublayers: tuple[str, ...]
    shares: Float[Tensor, "answer loop sublayer"]
    separation: Separation

    def frame(self) -> pd.DataFrame:
        """One row per input: input, hops, right, exponent, margin (at half depth)."""
        return pd.DataFrame(
            {
                "input": self.texts,
                "hops": self.hops,
                "right": self.right.tolist(),
                "exponent": self.exponent.tolist(),
                "margin": self.margin.tolist(),
            }
        ).astype({"hops": "Int64"})

    def summary(self) -> pd.DataFrame:
        """Right and wrong answers: their number, the median exponent, and the AUC of both
        predictors.
        """
        rows = []
        for name, chosen in (("right", self.right), ("wrong", ~self.right)):
            rows.append((name, int(chosen.sum()), median_of(self.exponent[chosen])))
        frame = pd.DataFrame(rows, columns=["answer", "inputs", "median exponent"])
        return frame.assign(
            **{
                "AUC of the exponent": self.separation.exponent,
                "AUC of the margin at half depth": self.separation.margin,
            }
        )


def run(config: LyapunovConfig) -> Lyapunov:
    """Follow a small change on the deepest questions, or on what is given."""
    if config.deepest < 1:
        raise ValueError(f"at least one hop count is needed, got --deepest {config.deepest}")
    asked = open_inputs(config)
    return measure(asked, asked.groups(config.hops)[-config.deepest :], config)


def measure(asked: Asked, groups: tuple[Group, ...], config: LyapunovConfig) -> Lyapunov:
    """The record for some groups of inputs of an open checkpoint."""
    model, found, spectra, margins, rights = asked.subject.model, [], [], [], []
    for group in tqdm(groups, desc="lyapunov", leave=False, disable=len(groups) < 2):
        spectrum = lyapunov_spectrum(model, group.batch, 1, config.n_loops, space=config.space)
        lens = readout_lens(model, group.batch, config.n_loops)
        answers = asked.answers(group, n_loops=config.n_loops).ids
        spectra.append(spectrum.shares[..., 0].cpu())
        found.append(spectrum.exponents[..., 0].mean(0).cpu())
        margins.append(lens.margin(answers)[half_of(config.n_loops) - 1].cpu())
        rights.append(lens.correct(answers)[-1].cpu())
    right, shares = torch.cat(rights), torch.cat(spectra, dim=2)
    exponent, margin = torch.cat(found), torch.cat(margins)
    return Lyapunov(
        texts=tuple(text for group in groups for text in group.texts),
        hops=tuple(group.hops for group in groups for _ in group.texts),
        right=right,
        exponent=exponent,
        margin=margin,
        sublayers=spectrum.sublayers,
        shares=torch.stack([shares[..., chosen].mean(2) for chosen in (right, ~right)]),
        separation=Separation.of(exponent, margin, ~right, config.n_loops),
    )


def figure(record: Lyapunov) -> go.Figure:
    """Exponents against margins on the left, the shares of sublayers on the right."""
    plot = make_subplots(
        rows=1,
        cols=2,
        horizontal_spacing=0.13,
        subplot_titles=("exponent against margin", "share of each sublayer"),
    )
    for name, chosen, color in (
        ("right", record.right, CATEGORIES[0]),
        ("wrong", ~record.right, MARK),
    ):
        plot.add_scatter(
            x=record.margin[chosen].tolist(),
            y=record.exponent[chosen].tolist(),
            mode="markers",
            name=f"{name} ({int(chosen.sum())})",
            marker={"color": color, "size": 6},
            hovertemplate="margin %{x:.3g}<br>exponent %{y:.3g}<extra>" + name + "</extra>",
            row=1,
            col=1,
        )
    loops = list(range(record.shares.shape[1]))
    for i, (name, color) in enumerate(zip(record.sublayers, CATEGORIES[2:] * 9, strict=False)):
        for answer, dash in ((0, "solid"), (1, "dot")):
            plot.add_scatter(
                x=loops,
                y=record.shares[answer, :, i].tolist(),
                name=name,
                legendgroup=name,
                showlegend=answer == 0,
                mode="lines",
                line={"color": color, "width": 2, "dash": dash},
                hovertemplate=f"{name}<br>loop %{{x}}<br>%{{y:.3g}} nats<extra></extra>",
                row=1,
                col=2,
            )
    plot.add_hline(y=0, line={"color": INK, "width": 1})
    plot.add_vline(x=0, line={"color": INK, "width": 1}, col=1)
    plot.update_xaxes(title="margin at half depth (logits)", row=1, col=1)
    plot.update_yaxes(title="exponent (nats per loop)", row=1, col=1)
    plot.update_xaxes(title="loop (dotted: wrong answers)", row=1, col=2)
    plot.update_yaxes(title="share in the growth (nats)", row=1, col=2)
    return styled(plot, 440)


def _found(record: Lyapunov) -> str:
    return str(record.separation)


SECTION = Section(
    title="Do small changes grow?",
    look_for=(
        "How fast a small change of the state grows over iterations, for right and for wrong"
        " answers. Above zero the change grows (the run is chaotic), below zero it shrinks (the"
        " run forgets it). The control is the margin at half depth: if it tells right from wrong"
        " equally well, the exponent describes failures but does not foretell them."
    ),
    measure=lambda opened: measure(
        opened.asked,
        (opened.asked.group(opened.config.hops),),
        LyapunovConfig(n_loops=opened.config.n_loops),
    ),
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.lyapunov("mini/smiles", text="CC(=O)N", n_loops=6)'
