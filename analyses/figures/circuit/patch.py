"""Where is the answer carried? Restore one clean activation at a time in a corrupted run (figures
11 and 21).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.labels import AXIS, label, loop_and_layer, spoken, tick
from loopscope.analyses.common.look import styled
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Direction


@dataclass(frozen=True, kw_only=True)
class PatchConfig(SourceConfig):
    """Effect of restoring one clean activation in a corrupted run, for each iteration and layer and
    position (figures 11 and 21).
    """

    clean: str | None = None
    """The clean question; by default the mean over all questions of one hop count is shown."""
    corrupted: str | None = None
    """The corrupted question, of the same length; by default the clean one with another head
    entity.
    """
    hops: int | None = None
    """Hop count of the questions to average over; by default about half of what was trained."""
    site: str = "resid_post"
    """The site that is patched: resid_pre, resid_mid, resid_post, attn_out, mlp_out, ..."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean into corrupted; noise: corrupted into clean."""


@dataclass(frozen=True)
class PatchingMap(Record):
    """Effect of every patch, on the scale where 0 is the corrupted run and 1 the clean one.

    Attributes:
        clean, corrupted: The questions, pair by pair; effects are means over the pairs.
        answers: The clean questions' answers, whose logit margin is measured.
        clean_tokens, corrupted_tokens: Tokens of the first pair.
        site: What is patched.
        direction: "denoise" or "noise".
        names: The hook point of each row; the first one is the embedding.
        effect: Float[Tensor, "row pos"].
        clean_margin, corrupted_margin: The mean margin without a patch, in logits.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answers: tuple[str, ...]
    clean_tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    site: str
    direction: Direction
    names: tuple[str, ...]
    effect: Float[Tensor, "row pos"]
    clean_margin: float
    corrupted_margin: float

    def columns(self) -> list[str]:
        """The name of each position: its tokens for one pair, its role for several."""
        if len(self.clean) == 1:
            pairs = zip(self.clean_tokens, self.corrupted_tokens, strict=True)
            return [f"{j} {a}" if a == b else f"{j} {a} / {b}" for j, (a, b) in enumerate(pairs)]
        roles = {"<e": "head entity", "<r": "relation"}
        return [f"{j} {roles.get(token[:2], token)}" for j, token in enumerate(self.clean_tokens)]

    def frame(self) -> pd.DataFrame:
        """hook (the point that is patched), loop, layer, position, name of the position, effect."""
        rows = [
            (hook, *loop_and_layer(hook), j, name, float(self.effect[i, j]))
            for i, hook in enumerate(self.names)
            for j, name in enumerate(self.columns())
        ]
        frame = pd.DataFrame(rows, columns=["hook", "loop", "layer", "position", "name", "effect"])
        return frame.astype({"loop": "Int64", "layer": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per hook point: the position with the largest effect, and the effect."""
        best = self.effect.max(1)
        return pd.DataFrame(
            {
                "hook": self.names,
                "strongest position": [self.columns()[j] for j in best.indices.tolist()],
                "effect": best.values,
            }
        )


def run(config: PatchConfig) -> PatchingMap:
    """Patch every visit and position of one pair, or of all questions of one hop count."""
    subject = open_subject(config)
    if config.corrupted is not None and config.clean is None:
        raise ValueError("a corrupted question needs its clean one; pass --clean too")
    if config.clean is None:
        clean = [question.text for question in subject.of_hops(config.hops)]
    else:
        clean = [config.clean]
    corrupted = None if config.corrupted is None else [config.corrupted]
    return measure(subject, clean, corrupted, config.site, config.n_loops, config.direction)


def measure(
    subject: Subject,
    clean: Sequence[str],
    corrupted: Sequence[str] | None = None,
    site: str = "resid_post",
    n_loops: int | None = None,
    direction: Direction = "denoise",
) -> PatchingMap:
    """The record for some pairs of an open checkpoint; the corrupted questions default to another
    head entity each.
    """
    model = subject.model
    corrupted = corrupted or [other_head(subject, text) for text in clean]
    clean_batch, corrupted_batch = model.encode(clean), model.encode(corrupted)
    answers = [subject.answer_of(text) for text in clean]
    metric = logit_margin(torch.tensor([model.to_single_token(answer) for answer in answers]))
    sweep = activation_patch(
        model,
        clean_batch,
        corrupted_batch,
        metric,
        n_loops,
        sites=["embed", site],
        direction=direction,
    )
    width = clean_batch.tokens.shape[1]
    names = tuple(cell.name for cell in sweep.cells[::width])
    return PatchingMap(
        clean=tuple(clean),
        corrupted=tuple(corrupted),
        answers=tuple(answers),
        clean_tokens=tuple(model.to_str_tokens(clean_batch.tokens[0])),
        corrupted_tokens=tuple(model.to_str_tokens(corrupted_batch.tokens[0])),
        site=site,
        direction=direction,
        names=names,
        effect=sweep.normalized().view(len(names), width).float().cpu(),
        clean_margin=float(sweep.clean.mean()),
        corrupted_margin=float(sweep.corrupted.mean()),
    )


def other_head(subject: Subject, text: str) -> str:
    """The same relations from another entity: the next one of the vocabulary that leads to another
    answer.

    Raises:
        ValueError: No entity of the vocabulary gives another answer that is known.
    """
    head, *relations = subject.model.to_str_tokens(text)
    wanted = subject.answer_of(text)
    entities = [
        word
        for word in (subject.model.vocab.words if subject.model.vocab else ())
        if word.startswith("<e_")
    ]
    start = entities.index(head) + 1 if head in entities else 0
    for entity in entities[start:] + entities[:start]:
        candidate = "".join([entity, *relations])
        try:
            if subject.answer_of(candidate) != wanted:
                return candidate
        except ValueError:
            continue
    raise ValueError(
        f"no other head entity with a known, different answer was found for {text!r}; pass the"
        " corrupted question"
    )


def figure(record: PatchingMap) -> go.Figure:
    """Rows are visits, columns are positions, colour is the effect."""
    steps = list(map(tick, record.names))
    pairs = list(zip(record.clean_tokens, record.corrupted_tokens, strict=True))
    which = "" if len(record.clean) == 1 else f"first of {len(record.clean)} pairs: "
    hover = [label(f"{which}clean {a}, corrupted {b}") for a, b in pairs]
    plot = go.Figure()
    plot.add_heatmap(
        x=list(map(label, record.columns())),
        y=steps,
        z=record.effect.tolist(),
        zmid=0,
        zmin=-1,
        zmax=1,
        colorscale="RdBu_r",
        xgap=1,
        ygap=1,
        text=[
            [f"{value:.2f}".replace("-0.00", "0.00") for value in row]
            for row in record.effect.tolist()
        ],
        texttemplate="%{text}",
        textfont={"size": 11},
        customdata=[
            [f"{name}<br>{spoken(name)}<br>{text}" for text in hover] for name in record.names
        ],
        hovertemplate=("%{customdata}<br>position %{x}<br>effect %{z:.3f}<extra></extra>"),
        colorbar={
            "title": {"text": "effect<br>0 corrupted<br>1 clean"},
            "thickness": 12,
            "outlinewidth": 0,
        },
    )
    plot.update_xaxes(title="position", type="category")
    plot.update_yaxes(title=f"{AXIS} of {record.site}", type="category")
    return styled(plot, 170 + 24 * len(steps))


def _found(record: PatchingMap) -> str:
    strongest = record.effect.argmax(1).tolist()
    moves = [j for i, j in enumerate(strongest) if i == 0 or j != strongest[i - 1]]
    path = " → ".join(record.columns()[j] for j in moves)
    return (
        f"Means over {len(record.clean)} pairs such as {record.clean[0]} against"
        f" {record.corrupted[0]}; the margin of the clean answer is {record.clean_margin:.2f} clean"
        f" and {record.corrupted_margin:.2f} corrupted. From the embedding upwards the strongest"
        f" position moves {path}."
    )


SECTION = Section(
    title="What one activation carries",
    look_for=(
        "Each corrupted question starts from another entity. A cell puts one clean activation into"
        " the corrupted run and measures how much of the clean margin comes back (1 = all of it)."
        " Where the colour is, the answer's history is being carried at that moment: it should walk"
        " along the relations as the iterations go by, and stay at the readout once the answer is"
        " known."
    ),
    measure=lambda opened: measure(
        opened.subject,
        [each.text for each in opened.subject.of_hops(opened.config.hops)],
        n_loops=opened.n_loops,
    ),
    found=_found,
)
