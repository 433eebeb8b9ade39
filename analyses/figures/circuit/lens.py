"""The answer that the model would give, at every token and after every block: logit lens of one
question (figure 4 for one example).
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import TextConfig
from loopscope.analyses.common.inputs_of import OWN, AnswerTokens, Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_inputs
from loopscope.analyses.common.subject import Subject, token_id, words
from loopscope.interp.drawing.cells import CellMap
from loopscope.interp.drawing.labels import AXIS, label, loop_and_layer, spoken, tick, visible
from loopscope.interp.drawing.look import INK, ORDER, color_bar, shades, styled
from loopscope.interp.lens.lens import logit_lens


@dataclass(frozen=True, kw_only=True)
class LensConfig(TextConfig):
    """Logit lens of one text: every token position, after every block of every iteration (figure 4
    for one example).
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    track: tuple[str, ...] = ()
    """Tokens whose rank to show; by default the entities that the question passes, where the graph
    is known, or the answer.
    """


@dataclass(frozen=True)
class LensHeatmap(Record):
    """The lens of one question.

    Attributes:
        text: The question.
        tokens: Its tokens (and the padding column where the answer is read, if there is one).
        readout: The column at which the answer is read.
        answer: The answer.
        own: Whether the answer is the model's own top token, as the true one is unknown.
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
    answer: str
    own: bool
    visits: tuple[str, ...]
    top: tuple[tuple[str, ...], ...]
    prob: Float[Tensor, "visit pos"]
    entropy: Float[Tensor, "visit pos"]
    tracked: tuple[str, ...]
    tracked_at: tuple[int, ...]
    rank: Int[Tensor, "tracked visit pos"]

    def heading(self) -> str:
        """The text with its answer."""
        return f"{self.text}, answer {visible(self.answer)}{f' ({OWN})' * self.own}"

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
    """Read every position of one input after every block."""
    asked = open_inputs(config)
    group = asked.one(config.hops)
    answers = asked.answers(group, config.answer, config.n_loops)
    return measure(asked, group, answers, config.n_loops, config.track)


def measure(
    asked: Asked,
    group: Group,
    answers: AnswerTokens,
    n_loops: int | None = None,
    track: tuple[str, ...] = (),
) -> LensHeatmap:
    """The record for one input of an open checkpoint, with its answer."""
    model, batch, text = asked.subject.model, group.batch, group.texts[0]
    lens = logit_lens(model, batch, n_loops, positions="all")
    width = batch.tokens.shape[1]
    top = lens.top(1)
    passed, (answer,) = _passed(asked.subject, text), answers.words
    tracked = tuple(dict.fromkeys(track or passed or (answer,)))
    readout = int(batch.readout[0])
    ids = {answer: int(answers.ids[0])} | {
        word: token_id(model, word) for word in tracked if word != answer
    }
    ranks = [lens.rank(batch.tokens.new_full((width,), ids[word])) for word in tracked]
    return LensHeatmap(
        text=text,
        tokens=words(model, batch.tokens[0]),
        readout=readout,
        answer=answer,
        own=answers.own,
        visits=lens.names,
        top=tuple(words(model, visit) for visit in top.tokens[..., 0]),
        prob=top.probs[..., 0].float().cpu(),
        entropy=lens.entropy().float().cpu(),
        tracked=tracked,
        tracked_at=tuple(
            passed.index(token) + 1 if token in passed and token != answer else readout
            for token in tracked
        ),
        rank=torch.stack(ranks).cpu(),
    )


def _passed(subject: Subject, text: str) -> tuple[str, ...]:
    """The entities on the question's path after its head, where the graph knows them."""
    try:
        return tuple(subject.graph.walk(text)[1:]) if subject.graph else ()
    except ValueError:
        return ()


def figure(record: LensHeatmap) -> go.Figure:
    """Left: top token (text) and its probability (colour) for each token and visit; right: ranks of
    the tracked tokens.
    """
    plot = make_subplots(
        rows=1, cols=2, column_widths=[0.64, 0.36], horizontal_spacing=0.17,
        subplot_titles=("top token after each block", "rank of each tracked token"),
    )  # fmt: skip
    cells = CellMap(
        title="",
        columns=[f"{i} {visible(token)}" for i, token in enumerate(record.tokens)],
        rows=list(map(tick, record.visits)),
        values=record.prob.tolist(),
        unit="prob",
        texts=record.top,
        hover=_hover(record),
    )
    plot.add_trace(cells.trace(colorbar=color_bar("prob", x=0.54)), row=1, col=1)
    for k, color in enumerate(shades(ORDER, len(record.tracked))):
        plot.add_trace(_curve(record, k, color), row=1, col=2)
    plot.update_yaxes(title=AXIS, type="category", row=1, col=1)
    plot.update_yaxes(type="category", matches="y", row=1, col=2)
    plot.update_xaxes(type="category", tickangle=-30, row=1, col=1)
    plot.update_xaxes(title="rank (0 = top)", rangemode="tozero", showgrid=True, row=1, col=2)
    plot.update_layout(
        showlegend=True, legend={"orientation": "h", "y": -0.2, "x": 1, "xanchor": "right"}
    )
    return styled(plot, 200 + 24 * max(10, len(record.visits))).update_layout(margin_b=110)


def _curve(record: LensHeatmap, tracked: int, color: str) -> go.Scatter:
    """The ranks of one tracked token at its place; the answer in black."""
    token, place = record.tracked[tracked], record.tracked_at[tracked]
    is_answer = token == record.answer
    called = (f" ({OWN})" if record.own else " (answer)") * is_answer
    name = f"{visible(token)} at {place} {visible(record.tokens[place])}{called}"
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
            ranks = [
                f"rank of {t}: {int(record.rank[k, i, j])}" for k, t in enumerate(record.tracked)
            ]
            lines = [
                f"{visit}.hook_resid_post",
                f"{spoken(visit)}, position {j} {token}",
                f"top {record.top[i][j]}, entropy {record.entropy[i, j]:.2f}",
                *ranks,
            ]
            row.append("\n".join(lines))
        cells.append(row)
    return cells


def _found(record: LensHeatmap) -> str:
    reached = sum(bool((rank == 0).any()) for rank in record.rank)
    return (
        f"The text is {record.text}; the answer is {record.answer}{f', {OWN}' * record.own}. "
        f"Of its {len(record.tracked)} tracked tokens, {reached} come out on top somewhere."
    )


def _of_report(opened: Opened) -> LensHeatmap:
    group = opened.asked.one(opened.config.hops)
    return measure(opened.asked, group, opened.answers(group), opened.n_loops)


SECTION = Section(
    title="Logit lens of one text",
    look_for=(
        "The residual stream after every block, read as if the model stopped there: the top token"
        " at every position. In a model that follows relations one after another, each"
        " intermediate entity appears at the position of its own relation, one after the other."
        " The right panel shows the rank of each entity at that position (0 is the top token)."
    ),
    measure=_of_report,
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.lens("mini/smiles", text="CC(=O)N")'
