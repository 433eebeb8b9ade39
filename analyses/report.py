"""The main job: all analyses of one checkpoint in one HTML page that works offline."""

from __future__ import annotations

import html
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import torch
from plotly.offline import get_plotlyjs
from tqdm.auto import tqdm

from analyses import halting_curves, lens_heatmap, overthinking, patching_map, recurrence_grid
from analyses.by_hop import run_by_hop
from analyses.configs import HaltingConfig, RecurrenceConfig, ReportConfig
from analyses.records import FIGURE_CONFIG, Record, write_text
from analyses.subject import Subject, open_subject
from interp.halting import HaltingRule

_STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Section:
    """One figure of the page.

    Attributes:
        key: Its anchor.
        title: Its heading.
        look_for: What to look for, in general.
        found: What this checkpoint shows, in numbers.
        record: The record behind it.
        figure: The figure.
    """

    key: str
    title: str
    look_for: str
    found: str
    record: Record
    figure: go.Figure


def run(config: ReportConfig) -> tuple[Subject, list[Section]]:
    """Make all five records and figures; the questions are run once for the first three."""
    subject = open_subject(config)
    with tqdm(total=4, desc="report") as bar:
        runs = run_by_hop(subject, config.n_loops)
        bar.update()
        halting = HaltingConfig()
        rule = HaltingRule(RecurrenceConfig().kl, RecurrenceConfig().entropy)
        margins = overthinking.measure(subject, runs)
        grid = recurrence_grid.measure(subject, runs, rule)
        stops = halting_curves.measure(runs, halting.kl, halting.entropy)
        bar.update()
        lens = lens_heatmap.measure(subject, subject.example(config.hops).text)
        bar.update()
        patches = patching_map.measure(subject, [question.text for question in subject.of_hops(config.hops)])
        bar.update()
    return subject, [_margin_section(margins), _grid_section(grid), _lens_section(lens), _patch_section(patches), _halting_section(stops)]


def write_report(config: ReportConfig, path: Path) -> Path:
    """Run everything and write the page, whole or not at all."""
    started = time.perf_counter()
    subject, sections = run(config)
    return write_text(path, page(subject, sections, time.perf_counter() - started))


def _margin_section(record: overthinking.Overthinking) -> Section:
    drop, (peak, where) = record.drop(), record.peak()
    answered = [i for i in range(len(record.hops)) if peak[i] > 0] or list(range(len(record.hops)))
    worst = max(answered, key=lambda i: float(drop[i]))
    falling = [str(hop) for hop, fall in zip(record.hops, drop.tolist(), strict=True) if fall > 0.5]
    found = (
        f"Among the hop counts that are answered on average, {record.hops[worst]} falls most: its mean margin peaks at {peak[worst]:.2f} "
        f"in iteration {int(where[worst])} and ends at {record.margin[worst, -1]:.2f}. "
        f"Hop counts that end more than half a logit below their peak: {', '.join(falling) or 'none'}."
    )
    look_for = (
        "Each curve is the mean margin of the right answer over its strongest rival after every iteration; dashed lines mark the mean "
        "first iteration that has the answer on top (t*). A curve that falls after its peak is overthinking: more iterations make "
        "the answer worse. Questions with more hops should rise later."
    )
    return Section("margin", "Logit margin and overthinking", look_for, found, record, overthinking.figure(record))


def _grid_section(record: recurrence_grid.RecurrenceGrid) -> Section:
    best = record.accuracy.max(1).values
    trained = record.trained_hops or 0
    beyond = [hop for hop, accuracy in zip(record.hops, best.tolist(), strict=True) if hop > trained and accuracy >= 0.6]
    inside = best[: sum(hop <= trained for hop in record.hops)]
    found = f"Hop counts in training reach at least {inside.min():.2f} at their best r. " if trained else ""
    reach = f"up to {max(beyond)} hops stay at 0.60 or better" if beyond else "no hop count reaches 0.60"
    found += f"Beyond training {reach}." if trained else f"Over all hop counts, {reach}."
    look_for = (
        "Every cell is the accuracy that the model has when it is stopped after r iterations; all rows come from one run. Right of the "
        "dotted line no question of that depth was in training. Deeper questions need more iterations; columns that pale towards the "
        "top overthink. The row r* lets an adaptive rule choose when to stop."
    )
    return Section("grid", "Accuracy by hops and iterations", look_for, found, record, recurrence_grid.figure(record))


def _lens_section(record: lens_heatmap.LensHeatmap) -> Section:
    reached = [token for k, token in enumerate(record.tracked) if bool((record.rank[k] == 0).any())]
    found = (
        f"The question is {record.text}; the answer is {record.answer}. "
        f"Of its {len(record.tracked)} tracked tokens, {len(reached)} come out on top somewhere."
    )
    look_for = (
        "Read the residual stream as if the model stopped here: the top token at every position after every block. In a "
        "model that follows the relations one after another, each intermediate entity appears at its own relation, one iteration after "
        "the one before it. The right panel follows the rank of each entity at its own relation."
    )
    return Section("lens", "Logit lens of one question", look_for, found, record, lens_heatmap.figure(record))


def _patch_section(record: patching_map.PatchingMap) -> Section:
    strongest = record.effect.argmax(1).tolist()
    moves = [j for i, j in enumerate(strongest) if i == 0 or j != strongest[i - 1]]
    path = " → ".join(record.columns()[j] for j in moves)
    found = (
        f"Means over {len(record.clean)} pairs such as {record.clean[0]} against {record.corrupted[0]}; the margin of the clean answer is "
        f"{record.clean_margin:.2f} clean and {record.corrupted_margin:.2f} corrupted. From the embedding upwards the strongest "
        f"position moves {path}."
    )
    look_for = (
        "Each corrupted question starts from another entity. A cell puts one clean activation into the corrupted run and measures how "
        "much of the clean margin comes back (1 = all of it). Where the colour is, the answer's history is being carried at that "
        "moment: it should walk along the relations as the iterations go by, and stay at the readout once the answer is known."
    )
    return Section("patching", "What one activation carries", look_for, found, record, patching_map.figure(record))


def _halting_section(record: halting_curves.HaltingCurves) -> Section:
    both, kl_only = record.accuracy.mean(1)[:2].tolist()
    used = record.loops_used.mean(1).tolist()
    found = (
        f"The rule with both conditions uses {used[0]:.1f} iterations on average for an accuracy of {both:.2f}; KL alone stops after "
        f"{used[1]:.1f} with {kl_only:.2f}."
    )
    look_for = (
        "An adaptive rule watches the model's own answers: it stops when two successive ones agree (small KL) and the answer is sure "
        "(small entropy). A good rule uses more iterations for deeper questions and loses little against the best fixed r (dotted). "
        "KL alone tends to stop while nothing has happened yet."
    )
    return Section("halting", "Adaptive halting", look_for, found, record, halting_curves.figure(record))


def page(subject: Subject, sections: Iterable[Section], seconds: float) -> str:
    """The whole page; plotly.js is in it once, and nothing is fetched."""
    sections = list(sections)
    cfg = subject.model.cfg
    facts = {
        "family": cfg.family.replace("_", "-"),
        "layers, iterations": f"{cfg.n_layers}, {cfg.n_loops or 'not recorded'}",
        "width": f"{cfg.d_model}, {cfg.n_heads} heads",
        "parameters": f"{sum(p.numel() for p in subject.model.parameters()):,}",
        "questions": f"{sum(map(len, subject.questions.values())):,} of {min(subject.questions)} to {max(subject.questions)} hops",
        "hops in training": str(subject.trained_hops or "not recorded"),
        "answer read at": str(subject.model.read_at),
    }
    cards = "".join(f"<div class=fact><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in facts.items())
    links = "".join(f'<a href="#{s.key}">{html.escape(s.title)}</a>' for s in sections)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>loopscope: {html.escape(subject.name)}</title><link rel="icon" href="data:,">
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>
<body><header><p class=brand>loopscope</p><h1>{html.escape(subject.name)}</h1>
<p class=lead>{html.escape(str(subject.card.get("task", "A looped transformer, iteration by iteration.")))}</p>
<div class=facts>{cards}</div><nav>{links}</nav></header>
<main>{"".join(map(_section_html, sections))}</main>
<footer>Computed in {seconds:.0f} s with {versions}. Figures follow arXiv 2604.07822.</footer></body></html>
"""


def _section_html(section: Section) -> str:
    figure = pio.to_html(section.figure, include_plotlyjs=False, full_html=False, config=FIGURE_CONFIG, div_id=f"figure-{section.key}")
    return f"""<section id="{section.key}"><h2>{html.escape(section.title)}</h2>
<p>{html.escape(section.look_for)}</p><p class=found>{html.escape(section.found)}</p>
<div class=figure>{figure}</div>
<details><summary>Numbers</summary><div class=table>{_table(section.record.summary())}</div></details></section>
"""


def _table(frame: pd.DataFrame) -> str:
    return str(frame.to_html(index=False, border=0, float_format=lambda value: f"{value:.2f}", na_rep=""))
