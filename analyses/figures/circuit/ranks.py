"""When does each entity on the way come to the top? Ranks of chosen tokens under the logit lens,
block by block.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import AnswerTokens, Asked, Group, entities, open_inputs
from loopscope.analyses.common.look import hop_name, note, spread
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_inputs
from loopscope.analyses.common.subject import token_id
from loopscope.interp.drawing.labels import label, loop_and_layer
from loopscope.interp.drawing.look import BLUES, FAINT, INK, MARK, deeper, shades, styled
from loopscope.interp.lens.decoding import rank_trajectory
from loopscope.interp.lens.lens import logit_lens


@dataclass(frozen=True, kw_only=True)
class RanksConfig(InputsConfig):
    """Rank of the intermediate entities, of the answer and of a control token after every
    block, by the logit lens, over effective depth (blocks run).
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    at: Literal["own", "readout"] = "own"
    """own: each entity at the relation that leads to it; readout: all of them where the answer is
    read.
    """
    track: tuple[str, ...] = ()
    """Tokens to follow at the readout instead (ids, without a vocabulary)."""
    answer: str | None = None
    """The token that counts as the answer; by default the true one where it is known, else the
    model's own top token after all iterations.
    """


ANSWER, CONTROL = "answer", "control"
_RANKS = (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)
_TOP = 0.05  # a mean rank up to this counts as the top


@dataclass(frozen=True)
class Ranks(Record):
    """Ranks over effective depth, over the inputs that were run.

    Attributes:
        texts: The inputs.
        answer: The answer in words, with its source where it is the model.
        hops: Their hop count; None where they are no questions.
        names: The visits in order; the effective depth is how many of them have run.
        targets: What is followed: "hop 1" and so on for the entities on the way, "answer",
            "control", or tokens.
        at: Where each target is read, such as "relation 2" or "readout".
        mean: Float[Tensor, "visit target"], geometric mean of the place on the list (rank + 1),
            minus 1: a rank again, 0 for the top token.
        low, high: Float[Tensor, "visit target"], quartiles of the rank.
        top: Float[Tensor, "visit target"], share of the inputs whose top token is the target.
    """

    texts: tuple[str, ...]
    answer: str
    hops: int | None
    names: tuple[str, ...]
    targets: tuple[str, ...]
    at: tuple[str, ...]
    mean: Float[Tensor, "visit target"]
    low: Float[Tensor, "visit target"]
    high: Float[Tensor, "visit target"]
    top: Float[Tensor, "visit target"]

    def heading(self) -> str:
        """The one input, or how many there are and of how many hops; with the answer where they are
        no questions.
        """
        if self.hops is None:
            count = len(self.texts)
            asked = self.texts[0] if count == 1 else f"{count} inputs"
            return f"{asked}; answer: {self.answer}" if ANSWER in self.targets else asked
        if len(self.texts) == 1:
            return self.texts[0]
        return f"{len(self.texts)} questions of {hop_name(self.hops)}"

    def arrivals(self) -> list[int | None]:
        """For each target the first depth at which its mean rank is at most 0.05; None where it
        never is.
        """
        there = self.mean <= _TOP
        return [
            int(column.int().argmax()) + 1 if bool(column.any()) else None
            for column in there.unbind(1)
        ]

    def frame(self) -> pd.DataFrame:
        """depth (blocks run), visit, loop, target, at, rank (0 is the top; geometric mean), its
        quartiles, share on top.
        """
        rows = [
            (
                i + 1,
                name,
                loop_and_layer(name)[0],
                target,
                self.at[j],
                *(float(x[i, j]) for x in (self.mean, self.low, self.high, self.top)),
            )
            for i, name in enumerate(self.names)
            for j, target in enumerate(self.targets)
        ]
        columns = [
            "depth",
            "visit",
            "loop",
            "target",
            "at",
            "geometric_mean_rank",
            "lower_quartile",
            "upper_quartile",
            "share_on_top",
        ]
        return pd.DataFrame(rows, columns=columns).astype({"loop": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per target: where it is read, its best geometric mean rank and the depth
        there, and its last one.
        """
        best = self.mean.min(0)
        arrived = [depth or "never" for depth in self.arrivals()]
        return pd.DataFrame(
            {
                "target": self.targets,
                "read at": self.at,
                "first on top at depth": arrived,
                "best geometric mean rank": best.values,
                "at depth": best.indices + 1,
                "last geometric mean rank": self.mean[-1],
                "last share on top": self.top[-1],
            }
        )


def run(config: RanksConfig) -> Ranks:
    """Follow the entities on the way and the answer, or the tokens that the config names."""
    asked = open_inputs(config)
    group = asked.group(config.hops)
    answers = asked.answers(group, config.answer, config.n_loops)
    return measure(asked, group, answers, config.n_loops, config.at == "own", config.track)


def measure(
    asked: Asked,
    group: Group,
    answers: AnswerTokens,
    n_loops: int | None = None,
    own: bool = True,
    track: Sequence[str] = (),
) -> Ranks:
    """The record for one group of inputs with their answers.

    Args:
        own: Read each entity at the relation that leads to it, the answer and the control at the
            readout.
        track: Tokens to follow at the readout instead.
    """
    targets, tokens = _targets(asked, group, answers, track)
    columns = (
        [int(name.removeprefix("hop ")) for name in targets if name.startswith("hop ")]
        if own and not track
        else []
    )
    rank = _ranks(asked, group, tokens, columns, n_loops)
    quartiles = torch.quantile(
        rank.double(), torch.tensor([0.25, 0.75], dtype=torch.float64), dim=1
    )
    visits = asked.subject.model.schedule(n_loops)
    return Ranks(
        texts=group.texts,
        answer=answers.said,
        hops=group.hops,
        names=tuple(visit.name for visit in visits),
        targets=targets,
        at=tuple(f"relation {column}" for column in columns)
        + ("readout",) * (len(targets) - len(columns)),
        mean=rank.double().log1p().mean(1).expm1(),
        low=quartiles[0],
        high=quartiles[1],
        top=(rank == 0).double().mean(1),
    )


def _ranks(
    asked: Asked, group: Group, tokens: Tensor, columns: list[int], n_loops: int | None
) -> Int[Tensor, "visit batch target"]:
    """Ranks, each of the first targets at a column of its own and the others at the
    readout.
    """
    model, found = asked.subject.model, []
    for targets, positions in (
        (tokens[:, : len(columns)], columns),
        (tokens[:, len(columns) :], None),
    ):
        if targets.shape[1] > 0:
            lens = logit_lens(model, group.batch, n_loops, positions=positions)
            n_reads = 1 if positions is None else len(positions)
            rank = rank_trajectory(
                lens, targets.to(model.device).repeat_interleave(n_reads, 0)
            ).rank.cpu()
            if positions is not None:
                rank = rank.unflatten(1, (-1, n_reads)).diagonal(dim1=2, dim2=3)
            found.append(rank)
    return torch.cat(found, dim=2)


def _targets(
    asked: Asked, group: Group, answers: AnswerTokens, track: Sequence[str]
) -> tuple[tuple[str, ...], Int[Tensor, "batch target"]]:
    """The targets in each input: the same tokens in all, or the entities on the way, the answer
    and a control.
    """
    model = asked.subject.model
    if track:
        return tuple(track), torch.tensor(
            [[token_id(model, word) for word in track]] * len(group.batch)
        )
    paths = _paths(asked, group)
    if not paths:
        return (ANSWER,), answers.ids[:, None].cpu()
    rows = [
        [*path[:-1], answer, _control(asked, text, path, i)]
        for i, (text, path, answer) in enumerate(
            zip(group.texts, paths, answers.words, strict=True)
        )
    ]
    names = (*(f"hop {i + 1}" for i in range(len(paths[0]) - 1)), ANSWER, CONTROL)
    return names, torch.tensor([[model.to_single_token(word) for word in row] for row in rows])


def _paths(asked: Asked, group: Group) -> list[list[str]]:
    """The entities that each question passes after its head; the true answers alone without a
    graph; nothing where the inputs are no questions.
    """
    graph = asked.subject.graph
    if graph is None:
        return [[answer] for answer in group.answers] if entities(asked.subject) else []
    paths = [graph.walk(text)[1:] for text in group.texts]
    lengths = sorted(set(map(len, paths)))
    if len(lengths) > 1:
        raise ValueError(f"the questions must have one hop count, got {lengths}")
    return paths


def _control(asked: Asked, text: str, path: Sequence[str], seed: int) -> str:
    """An entity that the question does not pass, drawn by its number."""
    head = asked.subject.model.to_str_tokens(text)[0]
    others = [word for word in entities(asked.subject) if word not in (head, *path)]
    if not others:
        raise ValueError(
            f"no entity is left for a control: {text!r} passes all of the vocabulary; pass --track"
            " with the tokens to follow"
        )
    return random.Random(seed).choice(others)


def figure(record: Ranks) -> go.Figure:
    """Effective depth along, rank upwards (the top token on top), one curve per target with the
    quartiles as a band.
    """
    plot, one, depths = go.Figure(), len(record.texts) == 1, len(record.names)
    colors = _colors(record)
    for j, color in enumerate(colors):
        if not one:
            plot.add_trace(_band(record, j, color))
        plot.add_trace(_curve(record, j, color))
    _mark_loops(plot, record)
    _label(plot, record, colors)
    title = {"text": label(record.heading()), "font": {"size": 14}, "x": 0.02, "y": 0.96}
    plot.update_layout(title=title)
    plot.update_xaxes(
        title="effective depth (blocks run)",
        range=[0.5, depths + 0.5],
        tick0=0,
        dtick=max(1, depths // 16),
    )
    rank = "rank of the token (0 = top)"
    plot.update_yaxes(
        title=rank if one else f"{rank},<br>geometric mean and quartiles",
        type="log",
        range=[_log10(_lowest(record)), -0.16],
        tickvals=[1 + rank for rank in _RANKS],
        ticktext=list(map(str, _RANKS)),
        showgrid=True,
    )
    return styled(plot, 480).update_layout(margin_r=80, margin_t=72)


def _band(record: Ranks, target: int, color: str) -> go.Scatter:
    """The quartiles of one target; on the log axis a rank stands at rank + 1."""
    depths = list(range(1, len(record.names) + 1))
    low, high = (1 + record.low[:, target]).tolist(), (1 + record.high[:, target]).tolist()
    return go.Scatter(
        x=depths + depths[::-1],
        y=low + high[::-1],
        fill="toself",
        mode="none",
        fillcolor=color,
        opacity=0.16,
        hoverinfo="skip",
        showlegend=False,
    )


def _curve(record: Ranks, target: int, color: str) -> go.Scatter:
    """The ranks of one target; on the log axis a rank stands at rank + 1."""
    name, mean = record.targets[target], record.mean[:, target]
    shown = "geometric mean rank %{customdata[2]:.2f}<br>on top in %{customdata[1]:.0%}"
    if len(record.texts) == 1:
        shown = "rank %{customdata[2]:.0f}"
    width, dash = {ANSWER: (3, "solid"), CONTROL: (2, "dot")}.get(name, (2, "solid"))
    return go.Scatter(
        x=list(range(1, len(record.names) + 1)),
        y=(1 + mean).tolist(),
        mode="lines+markers",
        name=label(name),
        showlegend=False,
        marker={"size": 5},
        line={"color": color, "width": width, "dash": dash},
        customdata=list(
            zip(record.names, record.top[:, target].tolist(), mean.tolist(), strict=True)
        ),
        hovertemplate=f"{label(name)}, read at the {record.at[target]}<br>"
        f"%{{customdata[0]}}.hook_resid_post, depth %{{x}}<br>{shown}<extra></extra>",
    )


def _lowest(record: Ranks) -> float:
    """The place on the list, from 1, at the bottom of the figure."""
    return 1.15 * (1 + max(float(record.high.max()), float(record.mean.max())))


def _log10(value: float) -> float:
    return float(torch.tensor(value).log10())


def _colors(record: Ranks) -> list[str]:
    """Light to dark along the way; the answer in orange, the control in grey."""
    way = [j for j, target in enumerate(record.targets) if target not in (ANSWER, CONTROL)]
    blues, fixed = shades(BLUES, len(way)), {ANSWER: MARK, CONTROL: FAINT}
    return [fixed.get(target) or blues[way.index(j)] for j, target in enumerate(record.targets)]


def _mark_loops(plot: go.Figure, record: Ranks) -> None:
    """A line where a loop begins, with its number on top."""
    loops = [loop_and_layer(name)[0] for name in record.names]
    starts = [0, *(i for i in range(1, len(loops)) if loops[i] != loops[i - 1])]
    ends = [*starts[1:], len(loops)]
    step = max(1, len(starts) // 16)
    for count, (start, end) in enumerate(zip(starts, ends, strict=True)):
        line = {"color": FAINT, "width": 1, "dash": "dot"}
        plot.add_vline(x=start + 0.5, line=line, layer="below")
        if loops[start] is not None and count % step == 0:
            text = f"{loops[start]}" if count else f"loop {loops[start]}"
            place = {"x": (start + end + 1) / 2, "y": 1, "yref": "paper", "yshift": 10}
            note(plot, text, font={"size": 11, "color": INK}, **place)


def _label(plot: go.Figure, record: Ranks, colors: list[str]) -> None:
    """The name of each target where it comes to the top, above the curve; at the right end where it
    never does.
    """
    arrived: dict[int, list[int]] = {}
    late = []
    for j, depth in enumerate(record.arrivals()):
        arrived.setdefault(depth, []).append(j) if depth is not None else late.append(j)
    for depth, group in arrived.items():
        names = [record.targets[j].removeprefix("hop ") if j else record.targets[j] for j in group]
        font = {"size": 12, "color": deeper(colors[group[-1]])}
        note(plot, label(", ".join(names)), font=font, x=depth, y=0, yshift=13)
    heights = spread(
        [_log10(1 + float(record.mean[-1, j])) for j in late],
        0.05 * (_log10(_lowest(record)) + 0.16),
    )
    for j, height in zip(late, heights, strict=True):
        font = {"size": 12, "color": deeper(colors[j])}
        place = {"x": len(record.names), "xshift": 8, "y": height, "xanchor": "left"}
        note(plot, label(record.targets[j]), font=font, **place)


def _found(record: Ranks) -> str:
    arrived = ", ".join(
        f"{name} at {depth or 'never'}"
        for name, depth in zip(record.targets, record.arrivals(), strict=True)
    )
    return f"First on top at depth: {arrived}."


def _of_report(opened: Opened) -> Ranks:
    group = opened.asked.group(opened.config.hops)
    return measure(opened.asked, group, opened.answers(group), opened.n_loops)


SECTION = Section(
    title="Rank trajectories",
    look_for=(
        "The rank of each entity on the way to the answer (0 is the top token), read after every"
        " block at the position where the entity should be known. Curves that arrive one after"
        " another show a step-by-step computation. The control is a token that no question asks"
        " for; its curve should stay where it is. Thin dotted lines mark where a loop begins."
    ),
    measure=_of_report,
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.ranks("mini/smiles", text="CC(=O)N")'
