"""One feature of a dictionary: when it is on, and the effects that it has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from plotly.subplots import make_subplots
from torch import Tensor

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section
from loopscope.analyses.common.subject import words
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.effects import feature_effects
from loopscope.interp.dictionaries.sae_files import load_dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import train_dictionary
from loopscope.interp.drawing.cells import CellMap
from loopscope.interp.drawing.labels import label, visible
from loopscope.interp.drawing.look import CATEGORIES, MARK, styled


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(InputsConfig):
    """One feature of a sparse dictionary: the inputs in which it is strongest, its profile over
    loops, its direct effect on logits, and what its ablation does.
    """

    dictionary: Path | None = None
    """Folder of a dictionary of this checkpoint, as `save_dictionary` writes it; by default a small
    one is trained on the inputs first, which takes some seconds.
    """
    feature: int | None = None
    """The feature, from 0; by default the one with the strongest activation."""
    loop: int | None = None
    """Loop of which examples are shown; by default all, and the last one of a dictionary in which
    each loop has features of its own.
    """
    examples: int = 6
    """Inputs to show."""


_SMALL = DictionaryTraining(n_features=128, steps=200, batch_size=64)
_TOKENS = 6  # raised most, and as many that are lowered most
_WIDE = 24  # tokens that are shown of a long input


@dataclass(frozen=True)
class Feature(Record):
    """One feature.

    Attributes:
        feature: Its number, from 0.
        kind: The kind of its dictionary.
        hook: Where the dictionary writes, within a loop.
        inputs: How many inputs were run.
        on: In how many of them the feature is on.
        texts: The inputs in which it is strongest, by falling activation.
        tokens: The tokens of each.
        activation: Float[Tensor, "input pos"], at the loop at which the input's activation is
            strongest; NaN for padding.
        loops: Int[Tensor, " input"], that loop.
        profile: Float[Tensor, " loop"], the mean length over tokens of what the feature writes.
        share: Float[Tensor, " loop"], the share of tokens in which it is on.
        own: Whether margins are of the model's own answers, because no others are known.
        margin: Float[Tensor, " loop_and_all"], the mean change of the answer's margin, in logits,
            where the feature is taken out at one loop alone, and at all of them; of inputs in which
            it is on. NaN where it is no feature of the loop.
        changed: Float[Tensor, " loop_and_all"], the share of top tokens that change.
        raised: The tokens whose logits it raises most, then those that it lowers most.
        effect: Float[Tensor, " token"], the mean direct effect on their logits, around the mean
            over the vocabulary.
    """

    feature: int
    kind: str
    hook: str
    inputs: int
    on: int
    texts: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    activation: Float[Tensor, "input pos"]
    loops: Int[Tensor, " input"]
    profile: Float[Tensor, " loop"]
    share: Float[Tensor, " loop"]
    own: bool
    margin: Float[Tensor, " loop_and_all"]
    changed: Float[Tensor, " loop_and_all"]
    raised: tuple[str, ...]
    effect: Float[Tensor, " token"]

    def heading(self) -> str:
        """The feature, and where its dictionary writes."""
        return f"feature {self.feature} of a {self.kind} dictionary at {self.hook}"

    def frame(self) -> pd.DataFrame:
        """One row per number: part, input, loop, position, token, value."""
        rows: list[tuple[Any, ...]] = []
        for i, tokens in enumerate(self.tokens):
            rows += [
                ("activation", i, int(self.loops[i]), at, token, float(self.activation[i, at]))
                for at, token in enumerate(tokens)
            ]
        for name in ("profile", "share", "margin", "changed"):
            values = getattr(self, name).tolist()
            loops = [*range(len(self.profile)), None]
            rows += [(name, None, t, None, None, v) for t, v in zip(loops, values, strict=False)]
        effects = zip(self.raised, self.effect.tolist(), strict=True)
        rows += [("direct effect", None, None, None, token, v) for token, v in effects]
        columns = ["part", "input", "loop", "position", "token", "value"]
        whole = dict.fromkeys(("input", "loop", "position"), "Int64")
        return pd.DataFrame(rows, columns=columns).astype(whole)

    def summary(self) -> pd.DataFrame:
        """One row per input that is shown: where the feature is strongest in it."""
        at = self.activation.nan_to_num(-math.inf).argmax(1).tolist()
        return pd.DataFrame(
            {
                "input": self.texts,
                "strongest at": [f"{p} {self.tokens[i][p]}" for i, p in enumerate(at)],
                "loop": ["all"] * len(at) if self.kind == "crosscoder" else self.loops.tolist(),
                "activation": [float(self.activation[i, p]) for i, p in enumerate(at)],
            }
        )


def run(config: FeatureConfig) -> Feature:
    """Look at a feature in the checkpoint's questions, or in the inputs that are given."""
    asked = open_inputs(config)
    group = everything(asked, config.hops)
    if config.dictionary is None:
        model = asked.subject.model
        dictionary = train_dictionary(model, group.batch, training=_SMALL)
    else:
        dictionary = load_dictionary(config.dictionary).to(asked.subject.model.device)
    return measure(asked, group, dictionary, config.feature, config.loop, config.examples)


def everything(asked: Asked, hops: int | None = None) -> Group:
    """All inputs, or the questions of one hop count, as one group."""
    groups = asked.groups(hops)
    if len(groups) == 1:
        return groups[0]
    texts = tuple(text for group in groups for text in group.texts)
    answers = tuple(answer for group in groups for answer in group.answers)
    return Group(None, texts, asked.subject.batch(texts), answers)


def measure(
    asked: Asked,
    group: Group,
    dictionary: Dictionary,
    feature: int | None = None,
    loop: int | None = None,
    examples: int = 6,
) -> Feature:
    """The record of a feature, for inputs of an open checkpoint."""
    model, batch = asked.subject.model, group.batch
    dictionary.check(model)
    answers = asked.answers(group, None, dictionary.n_loops)
    found = feature_effects(model, dictionary, batch, answers.ids, feature, loop=loop, k=examples)
    order = found.logits.argsort(descending=True, stable=True)
    few = min(_TOKENS, len(order) // 2)
    chosen = torch.cat([order[:few], order[len(order) - few :]])
    rows = found.rows.tolist()
    return Feature(
        feature=found.feature,
        kind=dictionary.kind,
        hook=dictionary.reading.target,
        inputs=len(batch),
        on=len(found.on),
        texts=tuple(group.texts[row] for row in rows),
        tokens=tuple(words(model, batch.tokens[row][batch.mask[row].bool()]) for row in rows),
        activation=found.activation.cpu(),
        loops=found.loops.cpu(),
        profile=found.profile.cpu(),
        share=found.share.cpu(),
        own=answers.own,
        margin=found.margin.cpu(),
        changed=found.changed.cpu(),
        raised=words(model, chosen),
        effect=found.logits[chosen].cpu(),
    )


def figure(record: Feature) -> go.Figure:
    """Above: the inputs in which the feature is strongest, token by token. Below: its profile, what
    its ablation does, and the tokens whose logits it moves most.
    """
    whose = "the model's answer" if record.own else "the answer"
    titles = (
        f"inputs in which feature {record.feature} is strongest",
        "mean length of what it writes",
        f"{whose}'s margin without it, change in logits",
        "direct effect on logits",
    )
    plot = make_subplots(
        rows=2, cols=3, specs=[[{"colspan": 3}, None, None], [{}, {}, {}]], subplot_titles=titles,
        horizontal_spacing=0.11, vertical_spacing=0.22, row_heights=[0.42, 0.58],
    )  # fmt: skip
    bar = {"title": "activation", "thickness": 10, "len": 0.4, "y": 1, "yanchor": "top"}
    plot.add_trace(_cells(record).trace(colorbar={**bar, "outlinewidth": 0}), row=1, col=1)
    plot.add_trace(_over_loops(record.profile, record.share, "on in {:.0%} of tokens"), 2, 1)
    without = record.margin[:-1], record.changed, "{:.0%} of top tokens change"
    plot.add_trace(_over_loops(*without), 2, 2)
    line = {"color": MARK, "width": 2, "dash": "dot"}
    at_all = float(record.margin[-1])
    plot.add_hline(at_all, line=line, annotation_text="at all loops", row=2, col=2)
    reach = [1.15 * v for v in (*record.margin.nan_to_num().tolist(), 0.0)]
    plot.update_yaxes(range=[min(reach), max(reach)], row=2, col=2)
    tokens, effects = list(record.raised[::-1]), record.effect.flip(0).tolist()
    plot.add_bar(
        x=effects, y=[label(visible(token)) for token in tokens], orientation="h",
        marker_color=[CATEGORIES[0] if effect > 0 else MARK for effect in effects],
        hovertemplate="%{y}<br>%{x:.3g} logits<extra></extra>", row=2, col=3,
    )  # fmt: skip
    for col, title in enumerate(("loop", "loop", "logits"), start=1):
        plot.update_xaxes(title=title, row=2, col=col)
    plot.update_xaxes(type="category", title="position", row=1, col=1)
    plot.update_yaxes(type="category", row=1, col=1)
    plot.update_yaxes(type="category", row=2, col=3)
    plot.update_annotations(font_size=13)
    return styled(plot, 440 + 26 * len(record.tokens)).update_layout(showlegend=False)


def _over_loops(values: Tensor, shares: Tensor, said: str) -> go.Bar:
    """Bars over loops, and what else is said of each."""
    told = ["" if share != share else said.format(share) for share in shares.tolist()]
    return go.Bar(
        x=list(range(len(values))),
        y=values.tolist(),
        customdata=told[: len(values)],
        hovertemplate="loop %{x}<br>%{y:.3g}<br>%{customdata}<extra></extra>",
        marker_color=CATEGORIES[0],
    )


def _cells(record: Feature) -> CellMap:
    """The activations in each input, around its strongest token where it is long."""
    longest = max(map(len, record.tokens))
    columns = range(min(_WIDE, longest))
    cells: list[list[tuple[str, float, str]]] = []
    for i, strongest in enumerate(record.activation.nan_to_num(-math.inf).argmax(1).tolist()):
        start = max(0, strongest - _WIDE // 2) * (longest > _WIDE)
        cells.insert(0, [_cell(record, i, start + column) for column in columns])
    return CellMap(
        title="",
        columns=list(columns),
        rows=[f"input {i}{_when(record, i)}" for i in reversed(range(len(cells)))],
        values=[[value for _, value, _ in row] for row in cells],
        unit="activation",
        scale="size",
        texts=[[token for token, _, _ in row] for row in cells],
        hover=[[place for _, _, place in row] for row in cells],
    )


def _when(record: Feature, row: int) -> str:
    return "" if record.kind == "crosscoder" else f", loop {int(record.loops[row])}"


def _cell(record: Feature, row: int, position: int) -> tuple[str, float, str]:
    """Token, activation and place; nothing behind the end of the input."""
    if position >= len(record.tokens[row]):
        return "", math.nan, ""
    place = f"position {position} of input {row}"
    return record.tokens[row][position], float(record.activation[row, position]), place


def _found(record: Feature) -> str:
    tops = " and ".join(visible(token) for token in record.raised[:2])
    return (
        f"Feature {record.feature} is on in {record.on} of {record.inputs} inputs. By itself it"
        f" raises the logits of {tops} most. Taken out at all loops of these inputs, it changes"
        f" {float(record.changed[-1]):.0%} of their top tokens and the margin by"
        f" {float(record.margin[-1]):.2f} logits."
    )


def _of_report(opened: Opened) -> Feature:
    folder = opened.config.dictionary
    assert folder is not None, "the section serves no other report"
    group = everything(opened.asked, opened.config.hops)
    dictionary = load_dictionary(folder).to(opened.asked.subject.model.device)
    return measure(opened.asked, group, dictionary, opened.config.feature)


SECTION = Section(
    title="A feature of the dictionary",
    look_for=(
        "The tokens in which the feature is strongest say what it is about; its profile says at"
        " which loops it is active. Its direct effect is what it adds to the logits if the model"
        " stops where the feature is strongest. Its ablation shows how the answer's margin changes"
        " if the feature is taken out at one loop, and what the rest of the run makes of that; the"
        " dotted line is for all loops together."
    ),
    measure=_of_report,
    found=_found,
    serves=lambda opened: opened.config.dictionary is not None,
)

EXAMPLE = 'plots.feature("mini/multi_hop/r4", hops=3, per_hop=8)'
