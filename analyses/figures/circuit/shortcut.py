"""Does the answer hang on the end of the question? States of random runs put into the clean run
(figure 21).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import pandas as pd
import plotly.graph_objects as go
import torch
import tyro
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.panels import Panel, headline, opened, small_titles, together
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import Subject
from loopscope.interp.drawing.labels import AXIS, label, loop_and_layer, spoken, tick
from loopscope.interp.drawing.look import CELL_TEXT, MARK, SIGNED_SCALE, SOFT, styled
from loopscope.interp.lens.lens import readout_lens
from loopscope.interp.patching.tracing import noising_map
from loopscope.tasks.questions import Question


@dataclass(frozen=True, kw_only=True)
class ShortcutConfig(PanelsConfig):
    """Which positions of the question the answer depends on: the state at each position and
    block of the clean run is replaced by that of a random run (figure 21).
    """

    checkpoints: Annotated[tuple[str, ...], tyro.conf.Positional] = (
        "mini/shortcut",
        "mini/multi_hop/r4",
    )
    """Names from `loopscope list`, checkpoint files, or folders."""
    hops: int | None = None
    """Hop count of the questions; by default the deepest that each checkpoint was trained on."""
    average: bool = False
    """Show the mean over all questions of the hop count instead of one question."""
    n_loops: int | None = None
    """Iterations; by default what each checkpoint records."""
    draws: int = 1
    """Random runs for each question, each with other tokens at all positions; the effect is their
    mean.
    """
    seed: int = 0
    """Seed of the random runs."""


_BAR = SOFT


@dataclass(frozen=True)
class ShortcutMap:
    """Effects of single states of random runs on the answer of one checkpoint.

    Attributes:
        hops: Of the questions.
        texts: The clean questions.
        random: The questions of the random runs, `draws` of them for each clean one, draw by draw.
        tokens: Tokens of the first clean question, one per position.
        names: The hook point of each row; the first one is the embedding.
        effect: Float[Tensor, "row pos"], change of the right answer's mean logit margin, in logits.
        clean_margin: The mean margin of the clean runs.
    """

    hops: int
    texts: tuple[str, ...]
    random: tuple[str, ...]
    tokens: tuple[str, ...]
    names: tuple[str, ...]
    effect: Float[Tensor, "row pos"]
    clean_margin: float

    def share(self) -> Float[Tensor, " pos"]:
        """Each position's share of the total absolute effect."""
        size = self.effect.abs()
        return size.sum(0) / size.sum()

    def last_half(self) -> float:
        """Share of the total absolute effect on the last half of the positions (the smaller half,
        where they are odd in number).
        """
        return float(self.share()[-(len(self.tokens) // 2) :].sum())

    def steps(self) -> list[str]:
        """The name of each row on an axis."""
        return list(map(tick, self.names))

    def columns(self) -> list[str]:
        """The name of each position: its number and token for one question, its role for
        several.
        """
        if len(self.texts) == 1:
            return [f"{j} {token}" for j, token in enumerate(self.tokens)]
        return [
            f"r{j}" if token.startswith("<r") else "head" if j == 0 else token
            for j, token in enumerate(self.tokens)
        ]

    def frame(self) -> pd.DataFrame:
        """hook (the point that is patched), loop, layer, position, name of the position, effect."""
        rows = [
            (hook, *loop_and_layer(hook), j, name, float(self.effect[i, j]))
            for i, hook in enumerate(self.names)
            for j, name in enumerate(self.columns())
        ]
        frame = pd.DataFrame(rows, columns=["hook", "loop", "layer", "position", "name", "effect"])
        return frame.astype({"loop": "Int64", "layer": "Int64"})


@dataclass(frozen=True)
class Shortcut(Record):
    """The maps of several checkpoints.

    Attributes:
        panels: The checkpoints.
        maps: Their maps.
    """

    panels: tuple[Panel, ...]
    maps: tuple[ShortcutMap, ...]

    def frame(self) -> pd.DataFrame:
        """checkpoint, hook (the point that is patched), loop, layer, position, name of the
        position, effect.
        """
        return together(self.panels, [each.frame() for each in self.maps])

    def summary(self) -> pd.DataFrame:
        """One row per checkpoint: questions, clean margin, share of the effect on the last half and
        on the head, the largest effect.
        """
        rows = []
        for panel, each in zip(self.panels, self.maps, strict=True):
            strongest = divmod(int(each.effect.abs().argmax()), len(each.tokens))
            place = f"{each.names[strongest[0]]} at {each.columns()[strongest[1]]}"
            numbers = (
                each.clean_margin,
                each.last_half(),
                float(each.share()[0]),
                float(each.effect[strongest]),
            )
            rows.append((panel.checkpoint, each.hops, len(each.texts), *numbers, place))
        columns = [
            "checkpoint",
            "hops",
            "questions",
            "clean margin",
            "on the last half",
            "on the head",
            "largest effect",
            "at",
        ]
        return pd.DataFrame(rows, columns=columns)


def run(config: ShortcutConfig) -> Shortcut:
    """Map every checkpoint.

    Raises:
        ValueError: No checkpoint is named, one has no questions of the hop count, it is not known
            how many hops were trained, or fewer than one random run per question is asked for.
    """
    if config.draws < 1:
        raise ValueError(f"each question needs at least one random run, got draws={config.draws}")
    subjects = opened(config)
    asked = [_hops(subject, config.hops) for subject in subjects]
    maps = [measure(subject, hops, config) for subject, hops in zip(subjects, asked, strict=True)]
    return Shortcut(tuple(map(Panel.of, subjects)), tuple(maps))


def _hops(subject: Subject, hops: int | None) -> int:
    wanted = hops or subject.trained_hops
    if wanted is None:
        raise ValueError(
            f"the card of {subject.name} does not say how many hops were trained; pass --hops"
        )
    subject.of_hops(wanted)
    return wanted


def measure(subject: Subject, hops: int, config: ShortcutConfig) -> ShortcutMap:
    """The map of an open checkpoint, for questions of one hop count."""
    asked = subject.of_hops(hops) if config.average else [_answered(subject, hops, config.n_loops)]
    texts = [question.text for question in asked]
    generator = torch.Generator().manual_seed(config.seed)
    random = [_random_question(subject, text, generator) for text in texts * config.draws]
    batch, answers = subject.encode(asked * config.draws)
    trace = noising_map(
        subject.model, batch, subject.model.encode(random), answers, n_loops=config.n_loops
    )
    return ShortcutMap(
        hops=hops,
        texts=tuple(texts),
        random=tuple(random),
        tokens=tuple(subject.model.to_str_tokens(batch.tokens[0])),
        names=trace.names,
        effect=trace.effect.cpu(),
        clean_margin=float(trace.sweep.clean.mean()),
    )


def _answered(subject: Subject, hops: int, n_loops: int | None) -> Question:
    """The first question that is answered, or the first one."""
    group = subject.of_hops(hops)
    batch, answers = subject.encode(group)
    right = readout_lens(subject.model, batch, n_loops).correct(answers)[-1]
    return group[int(right.int().argmax())]


def _random_question(subject: Subject, text: str, generator: torch.Generator) -> str:
    """Another head and other relations, so that no position has the clean question's token by
    chance.
    """
    words = subject.model.vocab.words if subject.model.vocab else ()
    drawn = []
    for token in subject.model.to_str_tokens(text):
        others = [word for word in words if word[:3] == token[:3] and word != token]
        if not others:
            raise ValueError(
                f"a random question needs a second token of the kind of {token}, but the vocabulary"
                f" of {subject.name} has none"
            )
        drawn.append(others[int(torch.randint(len(others), (1,), generator=generator))])
    return "".join(drawn)


def figure(record: Shortcut) -> go.Figure:
    """Below: rows are visits, columns positions, colour the change of the margin; above: each
    position's share of it.
    """
    count = len(record.maps)
    alike = len({each.names for each in record.maps}) == 1
    plot = make_subplots(
        rows=2,
        cols=count,
        column_widths=[len(each.tokens) for each in record.maps],
        row_heights=[0.22, 0.78],
        shared_xaxes="columns",
        shared_yaxes="rows" if alike else False,
        horizontal_spacing=(0.08 if alike else 0.22) / (count + 1),
        vertical_spacing=0.035,
        column_titles=list(map(_title, record.panels, record.maps)),
    )
    for col, (panel, each) in enumerate(zip(record.panels, record.maps, strict=True), start=1):
        _draw(plot, panel, each, col)
        rows = [-0.5, len(each.names) - 0.5]
        plot.update_yaxes(type="category", range=rows, tickfont_size=11, row=2, col=col)
    highest = max(float(each.share().max()) for each in record.maps)
    plot.update_yaxes(range=[0, 1.1 * highest], tickformat=".0%", nticks=4, row=1)
    plot.update_yaxes(title="share of the<br>total effect", row=1, col=1)
    plot.update_yaxes(title=AXIS, row=2, col=1)
    plot.update_xaxes(type="category", tickfont_size=11)
    plot.update_xaxes(title="position", row=2)
    plot.update_layout(coloraxis=_color_axis(record), bargap=0.15)
    height = 230 + 30 * max(len(each.names) for each in record.maps)
    styled(plot, height).update_layout(margin={"t": 84, "b": 80, "r": 20})
    small_titles(plot, count)
    headline(plot, "one state of a random run put into the clean run, cell by cell", 46)
    return plot


def _title(panel: Panel, each: ShortcutMap) -> str:
    positions = len(each.tokens)
    found = f"{each.last_half():.0%} on the last {positions // 2} of {positions} positions"
    return panel.title(f"<span style='color:{MARK}'>{found}</span>")


def _color_axis(record: Shortcut) -> dict[str, Any]:
    """One scale of the change of the margin for all maps."""
    most = max(float(each.effect.abs().max()) for each in record.maps) or 1.0
    text = "change of the answer's margin (logits)"
    bar = {"title": {"text": text, "side": "right", "font": {"size": 12}}, "thickness": 10}
    return {
        "colorscale": SIGNED_SCALE,
        "cmin": -most,
        "cmax": most,
        "colorbar": {**bar, "outlinewidth": 0, "len": 0.78, "y": 0.37},
    }


def _draw(plot: go.Figure, panel: Panel, each: ShortcutMap, col: int) -> None:
    names, half = ([label(name) for name in each.columns()], len(each.tokens) // 2)
    colors = [_BAR] * (len(names) - half) + [MARK] * half
    plot.add_bar(
        x=names,
        y=each.share().tolist(),
        marker_color=colors,
        showlegend=False,
        hovertemplate=(
            f"{label(panel.checkpoint)}<br>position %{{x}}<br>%{{y:.1%}} of the total"
            " effect<extra></extra>"
        ),
        row=1,
        col=col,
    )
    values = each.effect.tolist()
    plot.add_heatmap(
        x=names,
        y=each.steps(),
        z=values,
        coloraxis="coloraxis",
        xgap=1,
        ygap=1,
        text=[[f"{value:.0f}".replace("-0", "0") for value in row] for row in values],
        texttemplate="%{text}",
        textfont=CELL_TEXT,
        customdata=[
            [f"{name}<br>{spoken(name)}<br>{text}" for text in _instead(each)]
            for name in each.names
        ],
        hovertemplate=(
            f"{label(panel.checkpoint)}<br>%{{customdata}}<br>position %{{x}}<br>"
            "change of the margin %{z:.2f} logits<extra></extra>"
        ),
        row=2,
        col=col,
    )


def _instead(each: ShortcutMap) -> list[str]:
    """For the hover text: what stands at each position in the random run."""
    if len(each.random) > 1:
        return [f"mean over {len(each.random)} random runs"] * len(each.tokens)
    others = ["<" + part for part in each.random[0].split("<")[1:]]
    others += [""] * (len(each.tokens) - len(others))
    return [label(f"in the random run {token}") for token in others]


EXAMPLE = 'plots.shortcut("mini/shortcut", hops=3, per_hop=3, n_loops=2)'
