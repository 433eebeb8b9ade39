"""The answer that the model would give, at every token and after every block: logit lens of one
question (figure 4 for one example).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float, Int
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.labels import AXIS, label, loop_and_layer, spoken, tick
from loopscope.analyses.common.look import ACCURACY_SCALE, INK, styled
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.interp.lens.lens import logit_lens


@dataclass(frozen=True, kw_only=True)
class LensConfig(SourceConfig):
    """Logit lens of one question: every token position, after every block of every iteration
    (figure 4 for one example).
    """

    text: str | None = None
    """The question; by default the first one of the data with the most hops that were trained."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    track: tuple[str, ...] = ()
    """Tokens whose rank to show; by default the entities that the question passes, where the graph
    is known, or its answer.
    """


@dataclass(frozen=True)
class LensHeatmap(Record):
    """The lens of one question.

    Attributes:
        text: The question.
        tokens: Its tokens (and the padding column where the answer is read, if there is one).
        readout: The column at which the answer is read.
        answer: The right answer; None where unknown.
        visits: The name of each visit, such as "loops.2.blocks.0".
        top: Top token of each visit and position.
        prob, entropy: Float[Tensor, "visit pos"], probability of the top token, entropy in nats.
        tracked: The tokens whose rank is followed.
        tracked_at: The column at which each is expected: an intermediate entity's own relation,
            else the readout.
        rank: Int[Tensor, "tracked visit pos"]; 0 is the top.
    """

    text: str
    tokens: tuple[str, ...]
    readout: int
    answer: str | None
    visits: tuple[str, ...]
    top: tuple[tuple[str, ...], ...]
    prob: Float[Tensor, "visit pos"]
    entropy: Float[Tensor, "visit pos"]
    tracked: tuple[str, ...]
    tracked_at: tuple[int, ...]
    rank: Int[Tensor, "tracked visit pos"]

    def frame(self) -> pd.DataFrame:
        """visit (its name), loop, layer, position, token, top, prob, entropy, and a column "rank of
        X" for each tracked token.
        """
        rows = []
        for i, visit in enumerate(self.visits):
            loop, layer = loop_and_layer(visit)
            for j, token in enumerate(self.tokens):
                ranks = {
                    f"rank of {t}": int(self.rank[k, i, j]) for k, t in enumerate(self.tracked)
                }
                own = {
                    "visit": visit,
                    "loop": loop,
                    "layer": layer,
                    "position": j,
                    "token": token,
                    "top": self.top[i][j],
                }
                rows.append(
                    {
                        **own,
                        "prob": float(self.prob[i, j]),
                        "entropy": float(self.entropy[i, j]),
                        **ranks,
                    }
                )
        return pd.DataFrame(rows).astype({"loop": "Int64", "layer": "Int64"})

    def summary(self) -> pd.DataFrame:
        """For each tracked token: the position where it first gets to the top, and the visit at
        which it does.
        """
        rows: list[tuple[str, ...]] = []
        for k, token in enumerate(self.tracked):
            hits = (self.rank[k] == 0).nonzero()
            if len(hits) == 0:
                rows.append((token, "never", "", ""))
                continue
            visit, position = hits[0].tolist()
            rows.append(
                (token, f"{position} {self.tokens[position]}", self.visits[visit], str(len(hits)))
            )
        return pd.DataFrame(
            rows, columns=["token", "first on top at", "after visit", "cells on top"]
        )


def run(config: LensConfig) -> LensHeatmap:
    """Read every position of one question after every block."""
    subject = open_subject(config)
    text = subject.example().text if config.text is None else config.text
    return measure(subject, text, config.n_loops, config.track)


def measure(
    subject: Subject, text: str, n_loops: int | None = None, track: tuple[str, ...] = ()
) -> LensHeatmap:
    """The record for one question of an open checkpoint."""
    model = subject.model
    batch = model.encode(text)
    lens = logit_lens(model, batch, n_loops, positions="all")
    width = batch.tokens.shape[1]
    top = lens.top(1)
    words = [model.to_str_tokens(visit) for visit in top.tokens[..., 0]]
    answer = _answer(subject, text)
    passed = _passed(subject, text)
    tracked = tuple(dict.fromkeys(track or passed or ((answer,) if answer else ())))
    readout = int(batch.readout[0])
    ranks = [
        lens.rank(batch.tokens.new_full((width,), model.to_single_token(token)))
        for token in tracked
    ]
    return LensHeatmap(
        text=text,
        tokens=tuple(model.to_str_tokens(batch.tokens[0])),
        readout=readout,
        answer=answer,
        visits=lens.names,
        top=tuple(map(tuple, words)),
        prob=top.probs[..., 0].float().cpu(),
        entropy=lens.entropy().float().cpu(),
        tracked=tracked,
        tracked_at=tuple(
            passed.index(token) + 1 if token in passed and token != answer else readout
            for token in tracked
        ),
        rank=top.tokens.new_zeros(0, len(words), width).cpu() if not ranks else _stacked(ranks),
    )


def _stacked(ranks: list[Tensor]) -> Tensor:
    return ranks[0].new_tensor([rank.tolist() for rank in ranks]).cpu()


def _answer(subject: Subject, text: str) -> str | None:
    try:
        return subject.answer_of(text)
    except ValueError:
        return None


def _passed(subject: Subject, text: str) -> tuple[str, ...]:
    """The entities on the question's path after its head, where the graph is known."""
    return tuple(subject.graph.walk(text)[1:]) if subject.graph else ()


def figure(record: LensHeatmap) -> go.Figure:
    """Left: top token (text) and its probability (colour) for each token and visit; right: ranks of
    the tracked tokens.
    """
    plot = make_subplots(
        rows=1, cols=2, column_widths=[0.64, 0.36], horizontal_spacing=0.17,
        subplot_titles=("top token after each block", "rank of each entity at its place"),
    )  # fmt: skip
    steps = list(map(tick, record.visits))
    plot.add_heatmap(
        x=[label(f"{i} {token}") for i, token in enumerate(record.tokens)],
        y=steps,
        z=record.prob.tolist(),
        zmin=0,
        zmax=1,
        colorscale=ACCURACY_SCALE,
        xgap=1,
        ygap=1,
        text=[list(map(label, row)) for row in record.top],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=_hover(record),
        hovertemplate="%{customdata}<extra></extra>",
        colorbar={"title": "prob", "thickness": 10, "x": 0.54, "outlinewidth": 0},
        row=1,
        col=1,
    )
    places = [k / max(1, len(record.tracked) - 1) for k in range(len(record.tracked))]
    for k, place in enumerate(places):
        color = sample_colorscale("Viridis", [0.05 + 0.85 * place])[0]
        plot.add_trace(_curve(record, k, color), row=1, col=2)
    plot.update_yaxes(title=AXIS, type="category", row=1, col=1)
    plot.update_yaxes(type="category", matches="y", row=1, col=2)
    plot.update_xaxes(type="category", tickangle=-30, row=1, col=1)
    plot.update_xaxes(title="rank (0 = top)", rangemode="tozero", showgrid=True, row=1, col=2)
    plot.update_layout(legend={"orientation": "h", "y": -0.2, "x": 1, "xanchor": "right"})
    return styled(plot, 200 + 24 * max(10, len(steps))).update_layout(margin_b=110)


def _curve(record: LensHeatmap, tracked: int, color: str) -> go.Scatter:
    """The ranks of one tracked token at its place; the answer in black."""
    token, place = record.tracked[tracked], record.tracked_at[tracked]
    is_answer = token == record.answer
    name = f"{token} at {place} {record.tokens[place]}" + " (answer)" * is_answer
    return go.Scatter(
        x=record.rank[tracked, :, place].tolist(),
        y=list(map(tick, record.visits)),
        mode="lines+markers",
        marker={"size": 5},
        name=label(name),
        customdata=list(record.visits),
        line={"color": INK if is_answer else color, "width": 3 if is_answer else 1.6},
        hovertemplate=f"{label(token)}<br>%{{customdata}}.hook_resid_post<br>rank %{{x}}"
        "<extra></extra>",
    )


def _hover(record: LensHeatmap) -> list[list[str]]:
    cells = []
    for i, visit in enumerate(record.visits):
        row = []
        for j, token in enumerate(record.tokens):
            lines = [f"{visit}.hook_resid_post", f"{spoken(visit)}, position {j} {token}"]
            lines += [
                f"top {record.top[i][j]}, p = {record.prob[i, j]:.3f}, entropy"
                f" {record.entropy[i, j]:.2f}"
            ]
            lines += [
                f"rank of {t}: {int(record.rank[k, i, j])}" for k, t in enumerate(record.tracked)
            ]
            row.append("<br>".join(map(label, lines)))
        cells.append(row)
    return cells


def _found(record: LensHeatmap) -> str:
    reached = sum(bool((rank == 0).any()) for rank in record.rank)
    return (
        f"The question is {record.text}; the answer is {record.answer}. "
        f"Of its {len(record.tracked)} tracked tokens, {reached} come out on top somewhere."
    )


SECTION = Section(
    title="Logit lens of one question",
    look_for=(
        "Read the residual stream as if the model stopped here: the top token at every position"
        " after every block. In a model that follows the relations one after another, each"
        " intermediate entity appears at its own relation, one iteration after the one before it."
        " The right panel follows the rank of each entity at its own relation."
    ),
    measure=lambda opened: measure(
        opened.subject, opened.subject.example(opened.config.hops).text, opened.n_loops
    ),
    found=_found,
)
