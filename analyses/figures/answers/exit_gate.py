"""When would the model's own gate stop, token by token, and what does an earlier exit change?
(after Ouro, arXiv 2510.25741)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from jaxtyping import Bool, Float, Int
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_a_text
from loopscope.analyses.common.subject import words
from loopscope.interp.common.ranking import top_token
from loopscope.interp.drawing.cells import TokenMap
from loopscope.interp.drawing.look import CATEGORIES, color_bar, styled
from loopscope.interp.exits.exit_gate import (
    GATE,
    exit_distribution,
    gate_names,
    readout_at_threshold,
)
from loopscope.models.core.state import checked_loops


@dataclass(frozen=True, kw_only=True)
class ExitGateConfig(InputsConfig):
    """Where a model's own exit gate stops, token by token, and what an earlier exit costs (after
    Ouro, arXiv 2510.25741).
    """

    checkpoint: Annotated[str, tyro.conf.Positional] = field()  # no shipped model has a gate
    """A checkpoint file or folder of a family with an exit gate, such as Ouro."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    thresholds: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Thresholds on the cumulative probability of an exit; one run each."""


_TITLES = (
    "the gate",
    "iterations used",
    "same top token as the last",
    "expected exit of each token (iterations)",
)
_LINES = 24  # of the map of tokens


@dataclass(frozen=True)
class ExitGate(Record):
    """The gate at every token that is no padding, the tokens of all inputs one after another.

    Attributes:
        tokens: The tokens of each input.
        exit_now: Float[Tensor, "loop spot"], lambda_t: the gate's probability of an exit after an
            iteration that is reached.
        pdf: Float[Tensor, "loop spot"], p_t: the probability that the exit is after that iteration;
            the last takes what is left.
        cdf: Float[Tensor, "loop spot"], the probability that it is after that iteration or an
            earlier one.
        thresholds: Thresholds on the cumulative probability.
        used: Int[Tensor, "threshold spot"], iterations until it reaches the threshold.
        agrees: Bool[Tensor, "threshold spot"], whether the top token there is that of the last
            iteration.
    """

    tokens: tuple[tuple[str, ...], ...]
    exit_now: Float[Tensor, "loop spot"]
    pdf: Float[Tensor, "loop spot"]
    cdf: Float[Tensor, "loop spot"]
    thresholds: tuple[float, ...]
    used: Int[Tensor, "threshold spot"]
    agrees: Bool[Tensor, "threshold spot"]

    def expected(self) -> Float[Tensor, " spot"]:
        """The expected number of iterations run at the exit: the sum of r p_r."""
        return torch.arange(1, len(self.pdf) + 1, dtype=self.pdf.dtype) @ self.pdf

    def frame(self) -> pd.DataFrame:
        """input, position, token, iterations (run at the exit), lambda, p, cumulative."""
        spots = [(i, j, token) for i, row in enumerate(self.tokens) for j, token in enumerate(row)]
        rows = [
            (*spot, t + 1, *(float(x[t, k]) for x in (self.exit_now, self.pdf, self.cdf)))
            for k, spot in enumerate(spots)
            for t in range(len(self.pdf))
        ]
        return pd.DataFrame(
            rows, columns=["input", "position", "token", "iterations", "lambda", "p", "cumulative"]
        )

    def summary(self) -> pd.DataFrame:
        """One row per threshold: mean iterations used, and share of the tokens whose top token is
        that of the last iteration.
        """
        return pd.DataFrame(
            {
                "threshold": self.thresholds,
                "mean iterations": self.used.double().mean(1),
                "same top token as after all": self.agrees.double().mean(1),
            }
        )


def run(config: ExitGateConfig) -> ExitGate:
    """Read the gate at every token, and every answer at each threshold.

    Raises:
        ValueError: No threshold, one outside 0..1, or a model without an exit gate.
    """
    if not config.thresholds or not all(0 <= threshold <= 1 for threshold in config.thresholds):
        raise ValueError(
            f"thresholds must be one or more probabilities in 0..1, got {config.thresholds}"
        )
    asked = open_inputs(config)
    return measure(asked, asked.group(config.hops), config.thresholds, config.n_loops)


@torch.no_grad()
def measure(
    asked: Asked, group: Group, thresholds: tuple[float, ...], n_loops: int | None = None
) -> ExitGate:
    """The record for one group of inputs of an open checkpoint."""
    model, batch = asked.subject.model, group.batch
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    names, real = gate_names(model, n_loops), batch.mask.bool()
    logits, cache = model.run_with_cache(
        batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=names, **batch.options
    )
    gates = torch.stack([cache[name] for name in names])[:, real]
    last, used, agrees = top_token(logits[real]), [], []
    for threshold in tqdm(thresholds, desc="thresholds", leave=False):
        read = readout_at_threshold(model, batch, threshold, n_loops)
        used.append(read.iterations[real])
        agrees.append(top_token(read.logits[real]) == last)
    pdf, cdf = exit_distribution(gates)
    return ExitGate(
        tokens=tuple(
            words(model, row[shown]) for row, shown in zip(batch.tokens, real, strict=True)
        ),
        exit_now=gates.sigmoid().cpu(),
        pdf=pdf.cpu(),
        cdf=cdf.cpu(),
        thresholds=thresholds,
        used=torch.stack(used).cpu(),
        agrees=torch.stack(agrees).cpu(),
    )


def figure(record: ExitGate) -> go.Figure:
    """Above: the gate over iterations, iterations used and agreement over thresholds. Below: the
    expected exit of each token.
    """
    tokens = TokenMap(record.tokens, record.expected().tolist())
    count = len(tokens.lines())
    cut = f", the first {_LINES} of {count} lines" if count > _LINES else ""
    share = 16 * min(count, _LINES) + 60
    plot = make_subplots(
        rows=2,
        cols=3,
        specs=[[{}, {}, {}], [{"colspan": 3}, None, None]],
        row_heights=[260, share],
        horizontal_spacing=0.1,
        vertical_spacing=110 / (370 + share),
        subplot_titles=[*_TITLES[:3], _TITLES[3] + cut],
    )
    _distribution(plot, record)
    _over_thresholds(plot, record)
    plot.update_yaxes(showgrid=True, row=1)
    plot.update_annotations(font_size=13)
    tokens.add_to(
        plot,
        _LINES,
        {"row": 2, "col": 1},
        zmin=1,
        zmax=len(record.pdf),
        colorbar=color_bar("exit", len=0.4, y=0, yanchor="bottom"),
        hovertemplate="%{text}, %{customdata}<br>expected exit after %{z:.2f} iterations"
        "<extra></extra>",
    )
    place = {"orientation": "h", "x": 0, "y": 1 + 34 / (220 + share), "yanchor": "bottom"}
    plot.update_layout(legend=place)
    return styled(plot, 370 + share).update_layout(margin_t=90)


def _over_thresholds(plot: go.Figure, record: ExitGate) -> None:
    """Iterations used, and the share of tokens whose top token is already that of the end."""
    n_loops = len(record.pdf)
    for col, values, color, unit, highest in (
        (2, record.used, CATEGORIES[0], "mean iterations", n_loops),
        (3, record.agrees, CATEGORIES[1], "share of tokens", 1),
    ):
        plot.add_scatter(
            x=list(record.thresholds),
            y=values.double().mean(1).tolist(),
            mode="lines+markers",
            line={"color": color, "width": 2},
            showlegend=False,
            hovertemplate=f"threshold %{{x}}<br>{unit} %{{y:.2f}}<extra></extra>",
            row=1,
            col=col,
        )
        top = [0, 1.04 * highest]
        plot.update_yaxes(title=unit, title_standoff=6, range=top, row=1, col=col)
    plot.update_xaxes(title="threshold", dtick=0.25, tick0=0, row=1)
    plot.update_xaxes(title="iterations", dtick=max(1, n_loops // 8), tick0=1, row=1, col=1)


def _distribution(plot: go.Figure, record: ExitGate) -> None:
    """Means over the tokens: p_t as bars, the cumulative and lambda_t as lines."""
    iterations = list(range(1, len(record.pdf) + 1))
    hover = "after %{x} iterations<br>%{y:.3f}<extra></extra>"
    plot.add_bar(
        x=iterations, y=record.pdf.mean(1).tolist(), name="p<sub>t</sub>, exit here",
        marker_color=CATEGORIES[5], hovertemplate="p " + hover, row=1, col=1,
    )  # fmt: skip
    for values, name, color, dash in (
        (record.cdf, "cumulative", CATEGORIES[0], "solid"),
        (record.exit_now, "λ<sub>t</sub>, exit if reached", CATEGORIES[1], "dot"),
    ):
        plot.add_scatter(
            x=iterations,
            y=values.mean(1).tolist(),
            mode="lines+markers",
            name=name,
            line={"color": color, "dash": dash, "width": 2},
            hovertemplate=name + " " + hover,
            row=1,
            col=1,
        )
    plot.update_yaxes(title="mean over tokens", range=[0, 1.04], title_standoff=6, row=1, col=1)


def _found(record: ExitGate) -> str:
    expected = record.expected()
    least, most = int(expected.argmin()), int(expected.argmax())
    tokens = [token for row in record.tokens for token in row]
    return (
        f"Over {len(tokens)} tokens the gate is expected to stop after"
        f" {float(expected.mean()):.2f} of {len(record.pdf)} iterations: first at"
        f" {tokens[least]} ({float(expected[least]):.2f}), last at {tokens[most]}"
        f" ({float(expected[most]):.2f})."
    )


def _has_gate(opened: Opened) -> bool:
    """Whether the model has a gate, and a text is run."""
    model = opened.subject.model
    return of_a_text(opened) and f"loops.0.{GATE}" in model.hook_names(1)


SECTION = Section(
    title="The model's own exit gate",
    look_for=(
        "The gate gives each token a probability of stopping after each iteration. The figure"
        " shows, token by token, when it is expected to stop, and what an earlier exit changes in"
        " the answer. A gate that knows its task stops early at easy tokens, and the top token at"
        " its exit is the same as after the last iteration."
    ),
    measure=lambda opened: measure(
        opened.asked, opened.asked.group(), ExitGateConfig.thresholds, opened.n_loops
    ),
    found=_found,
    serves=_has_gate,
)

EXAMPLE = 'plots.exit_gate("path/to/ouro", text="the cat sat on the mat")'
