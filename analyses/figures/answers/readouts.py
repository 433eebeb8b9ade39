"""Which token does the model itself give after each iteration? Its own readout of one text, at
every position.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import TextConfig
from loopscope.analyses.common.inputs_of import OWN, AnswerTokens, Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_a_text
from loopscope.analyses.common.subject import words
from loopscope.interp.drawing.cells import CellMap
from loopscope.interp.drawing.labels import label, visible
from loopscope.interp.drawing.look import CATEGORIES, color_bar, styled
from loopscope.interp.lens.lens import readout_lens


@dataclass(frozen=True, kw_only=True)
class ReadoutsConfig(TextConfig):
    """The model's own readout of one text after each iteration: top tokens at every position, and
    how sure and how settled the answer is.
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""


@dataclass(frozen=True)
class Readouts(Record):
    """The readouts of one text; row t is after t + 1 iterations.

    Attributes:
        text: The text.
        tokens: Its tokens (and the padding column where the answer is read, if there is one).
        readout: The column at which the answer is read.
        answer: The answer.
        own: Whether the answer is the model's own top token, as the true one is unknown.
        top: Top token of each iteration and position.
        prob: Float[Tensor, "loop pos"], the probability of the top token.
        answer_prob, margin: Float[Tensor, " loop"], probability of the answer at the readout, and
            its logit minus the largest other one.
        entropy, kl: Float[Tensor, " loop"], of the distribution at the readout, and its KL from the
            one an iteration earlier, in nats; the first KL is NaN.
    """

    text: str
    tokens: tuple[str, ...]
    readout: int
    answer: str
    own: bool
    top: tuple[tuple[str, ...], ...]
    prob: Float[Tensor, "loop pos"]
    answer_prob: Float[Tensor, " loop"]
    margin: Float[Tensor, " loop"]
    entropy: Float[Tensor, " loop"]
    kl: Float[Tensor, " loop"]

    def heading(self) -> str:
        """The text with its answer."""
        return f"{self.text}, answer {visible(self.answer)}{f' ({OWN})' * self.own}"

    def frame(self) -> pd.DataFrame:
        """iterations (run), position, token, top, prob."""
        rows = [
            (t + 1, j, token, self.top[t][j], float(self.prob[t, j]))
            for t in range(len(self.top))
            for j, token in enumerate(self.tokens)
        ]
        return pd.DataFrame(rows, columns=["iterations", "position", "token", "top", "prob"])

    def summary(self) -> pd.DataFrame:
        """One row per iteration, at the readout: top token and its probability, the answer's
        probability and margin, entropy, KL.
        """
        return pd.DataFrame(
            {
                "iterations": range(1, len(self.top) + 1),
                "top": [row[self.readout] for row in self.top],
                "prob": self.prob[:, self.readout],
                f"prob of {self.answer}": self.answer_prob,
                "margin": self.margin,
                "entropy": self.entropy,
                "KL": self.kl,
            }
        )


def run(config: ReadoutsConfig) -> Readouts:
    """Read every position of one input after each iteration."""
    asked = open_inputs(config)
    group = asked.one(config.hops)
    answers = asked.answers(group, config.answer, config.n_loops)
    return measure(asked, group, answers, config.n_loops)


def measure(
    asked: Asked, group: Group, answers: AnswerTokens, n_loops: int | None = None
) -> Readouts:
    """The record for one input of an open checkpoint, with its answer."""
    model, batch = asked.subject.model, group.batch
    lens, at = readout_lens(model, batch, n_loops, positions="all"), int(batch.readout[0])
    top = lens.top(1)
    targets = answers.ids.expand(batch.tokens.shape[1])
    prob, margin, entropy, kl = (
        values[:, at].float().cpu()
        for values in (lens.prob(targets), lens.margin(targets), lens.entropy(), lens.kl())
    )
    return Readouts(
        text=group.texts[0],
        tokens=words(model, batch.tokens[0]),
        readout=at,
        answer=answers.words[0],
        own=answers.own,
        top=tuple(words(model, loop) for loop in top.tokens[..., 0]),
        prob=top.probs[..., 0].float().cpu(),
        answer_prob=prob,
        margin=margin,
        entropy=entropy,
        kl=kl,
    )


def figure(record: Readouts) -> go.Figure:
    """Left: top token (text) and its probability (colour) for each position and iteration; right:
    the answer's probability, the entropy and the KL over iterations.
    """
    iterations = list(range(1, len(record.top) + 1))
    plot = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.62, 0.38],
        horizontal_spacing=0.26,
        specs=[[{}, {"secondary_y": True}]],
        subplot_titles=(
            "top token after each iteration",
            _title(record),
        ),
    )
    cells = CellMap(
        title="",
        columns=[f"{i} {visible(token)}" for i, token in enumerate(record.tokens)],
        rows=iterations,
        values=record.prob.tolist(),
        unit="prob",
        texts=record.top,
    )
    plot.add_trace(cells.trace(colorbar=color_bar("prob", x=0.47)), row=1, col=1)
    for values, name, color, nats in (
        (record.answer_prob, "probability of the answer", CATEGORIES[0], False),
        (record.entropy, "entropy", CATEGORIES[1], True),
        (record.kl, "KL from the iteration before", CATEGORIES[2], True),
    ):
        curve = go.Scatter(
            x=iterations,
            y=values.tolist(),
            mode="lines+markers",
            name=name,
            line={"color": color, "width": 2},
            hovertemplate=f"{name}<br>%{{x}} iterations<br>%{{y:.3g}}<extra></extra>",
        )
        plot.add_trace(curve, row=1, col=2, secondary_y=nats)
    _axes(plot, len(iterations))
    height = 230 + 24 * max(10, len(iterations))
    return styled(plot, height).update_layout(margin_b=120)


def _axes(plot: go.Figure, n_loops: int) -> None:
    plot.update_yaxes(title="iterations", type="category", row=1, col=1)
    plot.update_xaxes(type="category", tickangle=-30, row=1, col=1)
    plot.update_xaxes(title="iterations", dtick=max(1, n_loops // 8), row=1, col=2)
    plot.update_yaxes(title="probability", range=[0, 1.04], row=1, col=2, secondary_y=False)
    nats = {"title": "nats", "rangemode": "tozero", "tickmode": "auto"}
    plot.update_yaxes(**nats, row=1, col=2, secondary_y=True)
    plot.update_annotations(font_size=13)
    plot.update_layout(legend={"orientation": "h", "y": -0.25, "x": 1, "xanchor": "right"})


def _title(record: Readouts) -> str:
    return label(f"where the answer is read: {visible(record.answer)}{f' ({OWN})' * record.own}")


def _found(record: Readouts) -> str:
    says = [row[record.readout] for row in record.top]
    last = says[-1]
    settled = max((t + 2 for t, word in enumerate(says) if word != last), default=1)
    return (
        f"The text is {record.text}. From {settled} iterations on the top token is {last}, at the"
        f" end with p = {float(record.prob[-1, record.readout]):.3f}."
    )


def _of_report(opened: Opened) -> Readouts:
    group = opened.asked.one(opened.config.hops)
    return measure(opened.asked, group, opened.answers(group), opened.n_loops)


SECTION = Section(
    title="The model's own readout after each iteration",
    look_for=(
        "The answer that the model would give if it stopped after that iteration, read as the"
        " family itself reads it. A position whose top token no longer changes has settled."
        " Entropy falls as the model becomes sure. KL compares each answer with the one before,"
        " and falls when further iterations change nothing."
    ),
    measure=_of_report,
    found=_found,
    serves=of_a_text,
)

EXAMPLE = 'plots.readouts("mini/smiles", text="CC(=O)N")'
